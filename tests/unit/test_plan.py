"""Groups, their order, their predictions and the points that cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import SweepError
from orchestrator.grid import expand
from orchestrator.plan import Plan, build, own_dimensions
from orchestrator.sweep import load
from workers.contract.model import Model
from workers.hardware.device import device

BASE: dict[str, Any] = {
    "name": "p",
    "base": {"model": {"name": "mixtral-8x7b", "weights": "dummy"}, "layout": {"tensor": 4}},
}


def _plan(folder: Path, profile: str = "h100", **sections: Any) -> Plan:
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump(BASE | sections, sort_keys=False))
    sweep = load(path, (), profile)
    return build(sweep, expand(sweep, own_dimensions), device(profile))


def test_workloads_share_an_engine_and_shapes_do_not(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"model.top_k": [1, 2], "workload.batch_size": [1, 2, 4]})
    assert [len(group.trials) for group in plan.groups] == [3, 3]
    assert {group.label for group in plan.groups} == {"top_k 1", "top_k 2"}
    assert {group.devices for group in plan.groups} == {4}
    assert plan.trials == plan.points == 6


def test_the_longest_group_comes_first(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"model.ffn_dim": [1792, 14336, 7168]})
    assert [group.label for group in plan.groups] == [
        "ffn_dim 14336",
        "ffn_dim 7168",
        "ffn_dim 1792",
    ]
    seconds = [group.predicted_s for group in plan.groups]
    assert seconds == sorted(seconds, reverse=True)
    assert plan.predicted_s == pytest.approx(sum(seconds))
    assert plan.device_hours == pytest.approx(4 * sum(seconds) / 3600)


def test_the_paper_s_grid_and_the_points_that_cannot_fit_four_h100(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    sweep = load(root / "sweeps" / "hparam.yaml", (), "h100")
    plan = build(sweep, expand(sweep, own_dimensions), device("h100"))
    assert (plan.points, plan.trials, len(plan.groups)) == (64, 64, 64)
    too_large = {
        (one.axes["model.ffn_dim"], one.axes["model.num_experts"])
        for group in plan.groups
        for one in group.trials
        if group.predicted_oom
    }
    assert too_large == {(14336, 64), (14336, 32), (7168, 64)}


def test_the_scaled_grid_has_its_boundary_at_the_same_points() -> None:
    root = Path(__file__).resolve().parents[2]
    sweep = load(root / "sweeps" / "hparam.yaml", (), "cpu")
    plan = build(sweep, expand(sweep, own_dimensions), device("cpu"))
    too_large = {
        (one.axes["model.ffn_dim"], one.axes["model.num_experts"])
        for group in plan.groups
        for one in group.trials
        if group.predicted_oom
    }
    assert too_large == {(14336, 64), (14336, 32), (7168, 64)}


def test_contradictions_are_infeasible_with_their_reason(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"model.top_k": [2, 9], "layout.tensor": [4, 3]})
    assert sorted(str(one.infeasible) for one in plan.infeasible) == [
        "32 (attention heads) is not divisible by the tensor degree 3",
        "top_k 9 is above the 8 experts of a layer",
        "top_k 9 is above the 8 experts of a layer",
    ]
    assert plan.trials == 4 and len(plan.groups) == 1
    assert [one["axes"] for one in plan.to_json()["infeasible"]] == [
        {"model.top_k": 2, "layout.tensor": 3},
        {"model.top_k": 9, "layout.tensor": 4},
        {"model.top_k": 9, "layout.tensor": 3},
    ]


def test_an_unknown_model_is_an_error_at_its_line(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"p\.yaml:\d+: .*unknown model 'mixtral-8x8b'"):
        _plan(tmp_path, grid={"model.name": ["mixtral-8x7b", "mixtral-8x8b"]})


def test_a_hub_model_that_is_not_here_is_planned_without_a_prediction(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"model.name": ["someone/some-moe"]})
    (group,) = plan.groups
    assert group.predicted_memory_gib is None
    assert plan.to_json()["groups"][0]["predicted_memory_gib"] is None


def test_constraints_see_the_model_s_own_shape(tmp_path: Path) -> None:
    assert own_dimensions(Model(name="mixtral-8x7b")) == {
        "ffn_dim": 14336,
        "num_experts": 8,
        "top_k": 2,
        "num_layers": 32,
        "hidden_size": 4096,
    }
    plan = _plan(
        tmp_path, grid={"model.top_k": [4, 8, 16]}, where=["model.top_k <= model.num_experts"]
    )
    assert plan.trials == 2
    assert dict(plan.dropped) == {"model.top_k <= model.num_experts": 1}


def test_a_part_of_a_group(tmp_path: Path) -> None:
    (group,) = _plan(tmp_path, grid={"workload.batch_size": [1, 2]}).groups
    part = group.only([group.trials[1].trial_id])
    assert part is not None and part.trials == group.trials[1:]
    assert part.predicted_s < group.predicted_s


def test_a_trial_may_ask_for_a_class_of_device(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"layout.device": ["a100", "h200"]})
    found = {
        one.axes["layout.device"]: one.prediction.device
        for group in plan.groups
        for one in group.trials
        if one.prediction
    }
    assert found == {"a100": "a100", "h200": "h200"}
    with pytest.raises(SweepError, match=r"p\.yaml:\d+: .*unknown device class 'h900'"):
        _plan(tmp_path, grid={"layout.device": ["h200", "h900"]})
