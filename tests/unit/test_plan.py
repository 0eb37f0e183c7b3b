"""Groups, their order, their predictions and the points that cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SweepError
from orchestrator.grid import expand
from orchestrator.plan import Plan, build, own_dimensions
from orchestrator.sweep import load
from workers.contract.engine import EngineSettings
from workers.contract.fingerprint import Fingerprints, fingerprint
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.identity import Identities

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


EAGER = {"base": BASE["base"] | {"engine": {"eager": True}}}


def test_an_eager_engine_measures_every_top_k(tmp_path: Path) -> None:
    plan = _plan(tmp_path, **EAGER, grid={"workload.batch_size": [2, 1], "model.top_k": [4, 1]})
    (group,) = plan.groups
    measured = [(one.trial.model.top_k, one.trial.workload.batch_size) for one in group.trials]
    assert measured == [(1, 2), (1, 1), (4, 2), (4, 1)]
    assert group.label == "mixtral-8x7b"
    loads = {one.prediction.load_s for one in group.trials if one.prediction}
    assert group.predicted_load_s == pytest.approx(loads.pop() + 5.0)  # its close, once
    assert plan.to_json()["groups"][0]["trials"] == 4


def test_a_model_s_own_top_k_stands_among_those_asked_for(tmp_path: Path) -> None:
    plan = _plan(tmp_path, **EAGER, grid={"model.top_k": [3, None, 1]})
    (group,) = plan.groups
    assert [one.trial.model.top_k for one in group.trials] == [1, None, 3]


def test_what_is_built_into_an_engine_sets_groups_apart(tmp_path: Path) -> None:
    plan = _plan(tmp_path, **EAGER, grid={"model.top_k": [1, 2], "model.ffn_dim": [1792, 3584]})
    assert [group.label for group in plan.groups] == ["ffn_dim 3584", "ffn_dim 1792"]
    assert len({group.group_id for group in plan.groups}) == 2
    mixed = _plan(tmp_path, grid={"engine.eager": [False, True], "model.top_k": [1, 2]})
    assert sorted(len(group.trials) for group in mixed.groups) == [1, 1, 2]
    labels = {group.label for group in mixed.groups}
    assert labels == {"eager False · top_k 1", "eager False · top_k 2", "eager True"}


def test_a_group_keeps_its_identity_without_some_of_its_trials(tmp_path: Path) -> None:
    (whole,) = _plan(tmp_path, **EAGER, grid={"model.top_k": [1, 2]}).groups
    (part,) = _plan(tmp_path, **EAGER, grid={"model.top_k": [2]}).groups
    assert part.group_id == whole.group_id
    assert part.label == "top_k 2"


def test_what_does_not_fit_goes_last_and_the_least_demanding_first(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"model.num_experts": [64, 8, 128, 16, 48]})
    assert [group.label for group in plan.groups] == [
        "num_experts 16",
        "num_experts 8",
        "num_experts 48",
        "num_experts 64",
        "num_experts 128",
    ]
    assert [group.predicted_oom for group in plan.groups] == [0, 0, 1, 1, 1]


def test_a_group_that_fits_in_part_is_started_by_its_length(tmp_path: Path) -> None:
    grid = {"model.num_layers": [1, 2], "workload.batch_size": [1, 64]}
    long = BASE["base"] | {"workload": {"input_tokens": 32_000}}
    small = _plan(tmp_path, "cpu", base=long, grid=grid).groups[-1].predicted_memory_gib
    tight = long | {"engine": {"memory_limit_gib": small}}
    plan = _plan(tmp_path, "cpu", base=tight, grid=grid)
    assert [(group.label, group.predicted_oom) for group in plan.groups] == [
        ("num_layers 1", 0),
        ("num_layers 2", 1),
    ]
    assert plan.groups[0].predicted_s > plan.groups[1].predicted_s > 0


_ARGS = st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers(), max_size=2)
_TRIALS = st.builds(
    Trial,
    model=st.builds(
        Model,
        name=st.sampled_from(["a", 'é"b']),
        weights=st.just("dummy"),
        ffn_dim=st.sampled_from([None, 1, 2]),
        scale=st.sampled_from([1, 1.0, 0.5]),
        prune=st.sampled_from([None, Prune(), Prune(ratio=0.25)]),
    ),
    layout=st.builds(Layout, tensor=st.sampled_from([1, True, 2])),
    workload=st.builds(Workload, temperature=st.sampled_from([0, 0.0, -0.0, 1, 1.0])),
    engine=st.builds(EngineSettings, args=_ARGS, memory_limit_gib=st.sampled_from([None, 1, 1.0])),
    measure=st.builds(Measure, accuracy=st.sampled_from([(), ("x", "y")])),
)


@pytest.mark.lengthy
@given(st.lists(_TRIALS, max_size=6))
def test_identities_made_of_shared_parts_are_those_of_the_whole(trials: list[Trial]) -> None:
    fast = Fingerprints()
    for one in trials * 2:
        assert fast.of(one) == fingerprint(one) == one.named_id
        assert fast.of([one.model, one.layout, one.engine]) == one.engine_key
        crossed = Trial(model=one.model, workload=trials[0].workload, engine=trials[-1].engine)
        assert fast.of(crossed) == crossed.named_id


def test_identities_of_plain_data_too() -> None:
    fast = Fingerprints()
    for value in (1, 1.0, True, "1", None, [1, [2.5]], {"b": 1, "a": [None]}, (), Layout):
        try:
            expected = fingerprint(value)
        except TypeError:
            with pytest.raises(TypeError):
                fast.of(value)
        else:
            assert fast.of(value) == expected


def test_planned_ids_are_those_of_the_trials(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid={"model.top_k": [1, 9], "layout.tensor": [1, 2]})
    every = [*plan.infeasible, *(one for group in plan.groups for one in group.trials)]
    assert len({one.trial_id for one in every}) == 4
    assert all(one.trial_id == Identities().trial_id(one.trial) for one in every)


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
        "tensor 3 does not divide 32 attention heads (32 / 3 = 10.67)",
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


def test_a_hub_model_that_is_not_here_is_planned_without_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
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
