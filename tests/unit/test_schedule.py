"""Scheduling decisions, without a cluster: as examples, and as properties of any history."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.events import (
    Abandon,
    Assign,
    Blame,
    Check,
    Checked,
    Close,
    Command,
    Event,
    GroupEnded,
    Inspect,
    Inspected,
    Lane,
    LaneLost,
    Need,
    Node,
    NodeJoined,
    NodeLost,
    Open,
    Overdue,
    Request,
    Skip,
    TrialEnded,
    Withhold,
    from_json,
    to_json,
)
from orchestrator.plan import Group, Planned
from orchestrator.schedule import RETRIES, Exhausted, Schedule, Unplaceable, replay
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.hardware.roofline import Prediction, Wave, predict
from workers.moe.architecture import resolve


def _group(
    name: str,
    devices: int = 1,
    trials: int = 1,
    *,
    s: float = 0.0,
    device: str | None = None,
) -> Group:
    """A group that is predicted to take `s` seconds."""
    return Group(
        group_id=name,
        devices=devices,
        label=name,
        trials=tuple(
            Planned(
                trial=Trial(
                    model=Model(name=name),
                    layout=Layout(device=device),
                    workload=Workload(batch_size=i + 1),
                ),
                trial_id=f"{name}{i}",
                axes={},
                prediction=replace(
                    PREDICTION, load_s=s, close_s=0.0, e2e_s=0.0, wave=AT_ONCE, last=AT_ONCE
                ),
            )
            for i in range(trials)
        ),
    )


def _batches(name: str, batches: tuple[int, ...]) -> Group:
    """One engine of a known model for several batches: `a4` is the trial of batch 4."""
    model = Model(name="mixtral-8x7b", weights="dummy")
    return Group(
        group_id=name,
        devices=1,
        label=name,
        trials=tuple(
            Planned(
                trial=Trial(model=model, workload=Workload(batch_size=batch)),
                trial_id=f"{name}{batch}",
                axes={},
                prediction=replace(
                    PREDICTION, load_s=0.0, close_s=0.0, e2e_s=0.0, wave=AT_ONCE, last=AT_ONCE
                ),
            )
            for batch in batches
        ),
    )


def _prediction() -> Prediction:
    model = Model(name="mixtral-8x7b", weights="dummy")
    architecture = resolve(model)
    assert architecture is not None
    prediction = predict(architecture, Trial(model=model), device("h100"))
    assert prediction is not None
    return replace(prediction, oom=None)


PREDICTION = _prediction()
AT_ONCE = Wave(requests=1, passes=1, prefill_s=0.0, step_s=None, steps=0)
"""Passes that take no time."""


def _taking(load_s: float) -> Prediction:
    """A prediction in which a load takes so long and nothing else takes any time."""
    return replace(PREDICTION, load_s=load_s, close_s=0.0, e2e_s=0.0, wave=AT_ONCE, last=AT_ONCE)


def _node(
    name: str, devices: int = 8, *, cpu_only: bool = False, device_class: str | None = None
) -> Node:
    return Node(
        node_id=name,
        hostname=name,
        devices=devices,
        cpu_only=cpu_only,
        device_class=device_class,
    )


def _skips(commands: list[Command]) -> list[Skip]:
    return [one for one in commands if isinstance(one, Skip)]


def _assigned(commands: list[Command]) -> list[tuple[int, str]]:
    return [(c.lane_id, c.group.group_id) for c in commands if isinstance(c, Assign)]


def _opened(commands: list[Command]) -> list[tuple[str | None, int]]:
    return [(c.lane.node_id, c.lane.devices) for c in commands if isinstance(c, Open)]


def test_a_cpu_machine_runs_one_engine_at_a_time_and_keeps_its_process() -> None:
    state = Schedule.of([_group("a"), _group("b")], [_node("n", 2, cpu_only=True)])
    first = state.start()
    assert _opened(first) == [("n", 1)] and _assigned(first) == [(0, "a")]
    assert state.on(TrialEnded(lane_id=0, trial_id="a0")) == []
    second = state.on(GroupEnded(lane_id=0, clean=True))
    assert _opened(second) == [] and _assigned(second) == [(0, "b")]
    state.on(TrialEnded(lane_id=0, trial_id="b0"))
    assert state.on(GroupEnded(lane_id=0, clean=True)) == [Close(lane_id=0)]
    assert state.finished


def test_what_is_left_of_a_group_on_devices_that_are_not_clean_runs_elsewhere() -> None:
    state = Schedule.of([_group("a", trials=3)], [_node("n", 1), _node("m", 1)])
    state.start()
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    first, *rest = state.on(GroupEnded(lane_id=0, clean=False))
    assert first == Inspect(lane_id=0)
    (again,) = [one for one in rest if isinstance(one, Assign)]
    assert again.lane_id != 0
    assert again.attempts == {"a1": 1, "a2": 1}, "they had not begun"


def test_devices_that_are_left_dirty_are_inspected_before_anything_runs_there() -> None:
    state = Schedule.of([_group("a"), _group("b")], [_node("n", 2, cpu_only=True)])
    state.start()
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    assert state.on(GroupEnded(lane_id=0, clean=False)) == [Inspect(lane_id=0)]
    assert state.free == {"n": 0}
    commands = state.on(Inspected(lane_id=0, sound=True))
    assert commands[0] == Close(lane_id=0)
    assert _assigned(commands) == [(1, "b")]
    assert state.on(Inspected(lane_id=0, sound=True)) == []  # told twice


def test_devices_that_stay_dirty_are_withheld_and_their_node_counts_as_smaller() -> None:
    groups = [_group("a", 4, s=9.0), _group("b", 2, s=8.0), _group("c", 8, s=1.0)]
    state = Schedule.of(groups, [_node("n")])
    assert _assigned(state.start()) == [(0, "a"), (1, "b")]
    lost = state.on(LaneLost(lane_id=1, trial_id="b0", retry=False, devices=("4", "5")))
    assert [type(one) for one in lost] == [Blame, Inspect]
    (withheld,) = state.on(Inspected(lane_id=1, sound=False))
    assert isinstance(withheld, Withhold) and withheld.lane.devices == 2
    assert state.nodes["n"].devices == 6 and state.free == {"n": 2}
    assert state.stranded == (Need(8, None, 1),)  # no node of 8 is left
    assert not state.stuck  # others still run
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    assert state.on(GroupEnded(lane_id=0, clean=False)) == [Inspect(lane_id=0)]
    state.on(Inspected(lane_id=0, sound=False))
    assert state.free == {"n": 2}
    assert state.stuck
    (gone,) = state.on(Overdue())
    assert isinstance(gone, Abandon) and "needs 8 devices, but the cluster has 2" in gone.reason
    assert state.finished


def test_a_node_goes_with_the_last_of_its_devices() -> None:
    state = Schedule.of([_group("a"), _group("b", 16)], [_node("n", 1), _node("m"), _node("o")])
    assert _opened(state.start()) == [(None, 16), ("n", 1)]
    for lane_id in (0, 1):
        state.on(LaneLost(lane_id=lane_id, trial_id=None, retry=False))
        state.on(Inspected(lane_id=lane_id, sound=False))
    assert state.nodes == {} and state.free == {} and state.finished
    assert state.on(NodeLost(node_id="m")) == []


def test_a_device_that_fails_group_after_group_is_tried_with_what_ran_elsewhere() -> None:
    """Three different engines die on GPU 1, while GPU 0 goes on."""
    groups = [_group(f"g{i}-", s=float(9 - i)) for i in range(8)]
    for sound in (True, False):
        state = Schedule.of(groups, [_node("n", 2)])
        assert _assigned(state.start()) == [(0, "g0-"), (1, "g1-")]
        state.on(TrialEnded(lane_id=0, trial_id="g0-0"))
        state.on(GroupEnded(lane_id=0, clean=True, devices=("0",)))
        for name in ("g1-0", "g3-0"):
            lost = LaneLost(lane_id=1, trial_id=name, retry=False, lives=True, devices=("1",))
            assert not [one for one in state.on(lost) if isinstance(one, Inspect)]
        state.on(TrialEnded(lane_id=1, trial_id="g4-0", failed=True))
        tried = state.on(GroupEnded(lane_id=1, clean=True, devices=("1",)))
        assert tried == [Inspect(lane_id=1, group=groups[0])]
        after = state.on(Inspected(lane_id=1, sound=sound))
        if sound:  # the groups are to blame: the count begins again
            assert after[0] == Close(lane_id=1) and _assigned(after) == [(2, "g5-")]
            lost = LaneLost(lane_id=2, trial_id="g5-0", retry=False, lives=True, devices=("1",))
            assert not [one for one in state.on(lost) if isinstance(one, Inspect)]
        else:
            assert [type(one) for one in after] == [Withhold]
            assert state.nodes["n"].devices == 1


def test_a_look_at_what_a_dead_host_left_absolves_no_device() -> None:
    """Hosts that die are inspected each time; only a trial that runs there clears the device."""
    groups = [_group(f"g{i}-", s=float(9 - i)) for i in range(8)]
    state = Schedule.of(groups, [_node("n", 2)])
    state.start()
    state.on(TrialEnded(lane_id=0, trial_id="g0-0"))
    state.on(GroupEnded(lane_id=0, clean=True, devices=("0",)))
    lane_id, name = 1, "g1-0"
    for failures in (1, 2, 3):
        lost = LaneLost(lane_id=lane_id, trial_id=name, retry=False, devices=("1",))
        (asked,) = [one for one in state.on(lost) if isinstance(one, Inspect)]
        assert (asked.group is not None) == (failures == 3)
        if failures < 3:
            ((lane_id, group_id),) = _assigned(state.on(Inspected(lane_id=lane_id, sound=True)))
            name = f"{group_id}0"


def test_neither_one_engine_nor_a_lone_device_raises_a_doubt() -> None:
    state = Schedule.of([_group("a", trials=5), _group("b")], [_node("n", 2)])
    state.start()
    state.on(TrialEnded(lane_id=1, trial_id="b0"))
    state.on(GroupEnded(lane_id=1, clean=True, devices=("1",)))
    for i in range(4):  # one engine that dies at each of its trials
        lost = LaneLost(lane_id=0, trial_id=f"a{i}", retry=False, lives=True, devices=("0",))
        assert not [one for one in state.on(lost) if isinstance(one, Inspect)]
    alone = Schedule.of([_group(f"g{i}-") for i in range(6)], [_node("n", 2, cpu_only=True)])
    alone.start()
    for i in range(6):
        lost = LaneLost(lane_id=0, trial_id=f"g{i}-0", retry=False, lives=True)
        assert not [one for one in alone.on(lost) if isinstance(one, Inspect)]
    assert alone.finished


def test_wide_groups_go_first_and_narrow_ones_to_the_fullest_node() -> None:
    groups = [_group("a", 4), _group("b", 2), _group("c", 8), _group("d", 1)]
    state = Schedule.of(groups, [_node("n"), _node("m")])
    assert _opened(state.start()) == [("n", 8), ("m", 4), ("m", 2), ("m", 1)]


def test_a_group_that_could_decide_the_end_goes_before_wider_ones() -> None:
    groups = [_group("long", 1, s=100.0), *(_group(f"w{i}", 8, s=10.0) for i in range(9))]
    state = Schedule.of(groups, [_node("n"), _node("m")])
    assert _assigned(state.start()) == [(0, "long"), (1, "w0")]


def test_of_one_size_the_longest_prediction_goes_first() -> None:
    groups = [_group("a", 8, s=1.0), _group("b", 8, s=3.0), _group("c", 8, s=2.0)]
    state = Schedule.of(groups, [_node("n")])
    assert _assigned(state.start()) == [(0, "b")]
    state.on(TrialEnded(lane_id=0, trial_id="b0", at=3.0))
    assert _assigned(state.on(GroupEnded(lane_id=0, clean=True, at=3.0))) == [(0, "c")]


def test_a_process_is_kept_only_where_a_group_of_its_size_follows_at_once() -> None:
    state = Schedule.of([_group("a", 4), _group("b", 4), _group("c", 8)], [_node("n")])
    assert _assigned(state.start()) == [(0, "c")]
    state.on(TrialEnded(lane_id=0, trial_id="c0"))
    commands = state.on(GroupEnded(lane_id=0, clean=True))
    assert commands[0] == Close(lane_id=0)
    assert _assigned(commands) == [(1, "a"), (2, "b")]
    state.on(TrialEnded(lane_id=1, trial_id="a0"))
    assert state.on(GroupEnded(lane_id=1, clean=True)) == [Close(lane_id=1)]


def test_a_gang_reserves_a_node_and_only_what_ends_in_time_may_use_it() -> None:
    groups = [
        _group("old", 4, s=100.0),
        _group("gang", 8, s=60.0),
        _group("late", 4, s=90.0),
        _group("early", 4, s=20.0),
    ]
    state = Schedule.of(groups, [_node("n")])
    assert _assigned(state.start()) == [(0, "old"), (1, "late")]  # all could decide the end
    state.on(TrialEnded(lane_id=1, trial_id="late0", at=30.0))
    # The gang waits for "old", until 100 by prediction: 20 s fit into the rest of the node.
    assert _assigned(state.on(GroupEnded(lane_id=1, clean=True, at=30.0))) == [(1, "early")]
    state.on(TrialEnded(lane_id=1, trial_id="early0", at=99.0))
    assert state.on(GroupEnded(lane_id=1, clean=True, at=99.0)) == [Close(lane_id=1)]
    state.on(TrialEnded(lane_id=0, trial_id="old0", at=110.0))
    assert _assigned(state.on(GroupEnded(lane_id=0, clean=True, at=110.0))) == [(2, "gang")]


def test_narrow_groups_do_not_starve_a_gang() -> None:
    """Every node is full of narrow groups that end one after another; the gang waits for one."""
    narrow = [_group(f"a{i}", 1, s=100.0 + i) for i in range(64)]
    state = Schedule.of([*narrow, _group("gang", 8, s=10.0)], [_node("n"), _node("m")])
    lanes = dict(_assigned(state.start()))
    now, before = 100.0, 0
    while "gang" not in lanes.values():
        lane, name = next(iter(lanes.items()))
        now += 1.0
        state.on(TrialEnded(lane_id=lane, trial_id=f"{name}0", at=now))
        del lanes[lane]
        lanes |= dict(_assigned(state.on(GroupEnded(lane_id=lane, clean=True, at=now))))
        before += 1
    assert before <= 16  # one node is drained while the other goes on


def test_layouts_over_several_nodes_run_side_by_side_where_there_is_room() -> None:
    nodes = [_node(f"n{i}") for i in range(5)]
    groups = [_group("a", 16), _group("b", 12), _group("c", 8), _group("d", 16)]
    state = Schedule.of(groups, nodes)
    lanes = [c.lane for c in state.start() if isinstance(c, Open)]
    assert [lane.node_id for lane in lanes] == [None, None, "n4"]
    assert lanes[0].parts == (("n0", 8), ("n1", 8))
    assert lanes[1].devices == 16 and lanes[1].parts == (("n2", 8), ("n3", 8))
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    commands = state.on(GroupEnded(lane_id=0, clean=True))
    (lane,) = [c.lane for c in commands if isinstance(c, Open)]
    assert commands[0] == Close(lane_id=0) and lane.parts == (("n0", 8), ("n1", 4))
    assert state.free["n1"] == 0  # whole nodes


def test_what_can_never_be_placed_is_refused_at_once() -> None:
    with pytest.raises(Unplaceable, match="needs 32 devices, but the cluster has 16"):
        Schedule.of([_group("a", 32)], [_node("n"), _node("m")])
    with pytest.raises(Unplaceable, match="needs 4 devices, but the cluster has 2"):
        Schedule.of([_group("a", 4)], [_node("n", 2, cpu_only=True), _node("m", 2, cpu_only=True)])
    nodes = [_node("n", device_class="h100"), _node("m", 4, device_class="l4"), _node("o")]
    with pytest.raises(Unplaceable, match=r"8 devices of class l4, but the cluster has 4 .*h100"):
        Schedule.of([_group("a", 8, device="l4")], nodes)
    with pytest.raises(Unplaceable, match="1 devices of class b200, but the cluster has 0"):
        Schedule.of([_group("a", device="b200")], nodes)


def test_a_group_runs_on_the_class_that_its_trials_ask_for() -> None:
    nodes = [_node("n", 8, device_class="h100"), _node("m", 8, device_class="l4"), _node("o")]
    groups = [
        _group("a", 4, device="l4"),
        _group("b", 4, device="h100-sxm"),  # another name of h100
        _group("c", 8, device="h100"),
        _group("d", 4),
        _group("e", 8),
    ]
    state = Schedule.of(groups, nodes)
    commands = state.start()
    lanes = {c.lane.lane_id: c.lane.node_id for c in commands if isinstance(c, Open)}
    where = {name: lanes[lane] for lane, name in _assigned(commands)}
    assert where == {"c": "n", "e": "o", "a": "m", "d": "m"}


def test_a_lost_node_leaves_with_its_lanes_and_a_new_one_is_used() -> None:
    state = Schedule.of([_group("a", 8, trials=2), _group("b", 8)], [_node("n"), _node("m")])
    assert _assigned(state.start()) == [(0, "a"), (1, "b")]
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    assert state.on(NodeLost(node_id="n", trials=("a1",))) == [Close(lane_id=0)]
    assert state.nodes.keys() == {"m"} and [one.group_id for one in state.waiting] == ["a"]
    assert state.on(LaneLost(lane_id=0, trial_id="a1", retry=True)) == []  # told twice
    commands = state.on(NodeJoined(node=_node("o")))
    assert _opened(commands) == [("o", 8)]
    (again,) = [c for c in commands if isinstance(c, Assign)]
    assert again.attempts == {"a1": 2}


def test_nodes_are_asked_for_and_not_for_ever() -> None:
    groups = [_group("a", 8, trials=2), _group("b", 16), _group("c", 2)]
    state = Schedule.of(groups, [_node("n", 4)], autoscaling=True)
    first = state.start()
    assert _assigned(first) == [(0, "c")]
    wanted = (Need(16, None, 1), Need(8, None, 1), Need(2, None, 1))
    assert first[-1] == Request(needs=wanted)
    assert set(state.stranded) == set(wanted[:2])
    joined = state.on(NodeJoined(node=_node("m"), at=5.0))
    assert _assigned(joined) == [(1, "a")]
    assert list(state.stranded) == [wanted[0]]
    given_up = state.on(Overdue(at=900.0))
    (gone,) = [c for c in given_up if isinstance(c, Abandon)]
    assert gone.group.group_id == "b" and "needs 16 devices" in gone.reason
    assert given_up[-1] == Request(needs=wanted[1:])
    state.on(TrialEnded(lane_id=0, trial_id="c0", at=901.0))
    state.on(GroupEnded(lane_id=0, clean=True, at=901.0))
    for trial in ("a0", "a1"):
        state.on(TrialEnded(lane_id=1, trial_id=trial, at=902.0))
    assert state.on(GroupEnded(lane_id=1, clean=True, at=903.0))[-1] == Request(needs=())
    assert state.finished


def test_what_ran_out_of_memory_takes_larger_trials_with_it() -> None:
    groups = [_batches("a", (4,)), _batches("b", (2, 8)), _batches("c", (16,))]
    state = Schedule.of(groups, [_node("n", 1)])
    assert _assigned(state.start()) == [(0, "a")]
    skipped = state.on(TrialEnded(lane_id=0, trial_id="a4", exhausted=True, stage="run"))
    assert [(c.witness, [t.trial_id for t in c.group.trials]) for c in _skips(skipped)] == [
        ("a4", ["b8"]),
        ("a4", ["c16"]),
    ]
    (second,) = [c for c in state.on(GroupEnded(lane_id=0, clean=True)) if isinstance(c, Assign)]
    assert second.attempts == {"b2": 1}
    state.on(TrialEnded(lane_id=0, trial_id="b2"))
    state.on(GroupEnded(lane_id=0, clean=True))
    assert state.finished


def test_a_witness_of_an_earlier_run_counts_and_skipping_can_be_turned_off() -> None:
    earlier = _batches("k", (4,)).trials
    known = Exhausted(one=earlier[0], stage="run", together=earlier)
    groups = [_batches("b", (2, 8))]
    state = Schedule.of(groups, [_node("n", 1)], known=[known])
    first = state.start()
    assert [c.witness for c in _skips(first)] == ["k4"]
    assert [c.attempts for c in first if isinstance(c, Assign)] == [{"b2": 1}]
    state = Schedule.of(groups, [_node("n", 1)], known=[known], skip=False)
    assert not _skips(state.start())


def test_a_witness_on_one_class_says_nothing_of_another() -> None:
    nodes = [_node("n", 1, device_class="l4"), _node("m", 1, device_class="h100")]
    groups = [_batches("a", (4,)), _batches("b", (4,)), _batches("c", (8,))]
    state = Schedule.of(groups, nodes)
    state.start()
    assert not _skips(state.on(TrialEnded(lane_id=0, trial_id="a4", exhausted=True)))
    skipped = state.on(TrialEnded(lane_id=1, trial_id="b4", exhausted=True))
    assert [t.trial_id for c in _skips(skipped) for t in c.group.trials] == ["c8"]


def test_a_death_ends_the_trial_in_hand_and_spares_the_rest() -> None:
    state = Schedule.of([_group("a", trials=3)], [_node("n")])
    state.start()
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    commands = state.on(LaneLost(lane_id=0, trial_id="a1", retry=False))
    commands += state.on(Inspected(lane_id=0, sound=True))
    blamed = [c for c in commands if isinstance(c, Blame)]
    assert [t.trial_id for t in blamed[0].group.trials] == ["a1"]
    assert blamed[0].node_id == "n"
    (again,) = [c for c in commands if isinstance(c, Assign)]
    assert [t.trial_id for t in again.group.trials] == ["a2"]
    assert again.attempts == {"a2": 1}


def test_a_death_while_the_engine_is_built_ends_the_group() -> None:
    state = Schedule.of([_group("a", trials=2)], [_node("n")])
    state.start()
    commands = state.on(LaneLost(lane_id=0, trial_id=None, retry=False))
    (blamed,) = [c for c in commands if isinstance(c, Blame)]
    assert len(blamed.group.trials) == 2
    assert state.finished


def test_a_lost_node_is_no_fault_of_the_trial_but_not_for_ever() -> None:
    state = Schedule.of([_group("a")], [_node("n")])
    state.start()
    for lane in range(RETRIES - 1):
        commands = state.on(LaneLost(lane_id=lane, trial_id="a0", retry=True))
        assert not [c for c in commands if isinstance(c, Blame)]
        assert _assigned(commands) == [(lane + 1, "a")]
    last = state.on(LaneLost(lane_id=RETRIES - 1, trial_id="a0", retry=True))
    (blamed,) = [c for c in last if isinstance(c, Blame)]
    assert blamed.attempts == {"a0": RETRIES}
    assert state.finished


def test_a_node_is_shared_only_where_a_check_allows_it() -> None:
    """The check takes the whole node, and as many engines of the narrowest group as fit."""
    groups = [_group("wide", 4, s=9.0), *(_group(f"g{i}-", 2, s=float(5 + i)) for i in range(5))]
    for allowed in (True, False):
        state = Schedule.of(groups, [_node("n")], check=True)
        (check,) = state.start()
        assert isinstance(check, Check)
        assert [lane.devices for lane in check.lanes] == [2, 2, 2, 2]
        assert check.group.group_id == "g0-"  # the shortest of the narrowest
        assert state.free == {"n": 0} and len(state.waiting) == 6
        assert state.ahead() == {"n": 4}
        commands = state.on(Checked(node_id="n", side_by_side=allowed))
        widths = [one.lane.devices for one in commands if isinstance(one, Open)]
        assert widths == ([4, 2, 2] if allowed else [4])
        assert state.free == {"n": 0}
        assert state.ahead() == {"n": 4 if allowed else 1}


def test_no_check_is_made_where_nothing_could_run_side_by_side() -> None:
    alone = Schedule.of([_group("a", 8), _group("b", 8)], [_node("n")], check=True)
    assert _opened(alone.start()) == [("n", 8)]
    single = Schedule.of([_group("a", 1)], [_node("n")], check=True)
    assert _opened(single.start()) == [("n", 1)] and single.free == {"n": 0}
    known = Schedule.of(
        [_group("a", 4), _group("b", 4)], [_node("n")], check=True, side_by_side={"n": False}
    )
    assert _opened(known.start()) == [("n", 4)]
    lost = Schedule.of([_group("a", 4), _group("b", 4)], [_node("n"), _node("m")], check=True)
    assert {one.node_id for one in lost.start() if isinstance(one, Check)} == {"n", "m"}
    assert lost.on(NodeLost(node_id="n")) == [] and lost.free == {"m": 0}
    assert lost.on(Checked(node_id="n", side_by_side=True)) == []  # it is gone
    assert _opened(lost.on(Checked(node_id="m", side_by_side=True))) == [("m", 4), ("m", 4)]


def test_a_lane_whose_engine_alone_died_takes_the_next_group() -> None:
    state = Schedule.of([_group("a", s=2.0), _group("b", s=1.0)], [_node("n", 1)])
    state.start()
    lost = state.on(LaneLost(lane_id=0, trial_id="a0", retry=False, lives=True))
    assert [type(one) for one in lost] == [Blame, Assign]
    assert _assigned(lost) == [(0, "b")]


@st.composite
def _clusters(draw: st.DrawFn) -> tuple[list[Group], list[Node]]:
    """Groups that can all run on the nodes, of up to two classes of device."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4))
    classes = draw(st.sampled_from([("h100",), ("h100", "l4"), ("l4", "l4", "h100")]))
    nodes = [
        _node(f"n{i}", size, device_class=classes[i % len(classes)]) for i, size in enumerate(sizes)
    ]
    room = {
        name: sum(node.devices for node in nodes if node.device_class == name)
        for name in {node.device_class for node in nodes}
    }
    asked = st.sampled_from([None, *sorted(str(name) for name in room)])
    shape = st.tuples(
        asked,
        st.sampled_from([1, 2, 3, 4, 8, 16]),
        st.integers(1, 3),
        st.sampled_from([0.0, 1.0, 5.0, 50.0]),
    )
    groups = []
    for i, (name, size, trials, s) in enumerate(draw(st.lists(shape, min_size=1, max_size=10))):
        most = max(room.values()) if name is None else room[name]
        groups.append(_group(f"g{i}-", min(size, most), trials, s=s, device=name))
    return groups, nodes


class _World:
    """Carries commands out and checks that each is possible."""

    def __init__(
        self, groups: list[Group], nodes: list[Node], *, autoscaling: bool, check: bool = False
    ) -> None:
        self.nodes = {node.node_id: node for node in nodes}
        self.asked = {t.trial_id: (t.trial.layout.device, g.held) for g in groups for t in g.trials}
        self.state = Schedule.of(groups, nodes, autoscaling=autoscaling, check=check)
        self.checking: set[str] = set()
        self.allowed: dict[str, bool] = {} if check else dict.fromkeys(self.nodes, True)
        self.ended: list[str] = []
        self.lanes: dict[int, Lane] = {}
        self.inspected: set[int] = set()
        self.work: dict[int, list[str]] = {}
        self.log: list[tuple[Event, list[Command]]] = []
        self.first = self.state.start()
        self.carry_out(self.first)

    def on(self, event: Event) -> None:
        commands = self.state.on(event)
        self.log.append((event, commands))
        self.carry_out(commands)

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Open(lane=lane):
                    self.lanes[lane.lane_id] = lane
                case Close(lane_id=lane_id):
                    del self.lanes[lane_id]
                    self.work.pop(lane_id, None)
                    self.inspected.discard(lane_id)
                case Inspect(lane_id=lane_id):
                    assert not self.work.pop(lane_id, None) and lane_id not in self.inspected
                    self.inspected.add(lane_id)
                case Withhold(lane=lane):
                    for node_id in self.on_nodes(lane.lane_id):
                        node = self.nodes[node_id]
                        left = node.devices - lane.devices if lane.node_id else 0
                        if left:
                            self.nodes[node_id] = replace(node, devices=left)
                        else:
                            del self.nodes[node_id]
                    del self.lanes[lane.lane_id]
                    self.inspected.discard(lane.lane_id)
                case Assign(lane_id=lane_id, group=group):
                    assert not self.work.get(lane_id), "two groups on one lane"
                    self.work[lane_id] = [t.trial_id for t in group.trials]
                    for trial in self.work[lane_id]:
                        asked, held = self.asked[trial]
                        assert self.lanes[lane_id].devices == held
                        for node_id in self.on_nodes(lane_id):
                            assert asked in (None, self.nodes[node_id].device_class)
                case Blame(group=group) | Abandon(group=group) | Skip(group=group):
                    self.ended += [t.trial_id for t in group.trials]
                case Check(node_id=node_id, lanes=lanes, group=group):
                    assert node_id not in self.allowed and node_id not in self.checking
                    assert 2 <= len(lanes) == self.nodes[node_id].devices // lanes[0].devices
                    assert len(group.trials) == 1 and lanes[0].devices == group.held
                    self.checking.add(node_id)
        for name, node in self.nodes.items():
            held = node.devices if name in self.checking else 0
            here = [lane_id for lane_id in self.lanes if name in self.on_nodes(lane_id)]
            if not self.allowed.get(name):
                assert len(here) <= (name not in self.checking)
                assert self.state.free[name] == (node.devices if not held and not here else 0)
                continue
            for lane_id, lane in self.lanes.items():
                if lane.node_id == name:
                    held += lane.devices
                elif name in self.on_nodes(lane_id):
                    held += node.devices  # over several nodes: whole ones
            assert held + self.state.free[name] == node.devices
        busy = set(self.work) | self.inspected
        assert set(self.lanes) == busy, "a lane without work is closed"

    def on_nodes(self, lane_id: int) -> list[str]:
        lane = self.lanes[lane_id]
        return [lane.node_id] if lane.node_id else [name for name, _ in lane.parts]


@pytest.mark.lengthy
@settings(max_examples=150, deadline=None)
@given(_clusters(), st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_any_history_ends_every_trial_once_and_never_oversubscribes(
    cluster: tuple[list[Group], list[Node]], chance: Random, autoscaling: bool, check: bool
) -> None:
    groups, nodes = cluster
    world = _World(groups, nodes, autoscaling=autoscaling, check=check)
    now, spare = 0.0, count()
    for _ in range(1000):
        if world.state.finished:
            break
        now += chance.choice([0.0, 0.5, 3.0])
        if chance.random() > 0.95:
            node = replace(chance.choice(nodes), node_id=f"new{next(spare)}")
            world.nodes[node.node_id] = node
            if not check:
                world.allowed[node.node_id] = True
            world.on(NodeJoined(node=node, at=now))
        elif chance.random() > 0.95 and world.nodes:
            name = chance.choice(sorted(world.nodes))
            here = [lane for lane in world.lanes if name in world.on_nodes(lane)]
            in_hand = [left[0] for lane in here if (left := world.work.get(lane))]
            del world.nodes[name]
            world.checking.discard(name)
            world.on(NodeLost(node_id=name, trials=tuple(in_hand[:1]), at=now))
        elif world.checking and (chance.random() > 0.7 or not world.work):
            name = chance.choice(sorted(world.checking))
            world.checking.remove(name)
            world.allowed[name] = chance.random() < 0.5
            world.on(Checked(node_id=name, side_by_side=world.allowed[name], at=now))
        elif world.inspected and (chance.random() > 0.7 or not world.work):
            lane = chance.choice(sorted(world.inspected))
            world.on(Inspected(lane_id=lane, sound=chance.random() < 0.7, at=now))
        elif not world.work:  # what waits has nowhere to run
            assert world.state.stranded
            world.on(Overdue(at=now))
        else:
            lane = chance.choice(sorted(world.work))
            left = world.work[lane]
            roll = chance.random()
            if roll > 0.85:
                trial = chance.choice([None, *left])
                retry = chance.random() < 0.5
                lives = chance.random() < 0.5
                del world.work[lane]
                world.on(LaneLost(lane_id=lane, trial_id=trial, retry=retry, lives=lives, at=now))
            elif left:
                trial = left.pop(0)
                world.ended.append(trial)
                out = roll > 0.7
                failed = roll < 0.3
                world.on(
                    TrialEnded(lane_id=lane, trial_id=trial, exhausted=out, failed=failed, at=now)
                )
            else:
                del world.work[lane]
                world.on(GroupEnded(lane_id=lane, clean=roll < 0.6, at=now))
    assert world.state.finished
    assert sorted(world.ended) == sorted(t.trial_id for g in groups for t in g.trials)
    assert set(world.lanes) == world.inspected

    log = [from_json(json.loads(json.dumps(to_json(event)))) for event, _ in world.log]
    assert log == [event for event, _ in world.log]
    again, commands = replay(groups, nodes, log, autoscaling=autoscaling, check=check)
    assert commands == [world.first, *(commands for _, commands in world.log)]
    assert again.finished


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 60)), max_size=60))
def test_a_simulated_run_is_near_the_bound(shapes: list[tuple[int, int]]) -> None:
    """Where predictions are right, no history is worse than the bound, a longest group, and
    the draining of nodes for gangs."""
    groups = [_group(f"g{i}-", size, s=float(s)) for i, (size, s) in enumerate(shapes)]
    groups += [_group(f"w{i}-", 8, s=30.0) for i in range(3)]
    world = _World(groups, [_node("n"), _node("m")], autoscaling=False)
    length = {f"g{i}-": float(s) for i, (_, s) in enumerate(shapes)}
    began: dict[int, float] = {}
    now = 0.0

    def due(lane: int) -> float:
        return began[lane] + length.get(world.work[lane][0].partition("-")[0] + "-", 30.0)

    while not world.state.finished:
        for lane in world.work:
            began.setdefault(lane, now)
        lane = min(world.work, key=due)
        now = due(lane)
        trial = world.work[lane].pop()
        world.ended.append(trial)
        world.on(TrialEnded(lane_id=lane, trial_id=trial, at=now))
        del world.work[lane], began[lane]
        world.on(GroupEnded(lane_id=lane, clean=True, at=now))
    work = sum(size * s for size, s in shapes) + 3 * 8 * 30.0
    assert now <= 2 * work / 16 + 2 * max([30, *(s for _, s in shapes)])


def test_a_group_without_the_given_trials_is_none() -> None:
    group = _group("a", trials=2)
    assert group.only(["a1"]) == replace(group, trials=group.trials[1:])
    assert group.only([]) is None
