"""How far a run is, and when it will be done.

The roofline knows the shape of the remaining work but not the machine's overheads, so its
seconds are scaled by what finished groups really took. The share of the lanes' time that
went into passes is kept beside it: it tells how much of a night is measuring and how much
is loading.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.display.base import GroupView, LaneView, Snapshot
from orchestrator.plan import Group, Plan
from orchestrator.schedule import Lane, Node
from workers.contract.message import Finished, Message, Progress
from workers.contract.outcome import Outcome

LAST_OOM = 5
"""Out-of-memory trials that the display keeps in sight."""


@dataclass(slots=True)
class _Lane:
    lane: Lane
    opened_at: float
    group_id: str | None = None
    stage: str = "idle"
    detail: str = ""
    since: float = 0.0


@dataclass(slots=True)
class _Group:
    group: Group
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    throughput: float | None = None
    started_at: float | None = None
    took_s: float | None = None


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._nodes, self._device = plan, nodes, device
        self._clock = clock
        self._began = clock()
        self._resumed = len(resumed)
        self._total = len(resumed) + sum(len(group.trials) for group in groups)
        self._groups = {group.group_id: _Group(group) for group in groups}
        self._lanes: dict[int, _Lane] = {}
        self._busy_s = self._held_s = 0.0
        self._oom: deque[str] = deque(maxlen=LAST_OOM)
        self.counts: Counter[Outcome] = Counter(resumed.values())
        """Terminal records by outcome, resumed ones included."""

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
        lane.group_id, lane.stage, lane.since = group.group_id, "load", self._clock()
        state = self._groups[group.group_id]
        if state.started_at is None:
            state.started_at = self._clock()

    def heard(self, lane_id: int, message: Message) -> None:
        """A lane's process said something."""
        lane = self._lanes[lane_id]
        if isinstance(message, Progress):
            self._busy_s += message.busy_s
            if message.stage != lane.stage:
                lane.since = self._clock()
            lane.stage, lane.detail = message.stage, message.detail
        elif isinstance(message, Finished):
            self.ended(lane.group_id, message.outcome, message.throughput_tok_s)
        else:
            lane.stage, lane.group_id, lane.since = "idle", None, self._clock()

    def ended(
        self, group_id: str | None, outcome: Outcome, throughput: float | None = None
    ) -> None:
        """A trial has its terminal record."""
        self.counts[outcome] += 1
        if group_id is None:
            self._total += 1  # infeasible points are in no group
            return
        state = self._groups[group_id]
        state.outcomes[outcome] += 1
        state.throughput = throughput or state.throughput
        if outcome == "oom":
            self._oom.append(state.group.label)
        if sum(state.outcomes.values()) == len(state.group.trials):
            assert state.started_at is not None
            state.took_s = self._clock() - state.started_at

    def eta_s(self) -> float | None:
        """Seconds until the last group is done; null while nothing is known."""
        done = [one for one in self._groups.values() if one.took_s is not None]
        left = [one for one in self._groups.values() if one.took_s is None]
        if not left:
            return 0.0
        predicted = sum(one.group.predicted_s for one in done)
        if not predicted:
            return None
        factor = sum(one.took_s or 0.0 for one in done) / predicted
        work = 0.0
        for one in left:
            spent = self._clock() - one.started_at if one.started_at is not None else 0.0
            work += max(0.0, one.group.predicted_s * factor - spent)
        return work / max(1, len(self._lanes))

    def busy_share(self) -> float | None:
        """Time in passes over time in which lanes were held."""
        held = self._held_s + sum(self._clock() - one.opened_at for one in self._lanes.values())
        return self._busy_s / held if held else None

    def snapshot(self) -> Snapshot:
        """The state as a display shows it."""
        return Snapshot(
            sweep=self._plan.sweep,
            profile=self._plan.profile,
            device=self._device,
            elapsed_s=self._clock() - self._began,
            eta_s=self.eta_s(),
            trials_total=self._total,
            resumed=self._resumed,
            counts=dict(self.counts),
            lanes=tuple(self._lane_view(one) for one in self._lanes.values()),
            groups=tuple(self._group_view(one) for one in self._groups.values()),
            last_oom=tuple(self._oom),
            busy_share=self.busy_share(),
        )

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
        waiting = one.started_at is None
        return GroupView(
            group_id=one.group.group_id,
            label=one.group.label,
            devices=one.group.devices,
            trials=len(one.group.trials),
            done=done,
            outcomes=dict(one.outcomes),
            throughput_tok_s=one.throughput,
            state="waiting" if waiting else "running" if one.took_s is None else "done",
        )
