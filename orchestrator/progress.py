"""How far a run is, and when it will be done.

The roofline knows the shape of the remaining work but not the machine's overheads, so its
seconds are scaled by what was really taken so far: those of building engines and those of
passes each by their own factor, for they depend on different things. What is left is then
laid out over the devices that are there, the longest group first: the last group's end is
what counts, not work over lanes. The share of the lanes' time that went into passes is kept
beside it: it tells how much of a night is measuring and how much is loading.
"""

from __future__ import annotations

import heapq
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

from orchestrator.display.base import GroupView, LaneView, Snapshot, Why
from orchestrator.events import Lane, Node
from orchestrator.plan import Group, Plan
from workers.contract.message import Finished, Message, Progress
from workers.contract.outcome import FAULTS, Outcome

PRIOR_SHARE = 0.05
"""Weight of the roofline's own seconds against what was measured, as a share of all of them:
as much as the first twentieth of the work."""
LAID_OUT = 2_000
"""Devices of all waiting groups up to which they are laid out one by one. With more, work
over devices is as near (and takes no time)."""
ETA_EVERY_S = 1.0
"""A snapshot's ETA is at most so old."""
MOST_REASONS = 1_000
"""Reasons that are kept apart, and that are told while the run lasts. With more there are others
to read: the records have them all."""
LONGEST = 500
"""Characters of a reason that are kept."""
_NUMBERS = re.compile(r"\b[0-9a-f]{12,}\b|\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why some trials did not end `ok`."""

    outcome: Outcome
    text: str
    """That of the first; the others' differ in numbers at most."""
    trials: int
    log: str | None
    """Log of the first, below the folder of the dataset; null without one."""


class Reasons:
    """Counts why trials did not end `ok`. Texts that differ in numbers only count as one.

    Args:
        hide: takes secrets out of a text.
    """

    def __init__(self, hide: Callable[[str], str] = str) -> None:
        self._hide = hide
        self._found: dict[tuple[Outcome, str], Reason] = {}
        self._of_groups: set[tuple[str | None, Outcome, str]] = set()

    def add(
        self, group_id: str | None, outcome: Outcome, text: str | None, log: str | None
    ) -> str | None:
        """Counts a trial.

        Returns:
            What is to be said of it: the reason, if it is the first of its group with that one.
        """
        text = self._hide(text or "no reason is recorded")[:LONGEST]
        alike = _NUMBERS.sub("#", text)
        key = (outcome, alike if len(self._found) < MOST_REASONS else "")
        first = self._found.get(key) or Reason(
            outcome=outcome, text=text if key[1] else "other reasons", trials=0, log=log
        )
        self._found[key] = replace(first, trials=first.trials + 1)
        told = len(self._of_groups)
        if told < MOST_REASONS:
            self._of_groups.add((group_id, outcome, alike))
        return text if len(self._of_groups) > told else None

    def all(self) -> list[Reason]:
        """Faults first, then the most frequent."""
        order = sorted(self._found.values(), key=lambda one: (-one.trials, one.outcome))
        return sorted(order, key=lambda one: one.outcome not in FAULTS)


@dataclass(slots=True)
class _Lane:
    lane: Lane
    opened_at: float
    group_id: str | None = None
    stage: str = "idle"
    detail: str = ""
    since: float = 0.0
    """When the stage began."""
    counted: float = 0.0
    """Up to when its time is in the group's sums."""


@dataclass(slots=True)
class _Group:
    group: Group
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    throughput: float | None = None
    disturbed: int = 0
    loading_s: float = 0.0
    """Building and closing its engine."""
    passing_s: float = 0.0
    """Warm-ups and repeats."""
    started: bool = False
    building: bool = True
    """Its engine does not stand yet."""
    done: bool = False


class Tracker:
    """Counts what happens and answers with snapshots for a display."""

    def __init__(
        self,
        plan: Plan,
        groups: list[Group],
        nodes: Mapping[str, Node],
        *,
        device: str,
        resumed: Mapping[str, Outcome],
        disturbed: int = 0,
        hide: Callable[[str], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._nodes, self._device = plan, nodes, device
        self._hide, self._clock = hide, clock
        self._began = clock()
        self._resumed = len(resumed)
        self._total = len(resumed) + sum(len(group.trials) for group in groups)
        self._groups = {group.group_id: _Group(group) for group in groups}
        self._lanes: dict[int, _Lane] = {}
        self._busy_s = self._held_s = 0.0
        self._eta: tuple[float, float | None] | None = None
        """When it was last worked out, and what it was."""
        self._views = {key: self._group_view(one) for key, one in self._groups.items()}
        self._changed: set[str] = set()
        """Groups whose view is out of date."""
        self._whys: tuple[Why, ...] = ()
        self.reasons = Reasons(hide)
        """Of trials that did not end `ok`."""
        self.counts: Counter[Outcome] = Counter(resumed.values())
        """Terminal records by outcome, resumed ones included."""
        self.disturbed = disturbed
        """Those of them that something else disturbed."""

    def opened(self, lane: Lane) -> None:
        """A lane got its devices."""
        self._lanes[lane.lane_id] = _Lane(lane, self._clock())

    def closed(self, lane_id: int) -> None:
        """A lane gave its devices back."""
        if lane := self._lanes.pop(lane_id, None):
            self._held_s += self._clock() - lane.opened_at

    def assigned(self, lane_id: int, group: Group) -> None:
        """A lane took a group."""
        lane = self._lanes[lane_id]
        lane.group_id, lane.stage = group.group_id, "load"
        lane.since = lane.counted = self._clock()
        state = self._groups[group.group_id]
        state.started = state.building = True
        state.done = False  # it may come back from devices that were not fit
        self._changed.add(group.group_id)

    def heard(self, lane_id: int, message: Message) -> None:
        """A lane's process said something."""
        lane = self._lanes[lane_id]
        self._count(lane)
        if isinstance(message, Progress):
            self._busy_s += message.busy_s
            if message.stage != lane.stage:
                lane.since = self._clock()
            lane.stage, lane.detail = message.stage, message.detail
            if lane.group_id and message.stage != "load":
                self._groups[lane.group_id].building = False
        elif isinstance(message, Finished):
            self.ended(lane.group_id, message.record, message.throughput_tok_s)
        else:
            if lane.group_id:
                self._groups[lane.group_id].done = True
                self._changed.add(lane.group_id)
            lane.stage, lane.group_id, lane.since = "idle", None, self._clock()

    def ended(
        self, group_id: str | None, record: pa.RecordBatch, throughput: float | None = None
    ) -> None:
        """A trial has its terminal record."""
        row = record.select(["outcome", "outcome_reason", "log", "disturbed"]).to_pylist()[0]
        outcome: Outcome = row["outcome"]
        self.counts[outcome] += 1
        disturbed = row["disturbed"] is True
        self.disturbed += disturbed
        if outcome != "ok":
            self._why(group_id, outcome, row["outcome_reason"], row["log"])
        if group_id is None:
            self._total += 1  # infeasible points are in no group
            return
        state = self._groups[group_id]
        self._changed.add(group_id)
        state.outcomes[outcome] += 1
        state.disturbed += disturbed
        state.throughput = throughput or state.throughput
        if sum(state.outcomes.values()) == len(state.group.trials):
            state.done = True

    def _why(
        self, group_id: str | None, outcome: Outcome, reason: str | None, log: str | None
    ) -> None:
        said = self.reasons.add(group_id, outcome, reason, log)
        if said is not None:
            label = self._groups[group_id].group.label if group_id is not None else ""
            self._whys = (*self._whys, Why(label=label, outcome=outcome, reason=said))

    def eta_s(self) -> float | None:
        """Seconds until the last group is done; null where nothing can be predicted."""
        for lane in self._lanes.values():
            self._count(lane)
        groups = self._groups.values()
        left = [one for one in groups if not one.done]
        if not left:
            return 0.0
        if not any(one.group.predicted_s for one in left):
            return None
        done = [one for one in groups if one.done]
        loading = _factor([(one.loading_s, one.group.predicted_load_s) for one in done], groups)
        passing = _factor(
            [(one.passing_s, one.group.predicted_passes_s) for one in done if one.passing_s],
            groups,
        )
        nodes = self._nodes.values()
        slots = sum(1 if node.cpu_only else node.devices for node in nodes)
        if not slots:
            return None
        whole = all(node.cpu_only for node in nodes)  # a group takes a machine
        on_lanes = {lane.group_id for lane in self._lanes.values()}
        running: list[tuple[float, int]] = []
        waiting: list[tuple[float, int]] = []
        for one in left:
            work = max(0.0, one.group.predicted_passes_s * passing - one.passing_s)
            if one.building:
                work += max(0.0, one.group.predicted_load_s * loading - one.loading_s)
            held = 1 if whole else min(slots, one.group.held)
            (running if one.group.group_id in on_lanes else waiting).append((work, held))
        return makespan(running, waiting, slots)

    def _count(self, lane: _Lane) -> None:
        """Adds the time since the last message to the sums of the lane's group."""
        now = self._clock()
        if lane.group_id is not None:
            state = self._groups[lane.group_id]
            if lane.stage in ("warmup", "run"):
                state.passing_s += now - lane.counted
            else:
                state.loading_s += now - lane.counted
        lane.counted = now

    def busy_share(self) -> float | None:
        """Time in passes over time in which lanes were held, at most 1."""
        held = self._held_s + sum(self._clock() - one.opened_at for one in self._lanes.values())
        return min(1.0, self._busy_s / held) if held else None

    def snapshot(self) -> Snapshot:
        """The state as a display shows it."""
        return Snapshot(
            sweep=self._plan.sweep,
            profile=self._plan.profile,
            device=self._device,
            elapsed_s=self._clock() - self._began,
            eta_s=self._recent_eta_s(),
            trials_total=self._total,
            resumed=self._resumed,
            counts=dict(self.counts),
            disturbed=self.disturbed,
            lanes=tuple(self._lane_view(one) for one in self._lanes.values()),
            groups=self._group_views(),
            whys=self._whys,
            busy_share=self.busy_share(),
        )

    def _recent_eta_s(self) -> float | None:
        now = self._clock()
        if self._eta is None or now >= self._eta[0] + ETA_EVERY_S:
            self._eta = (now, self.eta_s())
        then, left = self._eta
        return None if left is None else max(0.0, left - (now - then))

    def _group_views(self) -> tuple[GroupView, ...]:
        for group_id in self._changed:
            self._views[group_id] = self._group_view(self._groups[group_id])
        self._changed.clear()
        return tuple(self._views.values())

    def _lane_view(self, one: _Lane) -> LaneView:
        state = self._groups.get(one.group_id) if one.group_id else None
        node = self._nodes[one.lane.node_id] if one.lane.node_id else None
        if node is None:
            devices = f"{one.lane.devices} devices"
        elif node.cpu_only:
            devices = f"{node.devices} cores"
        else:
            devices = f"{one.lane.devices} gpu"
        return LaneView(
            node=node.hostname if node else "several nodes",
            devices=devices,
            group_id=one.group_id or "",
            label=state.group.label if state else "",
            stage=one.stage,
            since_s=self._clock() - one.since,
            trial=one.detail,
            trials_done=sum(state.outcomes.values()) if state else 0,
            trials_total=len(state.group.trials) if state else 0,
        )

    def _group_view(self, one: _Group) -> GroupView:
        done = sum(one.outcomes.values())
        return GroupView(
            group_id=one.group.group_id,
            label=one.group.label,
            devices=one.group.devices,
            trials=len(one.group.trials),
            done=done,
            outcomes=dict(one.outcomes),
            throughput_tok_s=one.throughput,
            disturbed=one.disturbed,
            state="done" if one.done else "running" if one.started else "waiting",
        )


def makespan(
    running: list[tuple[float, int]], waiting: list[tuple[float, int]], slots: int
) -> float:
    """Seconds until the last group ends, the longest waiting one always next.

    Args:
        running: seconds left and devices of each group that has its devices.
        waiting: seconds and devices of each group that has none.
        slots: devices in all.
    """
    longest = max((seconds for seconds, _ in (*running, *waiting)), default=0.0)
    if sum(held for _, held in waiting) > LAID_OUT:
        work = sum(seconds * held for seconds, held in (*running, *waiting))
        return max(longest, work / slots)
    taken = [seconds for seconds, held in running for _ in range(held)][:slots]
    free = [0.0] * (slots - len(taken)) + taken
    heapq.heapify(free)
    for seconds, held in sorted(waiting, reverse=True):
        begins = [heapq.heappop(free) for _ in range(held)][-1]
        for _ in range(held):
            heapq.heappush(free, begins + seconds)
    return max(longest, *free)


def _factor(seen: list[tuple[float, float]], groups: Collection[_Group]) -> float:
    """Seconds really taken over those predicted, drawn towards 1 while little was seen."""
    prior = PRIOR_SHARE * sum(one.group.predicted_s for one in groups)
    taken, predicted = (sum(column) for column in zip(*seen, strict=True)) if seen else (0.0, 0.0)
    return (taken + prior) / (predicted + prior) if predicted + prior else 1.0
