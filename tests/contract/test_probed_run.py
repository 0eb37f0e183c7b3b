"""A group measured with `measure.activation`: what is timed, what is counted, what is written.

On a small checkpoint with a tokenizer, so that prompts of text are measured as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.measure import Measure
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.moe.activation import uniform_distinct

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

LAYERS, EXPERTS, TOP_K = 2, 8, 2
WORKLOAD = Workload(batch_size=4, input_tokens=24, output_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from workers.texts import texts_of

    folder = tmp_path_factory.mktemp("mixtral")
    words = Tokenizer(models.BPE(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"])
    words.train_from_iterator([one.text for one in texts_of("builtin:en")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _run(*trials: Trial) -> dict[str, Finished]:
    tickets = tuple(Ticket(trial=one, trial_id=f"t{i}") for i, one in enumerate(trials))
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=tickets)
    return {one.trial_id: one for one in runner.run(job) if isinstance(one, Finished)}


def test_timed_passes_are_replayed_and_their_experts_written(checkpoint: Path) -> None:
    plain = Trial(
        model=Model(name=str(checkpoint)),
        workload=WORKLOAD,
        engine=EngineSettings(eager=True),
        measure=Measure(repeats=3),
    )
    counted = replace(plain, measure=Measure(repeats=3, activation=True))
    text = replace(counted, workload=replace(WORKLOAD, dataset="builtin:en"))
    found = _run(counted, text, plain)
    assert {one.outcome for one in found.values()} == {"ok"}
    rows = {key: pl.DataFrame(one.record).row(0, named=True) for key, one in found.items()}

    row = rows["t0"]
    assert row["activation_source"] == "traced" and row["traced_passes"] == 3
    assert rows["t2"]["activation_source"] == "uniform" and rows["t2"]["traced_passes"] is None
    assert rows["t2"]["s_mbu_uniform"] is None and found["t2"].activations is None
    assert 0 < row["activated_experts_decode"] <= EXPERTS
    assert rows["t1"]["dataset"] == "builtin:en" and row["dataset"] is None

    samples = pl.DataFrame(found["t0"].samples)
    timed, probes = (samples.filter(kind=kind) for kind in ("timed", "probe"))
    assert probes["repeat"].to_list() == timed["repeat"].to_list() == [0, 1, 2]
    assert timed["pass_experts"].null_count() == 3 and probes["token_s"].null_count() == 3
    for probe, pass_ in zip(probes.iter_rows(named=True), timed.iter_rows(named=True), strict=True):
        assert len(probe["pass_s"]) == len(pass_["step_s"]) == len(probe["pass_experts"])
        for busiest, new in zip(probe["pass_busiest"], probe["pass_new"], strict=True):
            assert all(TOP_K * sum(new) / EXPERTS <= most <= sum(new) for most in busiest)
        assert probe["pass_context"][-1] == [24 + 4] * 4 and probe["pass_new"][-1] == [1] * 4
        assert sum(map(sum, probe["pass_new"])) == 4 * (24 + 6 - 1)

    activations = pl.DataFrame(found["t0"].activations)
    per_layer = activations.group_by("phase", "layer").agg(pl.col("tokens").sum(), pl.len())
    assert per_layer.height == 2 * LAYERS and set(per_layer["len"]) == {EXPERTS}
    tokens = {"prefill": 3 * 4 * 24, "decode": 3 * 4 * 5}
    for one in per_layer.iter_rows(named=True):
        assert one["tokens"] == TOP_K * tokens[one["phase"]]

    decode = [
        experts
        for probe in probes.iter_rows(named=True)
        for experts, decoding in zip(probe["pass_experts"], probe["pass_decoding"], strict=True)
        if all(decoding)
    ]
    assert row["activated_experts_decode"] == pytest.approx(np.mean(decode))
    expected = uniform_distinct(EXPERTS, TOP_K, [4])[0]
    fewer = row["activated_experts_decode"] < expected
    assert (row["s_mbu"] < row["s_mbu_uniform"]) is bool(fewer)
    other = pl.DataFrame(found["t1"].activations)
    assert not other.equals(activations), "text is routed otherwise than random ids"


def test_text_needs_a_tokenizer_and_tokens_that_the_model_knows(checkpoint: Path) -> None:
    dummy = Trial(
        model=Model(name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584),
        workload=replace(WORKLOAD, dataset="builtin"),
        engine=EngineSettings(eager=True),
        measure=Measure(repeats=1),
    )
    (without,) = _run(dummy).values()
    assert without.outcome == "infeasible"
    reason = without.record.column("outcome_reason")[0].as_py()
    assert "tokenizer of mixtral-8x7b" in reason
    short = replace(
        dummy,
        model=Model(name=str(checkpoint)),
        workload=replace(WORKLOAD, dataset="builtin:de", batch_size=200),
    )
    (found,) = _run(short).values()
    assert found.outcome == "infeasible"
    assert "too short" in found.record.column("outcome_reason")[0].as_py()
