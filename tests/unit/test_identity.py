"""Which trial a trial is: what it stands for counts, and how it is called does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SweepError
from orchestrator.plan import Plan
from orchestrator.request import Request, prepare
from workers.contract.engine import EngineSettings, Speculative
from workers.contract.measure import Measure
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.identity import Identities

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def identity(trial: Trial) -> str:
    return Identities().trial_id(trial)


def skeleton(name: str | Path, **changes: Any) -> Trial:
    return Trial(model=Model(name=str(name), weights="dummy", **changes))


def planned(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return prepare(Request(sweep=path), "h100")[1]


def sweep(grid: str, model: str = "{name: mixtral-8x7b, weights: dummy}", rest: str = "") -> str:
    return (
        f"name: s\nbase:\n  model: {model}\n  layout: {{tensor: 4}}\n"
        f"  workload: {{batch_size: 4, input_tokens: 64, output_tokens: 8}}\n{rest}"
        f"  engine: {{kind: roofline}}\n{grid}"
    )


def test_it_is_stable_over_versions() -> None:
    """A change here disowns every result."""
    assert identity(skeleton("mixtral-8x7b", ffn_dim=1792)) == "8f99d4b8abc7a6b5"


def test_a_changed_folder_is_another_trial_and_a_moved_one_is_not(tmp_path: Path) -> None:
    first = identity(skeleton(write(tmp_path / "a")))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert identity(skeleton(tmp_path / "b")) == first
    assert identity(skeleton(write(tmp_path / "b", num_hidden_layers=8))) != first
    assert identity(skeleton(write(tmp_path / "b"))) == first


def test_a_relative_name_means_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for place, layers in (("x", 2), ("y", 2), ("z", 8)):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "model", num_hidden_layers=layers)
        monkeypatch.chdir(tmp_path / place)
        found[place] = identity(skeleton("model"))
        assert found[place] == identity(skeleton(tmp_path / place / "model"))
    assert found["x"] == found["y"] != found["z"]


def test_a_replaced_text_or_tokenizer_is_another_trial(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("one two")
    model = Model(name=str(write(tmp_path / "a")))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    trial = Trial(model=model, workload=Workload(dataset=str(text)))
    first, random = identity(trial), identity(Trial(model=model))
    text.write_text("one, two")
    assert identity(trial) != first
    text.write_text("one two")
    copied = shutil.copy(text, tmp_path / "u.txt")
    assert identity(replace(trial, workload=Workload(dataset=str(copied)))) == first
    (tmp_path / "a" / "tokenizer.json").write_text("[]")
    assert identity(trial) != first
    assert identity(Trial(model=model)) == random, "random ids need no tokenizer"
    assert set(Identities().digests(trial)) == {"model_digest", "dataset_digest"}


def test_a_replaced_draft_is_another_trial(tmp_path: Path) -> None:
    draft = write(tmp_path / "d", num_hidden_layers=1)
    engine = EngineSettings(speculative=Speculative(model=str(draft)))
    trial = Trial(model=Model(name="mixtral-8x7b", weights="dummy"), engine=engine)
    first, digests = identity(trial), Identities().digests(trial)
    assert digests["draft_digest"] != digests["model_digest"]
    shutil.copytree(draft, tmp_path / "e")
    moved = replace(engine, speculative=Speculative(model=str(tmp_path / "e")))
    assert identity(replace(trial, engine=moved)) == first
    write(draft, num_hidden_layers=2)
    assert identity(trial) != first
    assert Identities().digests(trial)["model_digest"] == digests["model_digest"]


def test_a_hubs_branch_that_moves_is_another_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    trial = Trial(model=Model(name="org/tiny"))
    unknown = Identities()
    by_name = unknown.trial_id(trial)
    assert list(unknown.unknown) == ["org/tiny"] and unknown.digests(trial) == {}
    kept = tmp_path / "models--org--tiny"
    (kept / "refs").mkdir(parents=True)
    found = []
    for commit in ("a" * 40, "b" * 40):
        (kept / "snapshots" / commit).mkdir(parents=True)
        write(kept / "snapshots" / commit)
        (kept / "refs/main").write_text(commit)
        found.append(identity(trial))
        assert identity(Trial(model=Model(name="org/tiny", revision=commit))) == found[-1]
        assert identity(Trial(model=Model(name=str(kept / "snapshots" / commit)))) == found[-1]
    assert len({by_name, *found}) == 3
    skeletons = {identity(skeleton("org/tiny")), identity(skeleton(kept / "snapshots" / commit))}
    assert len(skeletons) == 1, "both commits have one configuration"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Trial(model=Model(name="mixtral-8x7b", top_k=2)), Trial(model=Model(name="mixtral-8x7b"))),
        (
            Trial(model=Model(name="mixtral-8x7b", num_layers=32, ffn_dim=14336, num_experts=8)),
            Trial(model=Model(name="mixtral-8x7b")),
        ),
        (
            Trial(model=Model(name="m/x"), engine=EngineSettings(args={"a": 1, "b": {"c": [2.0]}})),
            Trial(model=Model(name="m/x"), engine=EngineSettings(args={"a": 1.0, "b": {"c": [2]}})),
        ),
        (
            Trial(model=Model(name="m/x"), measure=Measure(ci_width=0.1, max_repeats=15)),
            Trial(model=Model(name="m/x"), measure=Measure(ci_width=0.1)),
        ),
        (
            Trial(model=Model(name="mixtral-8x7b", weights="dummy", prune=Prune())),
            Trial(model=Model(name="mixtral-8x7b", weights="dummy", prune=Prune(criterion="norm"))),
        ),
    ],
)
def test_what_runs_alike_is_one_trial(one: Trial, other: Trial) -> None:
    assert identity(one) == identity(other)
    assert one.named_id != other.named_id


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 1},
        {"num_experts": 4},
        {"prune": Prune(ratio=0.5)},
        {"prune": Prune(ratio=0.5, kind="intra")},
        {"scale": 0.5},
        {"dtype": "float32"},
        {"quantization": "fp8"},
        {"name": "olmoe-1b-7b"},
    ],
)
def test_what_runs_otherwise_is_not(changes: dict[str, Any]) -> None:
    trial = skeleton("mixtral-8x7b")
    assert identity(replace(trial, model=replace(trial.model, **changes))) != identity(trial)


def test_half_the_experts_pruned_is_not_a_model_with_half_as_many() -> None:
    """They are one structure, and records say different things of them."""
    assert identity(skeleton("mixtral-8x7b", prune=Prune())) != identity(
        skeleton("mixtral-8x7b", num_experts=4)
    )


@pytest.mark.parametrize(
    ("grid", "place"),
    [
        ("grid:\n  model.top_k: [null, 2, 1]\n  workload.batch_size: [1, 4]\n", "top_k[1]"),
        ("grid:\n  model.name: [mixtral-8x7b, FOLDER]\n", "model.name[1]"),
        ("grid:\n  model.name: [mixtral-8x7b, mistralai/Mixtral-8x7B-v0.1]\n", "model.name[1]"),
        ("grid:\n  engine.args.pace: [0, 0.0]\n", "engine.args.pace[1]"),
        ("cases:\n- {model.top_k: 2}\n- {model.num_experts: 8}\n", "cases[1]"),
    ],
)
def test_one_trial_at_two_points_is_refused_with_its_place(
    tmp_path: Path, grid: str, place: str
) -> None:
    from workers.moe.architecture import catalogue

    config = catalogue()["mixtral-8x7b"]["config"]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SweepError, match="two points are the same trial") as caught:
        planned(tmp_path, sweep(grid.replace("FOLDER", str(tmp_path / "m"))))
    assert place in str(caught.value) and "sweep.yaml:" in str(caught.value)


def test_ratios_that_round_to_one_shape_stay_points_of_their_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, sweep("grid:\n  model.prune.ratio: [0.25, 0.3]\n"))
    assert plan.trials == 2


def test_a_changed_model_is_read_again(tmp_path: Path) -> None:
    seen = []
    for layers in (2, 8):
        folder = write(tmp_path / "a", num_hidden_layers=layers, hidden_size=512)
        plan = planned(tmp_path, sweep("", f"{{name: {folder}, weights: dummy}}"))
        (group,) = plan.to_json()["groups"]
        assert group["structure"]["num_layers"] == layers
        seen.append((group["group_id"], group["digests"]["model_digest"]))
    assert len(set(seen)) == 2 and seen[0][0] != seen[1][0]


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "a/b\0", "missing.txt"])
def test_no_name_of_a_text_ends_a_plan(name: str) -> None:
    identities = Identities()
    trial = Trial(model=Model(name="mixtral-8x7b"), workload=Workload(dataset=name))
    assert len(identities.trial_id(trial)) == 16 and name in identities.unknown


def test_names_that_nobody_can_resolve_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    plan = planned(tmp_path, sweep("", "{name: org/tiny, weights: checkpoint}"))
    assert plan.by_name is not None and "org/tiny (it is not in the hub's cache" in plan.by_name
    assert planned(tmp_path, sweep("")).by_name is None
