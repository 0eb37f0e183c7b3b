"""Which group runs where, and what happens to the trials of one that dies.

A pure state machine: `Schedule.on(event)` answers with commands and touches nothing else,
so every decision can be tested without a cluster and replayed from the log of events. The
pool carries the commands out and reports back.

A lane is a warm process on some devices of one node (or, for a layout larger than any
node, over several). Groups are taken in the plan's order; one that does not fit now lets
shorter ones pass. A lane takes groups of its own size; when none is left it is closed and
its devices become free for other sizes.

When a lane dies, the trial in hand is ended unless the cause lies outside it and a retry
can mend it; the rest of its group goes back to the front of the queue, because nothing is
known against it. Death while the engine is built ends the whole group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from orchestrator.plan import Group

RETRIES = 3
"""Executions of a trial whose lane was lost through no fault of the trial's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine of the cluster."""

    node_id: str
    hostname: str
    devices: int
    """GPUs, or CPU cores where there are none."""
    cpu_only: bool
    """The machine as a whole is the device: one engine at a time, on all cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """Devices that one process holds."""

    lane_id: int
    node_id: str | None
    """Null: over several nodes."""
    devices: int


# --- events: what happened


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnded:
    """A terminal record of this trial is in the dataset."""

    lane_id: int
    trial_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEnded:
    """The group's engine is gone and the lane's process lives."""

    lane_id: int
    clean: bool
    """The devices are as free as before the group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneLost:
    """The lane's process died or was killed."""

    lane_id: int
    trial_id: str | None
    """Trial in hand; null while the engine was built or closed."""
    retry: bool
    """The cause lies outside the trial, and another try can end better."""


Event = TrialEnded | GroupEnded | LaneLost


# --- commands: what to do


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """Start a process with a lane's devices."""

    lane: Lane


@dataclass(frozen=True, kw_only=True, slots=True)
class Assign:
    """Give a group to a lane's process."""

    lane_id: int
    group: Group
    attempts: dict[str, int]
    """Trial → executions, this one included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Close:
    """End a lane's process."""

    lane_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """Write the terminal record of trials that ended with their lane."""

    node_id: str | None
    """Where the lane was; null: over several nodes."""
    group: Group
    attempts: dict[str, int]


Command = Open | Assign | Close | Blame


class Unplaceable(ValueError):
    """A group that needs more devices than the cluster has."""


@dataclass(slots=True)
class Schedule:
    """State of a plan in execution."""

    waiting: list[Group]
    nodes: dict[str, Node]
    free: dict[str, int] = field(default_factory=dict)
    """Node → devices that no lane holds."""
    lanes: dict[int, Lane] = field(default_factory=dict)
    running: dict[int, Group] = field(default_factory=dict)
    """Lane → what is left of the group it works on."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Trial → executions begun."""
    _lane_ids: count[int] = field(default_factory=count)

    @classmethod
    def of(cls, groups: Iterable[Group], nodes: Iterable[Node]) -> Schedule:
        """The start: everything waits, all devices are free.

        Raises:
            Unplaceable: a group can never run on these nodes.
        """
        by_id = {node.node_id: node for node in nodes}
        state = cls(
            waiting=list(groups),
            nodes=by_id,
            free={node.node_id: node.devices for node in by_id.values()},
        )
        largest = max((node.devices for node in by_id.values()), default=0)
        total = sum(node.devices for node in by_id.values() if not node.cpu_only)
        for group in state.waiting:
            if group.held > max(largest, total):
                raise Unplaceable(
                    f"group {group.label} needs {group.held} devices, but the cluster has "
                    f"{max(largest, total)} in all"
                )
        return state

    @property
    def finished(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def start(self) -> list[Command]:
        """The first commands."""
        return self._fill()

    def on(self, event: Event) -> list[Command]:
        """What to do about `event`."""
        match event:
            case TrialEnded(lane_id=lane_id, trial_id=trial_id):
                self._ended(lane_id, {trial_id})
                return []
            case GroupEnded(lane_id=lane_id, clean=clean):
                assert not self.running[lane_id].trials, "a group ended before its trials"
                del self.running[lane_id]
                commands: list[Command] = [] if clean else [self._close(lane_id)]
                return commands + self._fill()
            case LaneLost(lane_id=lane_id, trial_id=trial_id, retry=retry):
                return self._lost(lane_id, trial_id, retry=retry)

    def _lost(self, lane_id: int, trial_id: str | None, *, retry: bool) -> list[Command]:
        left = self.running.pop(lane_id, None)
        node_id = self.lanes[lane_id].node_id
        commands: list[Command] = [self._close(lane_id)]
        if left is not None and left.trials:
            every = {one.trial_id for one in left.trials}
            in_hand = {trial_id} if trial_id in every else every
            mendable = {one for one in in_hand if retry and self.attempts[one] < RETRIES}
            if blamed := left.only(in_hand - mendable):
                attempts = {one.trial_id: self.attempts[one.trial_id] for one in blamed.trials}
                commands.append(Blame(node_id=node_id, group=blamed, attempts=attempts))
            for one in left.trials:
                if one.trial_id not in in_hand:
                    self.attempts[one.trial_id] -= 1  # it had not begun
            if rest := left.only(every - (in_hand - mendable)):
                self.waiting.insert(0, rest)
        return commands + self._fill()

    def _ended(self, lane_id: int, trial_ids: set[str]) -> None:
        group = self.running[lane_id]
        kept = tuple(one for one in group.trials if one.trial_id not in trial_ids)
        self.running[lane_id] = Group(
            group_id=group.group_id, devices=group.devices, trials=kept, label=group.label
        )

    def _fill(self) -> list[Command]:
        """Gives work to every lane that can have some; closes those that cannot."""
        commands: list[Command] = []
        for group in list(self.waiting):
            lane = self._idle(group.held)
            if lane is None:
                commands += self._make_room(group.held)
                lane = self._open(group.held)
                if lane is None:
                    continue
                commands.append(Open(lane=lane))
            self.waiting.remove(group)
            self.running[lane.lane_id] = group
            for one in group.trials:
                self.attempts[one.trial_id] = self.attempts.get(one.trial_id, 0) + 1
            attempts = {one.trial_id: self.attempts[one.trial_id] for one in group.trials}
            commands.append(Assign(lane_id=lane.lane_id, group=group, attempts=attempts))
        if not self.waiting:
            commands += [self._close(lane.lane_id) for lane in self._idle_lanes()]
        return commands

    def _idle_lanes(self) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.lane_id not in self.running]

    def _idle(self, devices: int) -> Lane | None:
        return next((lane for lane in self._idle_lanes() if lane.devices == devices), None)

    def _open(self, devices: int) -> Lane | None:
        """A new lane on the fullest node that still has room, or over all nodes."""
        fitting = [
            node
            for node in self.nodes.values()
            if self.free[node.node_id] >= (node.devices if node.cpu_only else devices)
            and node.devices >= devices
        ]
        if fitting:
            node = min(fitting, key=lambda node: self.free[node.node_id])
            lane = Lane(lane_id=next(self._lane_ids), node_id=node.node_id, devices=devices)
            self.free[node.node_id] -= node.devices if node.cpu_only else devices
        elif self._spans(devices) and not self.lanes:
            lane = Lane(lane_id=next(self._lane_ids), node_id=None, devices=devices)
            self.free = dict.fromkeys(self.free, 0)
        else:
            return None
        self.lanes[lane.lane_id] = lane
        return lane

    def _spans(self, devices: int) -> bool:
        return all(node.devices < devices for node in self.nodes.values())

    def _make_room(self, devices: int) -> list[Command]:
        """Closes idle lanes where that lets a lane of `devices` open."""
        idle = self._idle_lanes()
        over_nodes = any(lane.node_id is None for lane in idle)
        if self._spans(devices) or over_nodes:
            every = len(idle) == len(self.lanes)
            return [self._close(lane.lane_id) for lane in idle] if every else []
        for node in self.nodes.values():
            here = [lane for lane in idle if lane.node_id == node.node_id]
            room = self.free[node.node_id] + sum(self._held(lane) for lane in here)
            needed = node.devices if node.cpu_only else devices
            if self.free[node.node_id] < needed <= room and node.devices >= devices:
                return [self._close(lane.lane_id) for lane in here]
        return []

    def _held(self, lane: Lane) -> int:
        assert lane.node_id is not None
        node = self.nodes[lane.node_id]
        return node.devices if node.cpu_only else lane.devices

    def _close(self, lane_id: int) -> Close:
        lane = self.lanes.pop(lane_id)
        if lane.node_id is None:
            self.free = {node.node_id: node.devices for node in self.nodes.values()}
        else:
            self.free[lane.node_id] += self._held(lane)
        return Close(lane_id=lane_id)
