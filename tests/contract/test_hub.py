"""Models named by hub id on the real engine, offline, from a cache that the test lays out; and a
family that is not spelled out here, which runs without predictions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract import tiny
from tests.hub import OTHER, add
from workers import runner
from workers.contract.engine import EngineSettings, Speculative
from workers.contract.job import Job, Ticket
from workers.contract.measure import Measure
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

FIRST, SECOND = "1" * 40, "2" * 40
WORKLOAD = Workload(batch_size=2, input_tokens=16, output_tokens=4)
UNSPOKEN: dict[str, Any] = {
    "architectures": ["ExaoneMoEForCausalLM"],
    "model_type": "exaone_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "is_moe_layer": [False, True, True],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layer_types": ["full_attention"] * 3,
    "sliding_window": 64,
    "sliding_window_pattern": "LLLG",
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "moe_layer_freq": [0, 1, 1],
    "torch_dtype": "bfloat16",
}
"""A family that vLLM knows and `workers.moe.families` does not, with a field that even an estimate
stumbles over."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`made/target` with weights and a tokenizer, whose `v2` is a configuration alone of another
    structure, and `made/draft`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from workers.texts import texts_of

    root = tmp_path_factory.mktemp("hub")
    target, draft = root / "target", root / "draft"
    words = Tokenizer(models.BPE(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"])
    words.train_from_iterator([one.text for one in texts_of("builtin:en")], trainer)
    for folder, layers in ((target, 2), (draft, 1)):
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
        made = {"vocab_size": 512, "num_hidden_layers": layers}
        tiny.checkpoint(folder, "mixtral", dtype="bfloat16", **made)
    add(root / "cache", "made/target", FIRST, target)
    add(root / "cache", "made/target", SECOND, {"config.json": OTHER}, refs=("v2",))
    add(root / "cache", "made/draft", FIRST, draft)
    return root / "cache"


def run(trial: Trial) -> dict[str, Any]:
    """Its record."""
    ticket = Ticket(trial=trial, trial_id="t", predicted={"predicted_reason": "as planned"})
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=(ticket,))
    (found,) = (one for one in runner.run(job) if isinstance(one, Finished))
    row: dict[str, Any] = found.record.to_pylist()[0]
    return row


def of(model: Model, workload: Workload = WORKLOAD, **engine: Any) -> Trial:
    settings = EngineSettings(eager=True, **engine)
    return Trial(model=model, workload=workload, engine=settings, measure=Measure(repeats=1))


def test_checkpoint_draft_and_tokenizer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    text = Workload(batch_size=2, input_tokens=16, output_tokens=4, dataset="builtin:en")
    draft = Speculative(model="made/draft", tokens=2)
    row = run(of(Model(name="made/target"), text, speculative=draft))
    assert row["outcome"] == "ok", row["outcome_reason"]
    assert (row["model"], row["num_layers"], row["num_experts"]) == ("made/target", 2, 8)
    told = json.loads(row["engine_args"])
    assert (told["model"], told["revision"]) == ("made/target", FIRST), "no folder of this machine"
    drafting = told["speculative_config"]
    assert (drafting["model"], drafting["revision"]) == ("made/draft", FIRST)


def test_skeleton_of_a_revision(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    row = run(of(Model(name="made/target", revision="v2", weights="dummy", top_k=1)))
    assert row["outcome"] == "ok", row["outcome_reason"]
    shape = {key: row[key] for key in ("num_layers", "hidden_size", "num_experts", "top_k")}
    assert shape == {"num_layers": 3, "hidden_size": 256, "num_experts": 8, "top_k": 1}
    assert json.loads(row["engine_args"])["revision"] == SECOND
    assert row["params_total"] is not None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Model(name="made/target", revision="v2"), "does not hold all of its weights: fetch the"),
        (Model(name="made/none", weights="dummy"), "made/none is not in the hub cache"),
        (Model(name="made/target", revision="v3"), "which has of it main, v2, 111"),
    ],
)
def test_what_the_cache_lacks_is_said_in_one_line(
    model: Model, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    row = run(of(model))
    assert row["outcome"] == "crashed" and said in row["outcome_reason"]
    assert str(cache) in row["outcome_reason"] and "\n" not in row["outcome_reason"]
    assert "Traceback" not in row["outcome_reason"] and "HF_HUB_OFFLINE" in row["outcome_reason"]


def test_a_family_that_is_not_spelled_out_runs(tmp_path: Path) -> None:
    """What the engine tells of its shape reaches the record; nothing is derived from a guess."""
    (tmp_path / "config.json").write_text(json.dumps(UNSPOKEN))
    row = run(of(Model(name=str(tmp_path), weights="dummy")))
    assert row["outcome"] == "ok", row["outcome_reason"]
    shape = {key: row[key] for key in ("num_layers", "hidden_size", "num_experts", "top_k")}
    assert shape == {"num_layers": 3, "hidden_size": 128, "num_experts": 4, "top_k": 2}
    assert row["e2e_s"] > 0 and row["weights_gib"] > 0 and row["kv_cache_gib"] > 0
    unknown = ("params_total", "params_active", "ffn_dim", "mbu", "s_mbu", "mfu", "s_mfu")
    assert all(row[key] is None for key in unknown)
    assert row["predicted_e2e_s"] is None and row["predicted_reason"] == "as planned"
