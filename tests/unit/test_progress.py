"""What a display is told, on a clock of our own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from orchestrator.events import Lane, Node
from orchestrator.plan import Group, Plan, Planned
from orchestrator.progress import Tracker, makespan
from workers.contract.message import Finished, Progress, Released
from workers.contract.model import Model
from workers.contract.record import RECORDS, rows
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.hardware.roofline import predict
from workers.moe.architecture import resolve

NODE = Node(node_id="n", hostname="box", devices=2, cpu_only=True)


NOISY_TOK_S = 149.0
"""Throughput of records that something else disturbed."""


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _group(name: str, trials: int = 1) -> Group:
    model = Model(name="mixtral-8x7b", weights="dummy")
    a = resolve(model)
    assert a is not None
    workload = Workload(batch_size=1, input_tokens=8, output_tokens=8)
    planned = Planned(
        trial=Trial(model=model, workload=workload),
        trial_id="",
        axes={},
        prediction=predict(a, Trial(model=model, workload=workload), device("h200")),
    )
    return Group(group_id=name, devices=1, trials=(planned,) * trials, label=f"group {name}")


def _tracker(clock: _Clock, *groups: Group) -> Tracker:
    plan = Plan(sweep="s", profile="cpu", points=9, dropped={}, infeasible=(), groups=tuple(groups))
    return Tracker(
        plan, list(groups), {"n": NODE}, device="a cpu", resumed={"t": "oom"}, clock=clock
    )


def _finished(outcome: str, throughput: float | None = None) -> Finished:
    record = rows(RECORDS, [{"outcome": outcome, "disturbed": throughput == NOISY_TOK_S}])
    return Finished(
        trial_id="t",
        outcome=outcome,  # type: ignore[arg-type]
        record=record,
        throughput_tok_s=throughput,
    )


def test_counts_lanes_and_groups() -> None:
    clock = _Clock()
    tracker = _tracker(clock, _group("a", trials=2), _group("b"))
    lane = Lane(lane_id=0, node_id="n", devices=1)
    tracker.opened(lane)
    tracker.assigned(0, _group("a", trials=2))
    clock.now = 4.0
    tracker.heard(0, Progress(stage="warmup"))
    clock.now = 5.0
    tracker.heard(0, Progress(stage="run", detail="repeat 1", busy_s=2.0))
    tracker.heard(0, _finished("ok", 123.0))
    shown = tracker.snapshot()
    assert (shown.trials_total, shown.resumed) == (4, 1)
    assert shown.counts == {"oom": 1, "ok": 1}
    (row,) = shown.lanes
    assert (row.node, row.devices, row.label) == ("box", "2 cores", "group a")
    assert (row.stage, row.trial, row.since_s) == ("run", "repeat 1", 0.0)
    assert (row.trials_done, row.trials_total) == (1, 2)
    first, second = shown.groups
    assert (first.state, first.done, first.throughput_tok_s) == ("running", 1, 123.0)
    assert second.state == "waiting"
    assert shown.busy_share == pytest.approx(2 / 5)


def _run(tracker: Tracker, clock: _Clock, group: Group, load_s: float, passes_s: float) -> None:
    tracker.assigned(0, group)
    clock.now += load_s
    tracker.heard(0, Progress(stage="warmup"))
    clock.now += passes_s
    tracker.heard(0, _finished("ok"))
    tracker.heard(0, Released(clean=True))


def test_a_group_that_comes_back_is_not_done() -> None:
    tracker = _tracker(_Clock(), _group("a", trials=2))
    tracker.opened(Lane(lane_id=0, node_id="n", devices=1))
    tracker.assigned(0, _group("a", trials=2))
    tracker.heard(0, _finished("ok"))
    tracker.heard(0, Released(clean=False))
    tracker.assigned(0, _group("a", trials=1))
    (shown,) = tracker.snapshot().groups
    assert (shown.state, shown.done) == ("running", 1)


def test_eta_begins_with_the_prediction_and_follows_what_groups_really_took() -> None:
    clock = _Clock()
    groups = [_group(name, trials=500) for name in "abcdefgh"]
    tracker = _tracker(clock, *groups)
    tracker.opened(Lane(lane_id=0, node_id="n", devices=1))
    load, passes = groups[0].predicted_load_s, groups[0].predicted_passes_s
    assert tracker.eta_s() == pytest.approx(8 * (load + passes))
    errors = []
    for index, group in enumerate(groups[:5]):
        tracker_eta = tracker.eta_s()
        assert tracker_eta is not None
        truth = (8 - index) * (load / 2 + passes * 3)
        errors.append(abs(tracker_eta / truth - 1))
        _run(tracker, clock, group, load / 2, passes * 3)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 < errors[0]


def test_eta_counts_down_while_a_group_runs() -> None:
    clock = _Clock()
    tracker = _tracker(clock, _group("a"), _group("b"))
    tracker.opened(Lane(lane_id=0, node_id="n", devices=1))
    tracker.assigned(0, _group("a"))
    before = tracker.eta_s()
    clock.now = 10.0
    after = tracker.eta_s()
    assert before is not None and after == pytest.approx(before - 10.0)
    tracker.heard(0, Progress(stage="warmup"))  # it stands: what is left of loading is none
    left = tracker.eta_s()
    assert left is not None and after is not None and left < after


@pytest.mark.parametrize(
    ("running", "waiting", "slots", "expected"),
    [
        ([], [(3.0, 1), (2.0, 1), (1.0, 1)], 2, 3.0),
        ([(5.0, 1)], [(3.0, 1), (1.0, 1)], 2, 5.0),
        ([(5.0, 1)], [(3.0, 2)], 2, 8.0),  # a gang waits for both
        ([], [(4.0, 1)], 8, 4.0),  # not work over devices
        ([(1.0, 8)], [], 8, 1.0),
        ([], [(1.0, 1)] * 20_000, 8, 2500.0),  # too many to be laid out
    ],
)
def test_the_end_of_what_is_left(
    running: list[tuple[float, int]],
    waiting: list[tuple[float, int]],
    slots: int,
    expected: float,
) -> None:
    assert makespan(running, waiting, slots) == pytest.approx(expected)


def test_eta_counts_devices_that_no_lane_holds_yet() -> None:
    clock = _Clock()
    groups = [_group(name, trials=500) for name in "abcd"]
    node = Node(node_id="n", hostname="box", devices=2, cpu_only=False)
    plan = Plan(sweep="s", profile="cpu", points=9, dropped={}, infeasible=(), groups=tuple(groups))
    tracker = Tracker(plan, groups, {"n": node}, device="2 gpus", resumed={}, clock=clock)
    one = groups[0].predicted_s
    assert tracker.eta_s() == pytest.approx(2 * one)
    tracker.opened(Lane(lane_id=0, node_id="n", devices=1))
    tracker.assigned(0, groups[0])
    assert tracker.eta_s() == pytest.approx(2 * one)


def test_a_snapshot_takes_the_eta_of_the_last_second_less_what_has_passed() -> None:
    clock = _Clock()
    tracker = _tracker(clock, _group("a"), _group("b"))
    before = tracker.snapshot().eta_s
    clock.now = 0.5
    after = tracker.snapshot().eta_s
    assert before is not None and after == pytest.approx(before - 0.5)


def test_eta_is_null_where_nothing_is_predicted() -> None:
    unknown = replace(_group("a").trials[0], prediction=None)
    group = Group(group_id="a", devices=1, trials=(unknown,), label="a")
    assert _tracker(_Clock(), group).eta_s() is None


def test_time_held_goes_on_counting_after_a_lane_is_closed() -> None:
    clock = _Clock()
    tracker = _tracker(clock, _group("a"))
    tracker.opened(Lane(lane_id=0, node_id="n", devices=1))
    tracker.assigned(0, _group("a"))
    clock.now = 10.0
    tracker.heard(0, Progress(stage="run", busy_s=5.0))
    tracker.closed(0)
    clock.now = 100.0
    assert tracker.busy_share() == pytest.approx(0.5)


def test_infeasible_points_count_without_a_group() -> None:
    tracker = _tracker(_Clock(), _group("a"))
    tracker.ended(None, rows(RECORDS, [{"outcome": "infeasible"}]))
    assert tracker.counts == Counter({"oom": 1, "infeasible": 1})
    assert tracker.snapshot().trials_total == 3


def test_disturbed_records_are_counted_of_all_and_of_each_group() -> None:
    clock = _Clock()
    one, other = _group("one", 2), _group("other")
    tracker = _tracker(clock, one, other)
    lane = Lane(lane_id=0, devices=1, node_id="n")
    tracker.opened(lane)
    tracker.assigned(0, one)
    tracker.heard(0, _finished("ok", NOISY_TOK_S))
    tracker.heard(0, _finished("ok", 1167.0))
    found = tracker.snapshot()
    assert (tracker.disturbed, found.disturbed) == (1, 1)
    assert [view.disturbed for view in found.groups] == [1, 0]


def test_a_reason_is_told_once_per_group_and_counted_every_time() -> None:
    a, b = _group("a", 3), _group("b")
    plan = Plan(sweep="s", profile="cpu", points=9, dropped={}, infeasible=(), groups=(a, b))
    tracker = Tracker(
        plan,
        [a, b],
        {"n": NODE},
        device="a cpu",
        resumed={},
        hide=lambda text: text.replace("hunter2", "***"),
    )

    def end(group_id: str | None, outcome: str, reason: str | None) -> None:
        row = {"outcome": outcome, "outcome_reason": reason, "log": f"logs/{group_id}.log"}
        tracker.ended(group_id, rows(RECORDS, [row]))

    end("a", "oom", "tried to allocate 12 bytes")
    end("a", "oom", "tried to allocate 345 bytes")  # the same but for a number
    end("a", "crashed", "key hunter2 is refused")
    end("b", "ok", None)
    end("b", "oom", "tried to allocate 12 bytes")
    end(None, "infeasible", None)
    assert [one.line for one in tracker.snapshot().whys] == [
        "group a: oom: tried to allocate 12 bytes",
        "group a: crashed: key *** is refused",
        "group b: oom: tried to allocate 12 bytes",
        "infeasible: no reason is recorded",
    ]
    crashed, oom, infeasible = tracker.reasons.all()
    assert (crashed.outcome, crashed.text, crashed.trials) == (
        "crashed",
        "key *** is refused",
        1,
    ), "what went wrong comes first"
    assert (oom.trials, oom.log) == (3, "logs/a.log")
    assert infeasible.trials == 1


def test_lanes_measure_for_no_longer_than_they_are_held() -> None:
    clock = _Clock()
    tracker = _tracker(clock, _group("a"))
    tracker.opened(Lane(lane_id=0, node_id="n", devices=1))
    tracker.assigned(0, _group("a"))
    clock.now = 2.0
    tracker.heard(0, Progress(stage="run", busy_s=109.0))
    assert tracker.busy_share() == 1.0
