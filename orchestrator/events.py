"""What the schedule is told and what it answers, as plain values.

Events and commands say everything that passes between the schedule and the world, so a log
of the events is the whole history, and a test needs no cluster. Groups and records are named
by their ids in the log; `schedule.replay` gives the commands again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from orchestrator.plan import Group
from workers.contract.outcome import OomStage


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine of the cluster."""

    node_id: str
    hostname: str
    devices: int
    """GPUs, or CPU cores where there are none."""
    cpu_only: bool
    """The machine as a whole is the device: one engine at a time, on all cores."""
    device_class: str | None = None
    """Class in the device catalogue; null where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """Devices that one process holds."""

    lane_id: int
    node_id: str | None
    """Null: over several nodes."""
    devices: int
    parts: tuple[tuple[str, int], ...] = ()
    """Over several nodes: each of them with the devices that are used there. The lane
    holds the whole node."""


class Need(NamedTuple):
    """Devices that groups of one kind wait for or use."""

    devices: int
    """Of each group."""
    device_class: str | None
    groups: int


# --- events: what happened. `at`: seconds since the start, never falling.


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnded:
    """A terminal record of this trial is in the dataset."""

    lane_id: int
    trial_id: str
    exhausted: bool = False
    """It was measured to need more memory than a device has."""
    stage: OomStage | None = None
    """Where it ran out."""
    failed: bool = False
    """It crashed, or was not done in time."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEnded:
    """The group's engine is gone and the lane's process lives."""

    lane_id: int
    clean: bool
    """The devices are as free as before the group."""
    devices: tuple[str, ...] = ()
    """Names of the devices on their node; none where the node is the device."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneLost:
    """The lane's process, or the engine in it, died or was killed."""

    lane_id: int
    trial_id: str | None
    """Trial in hand; null while the engine was built or closed."""
    retry: bool
    """The cause lies outside the trial, and another try can end better."""
    lives: bool = False
    """Only the engine died: the process that hosts it can take another group."""
    devices: tuple[str, ...] = ()
    """As in `GroupEnded`."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLost:
    """A node is gone, and every process on it."""

    node_id: str
    trials: tuple[str, ...] = ()
    """Trials in hand on its lanes; those behind them had not begun."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeJoined:
    """A node can be used."""

    node: Node
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Overdue:
    """Nobody waits any longer for nodes that are not there."""

    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A node was checked for engines side by side."""

    node_id: str
    side_by_side: bool
    """They measure what each measures alone."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """The devices of a lane were looked at."""

    lane_id: int
    sound: bool
    """They are free, and work."""
    at: float = 0.0


Event = TrialEnded | GroupEnded | LaneLost | NodeLost | NodeJoined | Overdue | Checked | Inspected


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Write the terminal record of trials that a witnessed out-of-memory makes pointless."""

    witness: str
    """Trial that ran out of memory."""
    group: Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Abandon:
    """Write the terminal record of trials for which no node came in time."""

    group: Group
    attempts: dict[str, int]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Ask the autoscaler for nodes that carry all of these at once."""

    needs: tuple[Need, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Find out whether engines side by side on a node measure what each measures alone. The
    whole node is free for it."""

    node_id: str
    lanes: tuple[Lane, ...]
    """One for each engine."""
    group: Group
    """One trial, which each of them runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """Find out whether the devices of a lane are free again: nothing of its process is left."""

    lane_id: int
    group: Group | None = None
    """One trial that ran well elsewhere, to be tried there too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Withhold:
    """Keep the devices of a lane from everybody, to the end."""

    lane: Lane


Command = Open | Assign | Close | Blame | Skip | Abandon | Request | Check | Inspect | Withhold


def nodes_of(lane: Lane) -> tuple[str, ...]:
    """Nodes on which a lane holds devices."""
    return tuple(name for name, _ in lane.parts) if lane.node_id is None else (lane.node_id,)


_EVENTS: Mapping[str, type[Any]] = {
    one.__name__: one
    for one in (
        TrialEnded, GroupEnded, LaneLost, NodeLost, NodeJoined, Overdue, Checked, Inspected
    )
}  # fmt: skip


def to_json(event: Event) -> dict[str, Any]:
    """An event as plain data, for a line of the log."""
    return {"event": type(event).__name__, **asdict(event)}


def from_json(data: Mapping[str, Any]) -> Event:
    """The event that `to_json` wrote; other keys than its own are let be.

    Raises:
        KeyError: no such event.
    """
    kind = _EVENTS[data["event"]]
    fields = {name: data[name] for name in kind.__dataclass_fields__ if name in data}
    if "node" in fields:
        fields["node"] = Node(**fields["node"])
    for name in fields.keys() & {"trials", "devices"}:
        fields[name] = tuple(fields[name])
    made: Event = kind(**fields)
    return made


def brief(command: Command) -> str:
    """A command in one short line, for the log of events."""
    match command:
        case Open(lane=lane):
            return f"open {lane.lane_id}: {lane.devices} on {' '.join(nodes_of(lane))}"
        case Assign(lane_id=lane_id, group=group):
            return f"assign {lane_id}: {group.group_id}, {len(group.trials)} trials"
        case Close(lane_id=lane_id):
            return f"close {lane_id}"
        case Blame(group=group) | Abandon(group=group):
            word = type(command).__name__.lower()
            return f"{word} {group.group_id}, {len(group.trials)} trials"
        case Skip(witness=witness, group=group):
            return f"skip {group.group_id}, {len(group.trials)} trials, by {witness}"
        case Inspect(lane_id=lane_id, group=group):
            return f"inspect {lane_id}" + (f": try {group.group_id}" if group else "")
        case Withhold(lane=lane):
            return f"withhold {lane.lane_id}: {lane.devices} on {' '.join(nodes_of(lane))}"
        case Check(node_id=node_id, lanes=lanes):
            return f"check {node_id}: {len(lanes)} engines"
        case Request(needs=needs):
            return "request " + ", ".join(
                f"{need.groups} x {need.devices} {need.device_class or 'any'}" for need in needs
            )
