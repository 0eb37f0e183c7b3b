"""A model by hub id is planned, predicted and listed as its folder would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from analysis.catalogue_commands import models
from orchestrator.errors import SweepError
from orchestrator.needs import refuse
from orchestrator.plan import Plan
from orchestrator.request import Request, planned_here, prepare
from tests.hub import OTHER, TINY, add
from workers.contract.model import Model
from workers.moe.architecture import configuration, resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two revisions of unlike structure, and one of a model of the catalogue."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    add(tmp_path / "hub", f"{tmp_path.name}/tiny", "1" * 40, {"config.json": TINY})
    add(tmp_path / "hub", f"{tmp_path.name}/tiny", "2" * 40, {"config.json": OTHER}, refs=("v2",))
    return tmp_path / "hub"


def plan(folder: Path, model: dict[str, Any], **sweep: Any) -> Plan:
    sweep = {"name": "s", "base": {"model": model, "workload": {"output_tokens": 8}}, **sweep}
    (folder / "s.yaml").write_text(yaml.safe_dump(sweep))
    return prepare(Request(sweep=folder / "s.yaml"), "cpu")[1]


def test_the_revision_decides(cache: Path, tmp_path: Path) -> None:
    name = f"{tmp_path.name}/tiny"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text(json.dumps(dict(OTHER)))
    cases = [
        {"model.name": name},
        {"model.name": name, "model.revision": "v2"},
        {"model.name": name, "model.revision": "2" * 40, "model.top_k": 1},
    ]
    made = plan(tmp_path, {"name": name, "weights": "dummy"}, cases=cases)
    assert made.unpredicted == {} and len(made.groups) == 3
    same = plan(tmp_path, {"name": str(tmp_path / "folder"), "weights": "dummy"})
    found = {
        (one.trial.model.name, one.trial.model.revision): one.prediction
        for group in (*made.groups, *same.groups)
        for one in group.trials
        if one.prediction is not None
    }
    first, second = found[name, None], found[name, "v2"]
    assert second == found[str(tmp_path / "folder"), None]
    assert second.weights_gib > first.weights_gib
    own = {"name": name, "revision": "v2", "weights": "dummy"}
    asked = [{"model.num_experts": None}, {"model.num_experts": 4}]
    assert plan(tmp_path, own, cases=asked).trials == 2, "4 are another revision's own number"
    with pytest.raises(SweepError, match="two points are the same trial"):
        plan(tmp_path, own, cases=[*asked, {"model.num_experts": 8}])
    bent = resolve(Model(name=name, revision="2" * 40, weights="dummy", top_k=1))
    assert bent is not None and (bent.num_layers, bent.num_experts, bent.top_k) == (3, 8, 1)
    whole = resolve(Model(name=name))
    assert whole is not None and (whole.num_layers, whole.num_experts) == (2, 4)


def test_a_revision_of_a_catalogue_model_may_be_another(cache: Path) -> None:
    hub_id = "mistralai/Mixtral-8x7B-v0.1"
    add(cache, hub_id, "4" * 40, {"config.json": OTHER})
    for name in ("mixtral-8x7b", hub_id):
        assert (configuration(name) or {})["num_hidden_layers"] == 32
        assert configuration(name, "4" * 40) == OTHER
        assert (configuration(name, "v7") or {})["num_hidden_layers"] == 32


@pytest.mark.parametrize(
    ("model", "engine", "said"),
    [
        ({"name": "made/none"}, {}, "base.model.name: made/none is not in the hub cache"),
        (
            {"name": "{}/tiny", "revision": "v3"},
            {},
            "tiny, revision v3, is not in the hub cache {}, which has of it main, v2, 111",
        ),
        (
            {"name": "{}/tiny"},
            {"speculative": {"model": "made/draft", "tokens": 2}},
            "engine.speculative.model: made/draft is not in the hub cache",
        ),
    ],
)
def test_offline_a_model_that_is_not_there_ends_it_before_it_starts(
    model: dict[str, str], engine: dict[str, Any], said: str, cache: Path, tmp_path: Path
) -> None:
    model = {key: value.format(tmp_path.name) for key, value in model.items()}
    made = plan(tmp_path, model, base={"model": model, "engine": engine})
    with pytest.raises(SweepError) as caught:
        refuse(made.absent)
    text = str(caught.value)
    assert said.format(cache) in text and "\n" not in text
    assert "'hf download " in text and "HF_HUB_OFFLINE is set" in text

    elsewhere = Request(sweep=tmp_path / "s.yaml", profile="h100", address="10.0.0.1:6379")
    planned, said_of = planned_here(elsewhere)
    assert planned.trials == 1, "another cluster's nodes may have it"
    assert any(said.format(cache) in one and "need not be the one" in one for one in said_of)


def test_online_it_is_planned_without_a_prediction(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    names = ["made/none", "mixtral-8x7b"]
    made = plan(
        tmp_path,
        {"weights": "dummy"},
        grid={"model.name": names},
        where=["model.top_k <= model.num_experts"],
    )
    assert made.trials == 2
    ((reason, count),) = made.unpredicted.items()
    assert count == 1 and reason.startswith("made/none is not in the hub cache")
    assert made.predicted_s > 0


def test_a_draft_by_hub_id_has_a_vocabulary(cache: Path, tmp_path: Path) -> None:
    add(cache, "made/draft", "5" * 40, {"config.json": TINY | {"vocab_size": 1024}})
    model = {"name": f"{tmp_path.name}/tiny"}
    draft = {"speculative": {"model": "made/draft", "tokens": 2}}
    (refused,) = plan(tmp_path, model, base={"model": model, "engine": draft}).infeasible
    assert "1,024 tokens in its configuration, not 2,048" in str(refused.infeasible)


def test_models_lists_what_is_known_of_each(cache: Path, tmp_path: Path) -> None:
    name = f"{tmp_path.name}/tiny"
    (tmp_path / "new").mkdir()
    new = TINY | {"model_type": "newest", "num_experts_per_tok": "two"}
    (tmp_path / "new/config.json").write_text(json.dumps(dict(new)))
    asked = [name, str(tmp_path / "new"), "qwen3-0.6b"]
    done = CliRunner().invoke(models, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    tiny, newest, dense = json.loads(done.stdout)
    assert tiny["exact"] and tiny["params_total"] == 3_017_984 and tiny["note"] is None
    assert dense["exact"] and dense["note"] is None
    assert (newest["num_layers"], newest["num_experts"]) == (2, 4)
    assert newest["exact"] is False and newest["family"] == "newest"
    unknown = ("params_total", "params_active", "top_k", "expert_params", "kv_bytes_per_token")
    assert all(newest[key] is None for key in unknown)
    assert "'newest' is not spelled out" in newest["note"] and "'two'" in newest["note"]
    assert newest["note"] in done.stderr and done.stderr.count("\n") == 1

    done = CliRunner().invoke(models, [*asked, "made/none"])
    assert done.exit_code != 0 and all(one in done.stdout for one in (name, "qwen3-0.6b"))
    assert "made/none is not in the hub cache" in str(done.exception or "") + done.output
