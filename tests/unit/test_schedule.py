"""Scheduling decisions, without a cluster: as examples, and as properties of any history."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.plan import Group, Planned
from orchestrator.schedule import (
    RETRIES,
    Assign,
    Blame,
    Close,
    Command,
    GroupEnded,
    LaneLost,
    Node,
    Open,
    Schedule,
    TrialEnded,
    Unplaceable,
)
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload


def _group(name: str, devices: int = 1, trials: int = 1) -> Group:
    return Group(
        group_id=name,
        devices=devices,
        label=name,
        trials=tuple(
            Planned(
                trial=Trial(model=Model(name=name), workload=Workload(batch_size=i + 1)),
                trial_id=f"{name}{i}",
                axes={},
            )
            for i in range(trials)
        ),
    )


def _node(name: str, devices: int = 8, *, cpu_only: bool = False) -> Node:
    return Node(node_id=name, hostname=name, devices=devices, cpu_only=cpu_only)


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


def test_a_process_that_left_the_device_dirty_is_replaced() -> None:
    state = Schedule.of([_group("a"), _group("b")], [_node("n", 2, cpu_only=True)])
    state.start()
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    commands = state.on(GroupEnded(lane_id=0, clean=False))
    assert commands[0] == Close(lane_id=0)
    assert _assigned(commands) == [(1, "b")]


def test_lanes_fill_the_fullest_node_first() -> None:
    groups = [_group("a", 4), _group("b", 2), _group("c", 8), _group("d", 1)]
    state = Schedule.of(groups, [_node("n"), _node("m")])
    assert _opened(state.start()) == [("n", 4), ("n", 2), ("m", 8), ("n", 1)]


def test_devices_held_by_an_idle_process_of_another_size_are_freed() -> None:
    state = Schedule.of([_group("a", 4), _group("b", 4), _group("c", 8)], [_node("n")])
    assert _assigned(state.start()) == [(0, "a"), (1, "b")]
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    assert state.on(GroupEnded(lane_id=0, clean=True)) == []
    state.on(TrialEnded(lane_id=1, trial_id="b0"))
    commands = state.on(GroupEnded(lane_id=1, clean=True))
    assert commands[:2] == [Close(lane_id=0), Close(lane_id=1)]
    assert _opened(commands) == [("n", 8)] and _assigned(commands) == [(2, "c")]


def test_a_layout_larger_than_a_node_takes_several() -> None:
    state = Schedule.of([_group("a", 16), _group("b", 8)], [_node("n"), _node("m")])
    assert _opened(state.start()) == [(None, 16)]
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    commands = state.on(GroupEnded(lane_id=0, clean=True))
    assert _opened(commands) == [("n", 8)]


def test_what_can_never_be_placed_is_refused_at_once() -> None:
    with pytest.raises(Unplaceable, match="needs 32 devices, but the cluster has 16"):
        Schedule.of([_group("a", 32)], [_node("n"), _node("m")])
    with pytest.raises(Unplaceable, match="needs 4 devices, but the cluster has 2"):
        Schedule.of([_group("a", 4)], [_node("n", 2, cpu_only=True), _node("m", 2, cpu_only=True)])


def test_a_death_ends_the_trial_in_hand_and_spares_the_rest() -> None:
    state = Schedule.of([_group("a", trials=3)], [_node("n")])
    state.start()
    state.on(TrialEnded(lane_id=0, trial_id="a0"))
    commands = state.on(LaneLost(lane_id=0, trial_id="a1", retry=False))
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


@st.composite
def _clusters(draw: st.DrawFn) -> tuple[list[Group], list[Node]]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
    nodes = [_node(f"n{i}", size) for i, size in enumerate(sizes)]
    wanted = st.sampled_from([one for one in (1, 2, 4, 8, 16) if one <= sum(sizes)])
    shapes = draw(st.lists(st.tuples(wanted, st.integers(1, 3)), min_size=1, max_size=8))
    return [_group(f"g{i}", d, t) for i, (d, t) in enumerate(shapes)], nodes


@settings(max_examples=200, deadline=None)
@given(_clusters(), st.randoms(use_true_random=False))
def test_any_history_ends_every_trial_once_and_never_oversubscribes(
    cluster: tuple[list[Group], list[Node]], chance: object
) -> None:
    groups, nodes = cluster
    state = Schedule.of(groups, nodes)
    ended: list[str] = []
    open_lanes: dict[int, tuple[str | None, int]] = {}
    work: dict[int, list[str]] = {}

    def carry_out(commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Open):
                open_lanes[command.lane.lane_id] = (command.lane.node_id, command.lane.devices)
            elif isinstance(command, Close):
                del open_lanes[command.lane_id]
                work.pop(command.lane_id, None)
            elif isinstance(command, Assign):
                assert command.lane_id in open_lanes
                assert not work.get(command.lane_id)
                work[command.lane_id] = [t.trial_id for t in command.group.trials]
            else:
                ended.extend(t.trial_id for t in command.group.trials)
        spanning = [d for node, d in open_lanes.values() if node is None]
        assert not spanning or len(open_lanes) == 1
        for node in nodes:
            held = sum(d for where, d in open_lanes.values() if where == node.node_id)
            assert held <= node.devices
        assert all(0 <= free <= state.nodes[name].devices for name, free in state.free.items())

    carry_out(state.start())
    for _ in range(1000):
        if state.finished:
            break
        lane = chance.choice(sorted(work))  # type: ignore[attr-defined]
        roll = chance.random()  # type: ignore[attr-defined]
        left = work[lane]
        if roll < 0.15:
            trial = chance.choice([None, *left])  # type: ignore[attr-defined]
            retry = chance.random() < 0.5  # type: ignore[attr-defined]
            work.pop(lane)
            carry_out(state.on(LaneLost(lane_id=lane, trial_id=trial, retry=retry)))
        elif left:
            trial = left.pop(0)
            ended.append(trial)
            carry_out(state.on(TrialEnded(lane_id=lane, trial_id=trial)))
        else:
            work.pop(lane)
            carry_out(state.on(GroupEnded(lane_id=lane, clean=roll < 0.8)))
    assert state.finished
    assert sorted(ended) == sorted(t.trial_id for g in groups for t in g.trials)
    assert not open_lanes


def test_a_group_without_the_given_trials_is_none() -> None:
    group = _group("a", trials=2)
    assert group.only(["a1"]) == replace(group, trials=group.trials[1:])
    assert group.only([]) is None
