"""A structure that cannot be told ends no sweep: its trials run without predictions.

What an engine loads may be newer than what is spelled out here, so a configuration that says
something unheard-of is planned beside the known ones, and what does not follow is null with a
reason in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from orchestrator.display.preview import preview
from orchestrator.plan import Plan
from orchestrator.request import Request, prepare
from tests.hub import TINY
from workers.contract.errors import Infeasible, Unsupported
from workers.contract.job import Job, Ticket
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.roofline_engine import RooflineEngine
from workers.moe.architecture import Unread, catalogue, resolve
from workers.moe.partial import Partial, understood
from workers.recorder import failed

JUNK: tuple[Any, ...] = ([], ["a", 1], "many\nlines", None, -3, {"a": 1}, 1.5, [0, 1, 1], True)
LIST: dict[str, Any] = {**TINY, "model_type": "newest", "moe_layer_freq": [0, *[1] * 59]}
"""Of a family that nobody has heard of, whose experts are given layer by layer."""
WRAPPED: dict[str, Any] = {
    "architectures": ["WrapsForCausalLM"],
    "model_type": "wraps",
    "text_config": {**catalogue()["mixtral-8x7b"]["config"]},
}
"""A known language model in a family that is not known."""


def spoilt(config: Mapping[str, Any], turn: int) -> Iterator[dict[str, Any]]:
    """`config` with one field replaced by junk, or left out; each field once, and those of its
    language model."""
    for number, key in enumerate(config):
        value = config[key]
        if key == "quantization_config":
            continue  # how it is stored is no structure
        if isinstance(value, dict) and "config" in key:
            yield from ({**config, key: inner} for inner in spoilt(value, turn + number))
        kind = (number + turn) % (len(JUNK) + 1)
        rest = {other: config[other] for other in config if other != key}
        yield rest if kind == len(JUNK) else rest | {key: JUNK[kind]}


def plan(folder: Path, *configs: Mapping[str, Any], **changes: Any) -> Plan:
    """Of one sweep over those configurations, and a known model before them."""
    names = ["mixtral-8x7b"]
    for number, config in enumerate(configs):
        (folder / f"{number}").mkdir()
        (folder / f"{number}/config.json").write_text(json.dumps(config))
        names.append(str(folder / f"{number}"))
    sweep = {
        "name": "s",
        "base": {"model": {"weights": "dummy"}, "workload": {"output_tokens": 8}},
        "grid": {"model.name": names},
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(sweep | changes))
    return prepare(Request(sweep=folder / "s.yaml"), "h100")[1]


@pytest.mark.lengthy
def test_any_field_may_be_junk(tmp_path: Path) -> None:
    found = [
        one
        for turn, name in enumerate(sorted(catalogue()))
        for one in spoilt(catalogue()[name]["config"], turn)
    ]
    assert len(found) > 500
    made = plan(tmp_path, *found)
    assert made.trials == len(found) + 1
    trials = [one for group in made.groups for one in group.trials]
    known = next(one for one in trials if one.trial.model.name == "mixtral-8x7b")
    assert known.prediction is not None and known.unpredicted is None
    for one in trials:
        assert (one.prediction is None) is (one.unpredicted is not None)
        assert "\n" not in (one.unpredicted or "")
    assert all("\n" not in str(one.infeasible) for one in made.infeasible)
    assert 100 < sum(made.unpredicted.values()) < len(found)


def test_it_is_planned_beside_the_known(tmp_path: Path) -> None:
    """With what is unknown by its name, and nothing of it in a sum."""
    made = plan(tmp_path, LIST, WRAPPED, where=["model.ffn_dim >= 14336"])
    assert made.dropped == {"model.ffn_dim >= 14336": 0}
    said = made.to_json()
    known, first, second = sorted(said["groups"], key=lambda one: one["predicted_seconds"] is None)
    assert known["predicted_seconds"] == said["predicted_seconds"] > 0 == len(known["unpredicted"])
    assert {first["predicted_seconds"], second["predicted_memory_gib"]} == {None}
    reasons = {one["reason"]: one["trials"] for one in said["unpredicted"]}
    assert list(reasons.values()) == [1, 1]
    assert any("'newest'" in one and "moe_layer_freq is [0, 1, 1" in one for one in reasons)
    assert any("family 'wraps'" in one and "'mixtral', is)" in one for one in reasons)
    page = Console(file=StringIO(), width=400)
    page.print(preview(made))
    shown = page.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"no prediction for 1: {reason}" in shown for reason in reasons)
    assert "without the 2 trials that have no prediction" in shown


def test_its_shape_is_not_bent(tmp_path: Path) -> None:
    """Nothing says whether it would follow, so what is asked for is refused, never ignored."""
    made = plan(tmp_path, LIST, base={"model": {"weights": "dummy", "top_k": 1}})
    (refused,) = made.infeasible
    assert str(refused.infeasible).startswith("model.top_k cannot be applied, since the structure")
    assert "moe_layer_freq" in str(refused.infeasible)


def test_what_is_plain_reaches_the_record(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LIST))
    model = Model(name=str(tmp_path), weights="dummy")
    with pytest.raises(Unread, match="moe_layer_freq"):
        resolve(model)
    known = understood(LIST)
    assert isinstance(known, Partial)
    assert (known.num_layers, known.hidden_size, known.num_experts, known.top_k) == (2, 256, 4, 2)
    trial = Trial(model=model, workload=Workload(batch_size=1, input_tokens=8, output_tokens=8))
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=())
    ticket = Ticket(trial=trial, trial_id="t", predicted={"predicted_reason": "why"})
    assert ticket.predicted_pass_s is None
    row = failed(job, ticket, Infeasible("no")).to_pylist()[0]
    assert (row["num_layers"], row["num_experts"], row["top_k"]) == (2, 4, 2)
    assert row["ffn_dim"] is row["params_total"] is row["predicted_e2e_s"] is None
    assert row["predicted_reason"] == "why"


@pytest.mark.parametrize("config", [LIST, WRAPPED])
def test_a_roofline_of_it_is_unsupported(config: Mapping[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = Workload(batch_size=1, input_tokens=8, output_tokens=8)
    trial = Trial(model=Model(name=str(tmp_path), weights="dummy"), workload=workload)
    with pytest.raises(Unsupported, match=f"'{config['model_type']}' is not spelled out"):
        RooflineEngine(trial, [workload], Site(scratch=tmp_path, device="h100"))
