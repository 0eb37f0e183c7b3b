"""Which group runs where, and what happens to the trials of one that dies.

A pure state machine: `Schedule.on(event)` answers with commands and touches nothing else,
so every decision can be tested without a cluster and replayed from the log of events. The
pool carries the commands out and reports back. Time comes in with the events, in seconds
since the start; the machine has no clock.

A lane is a process on some devices of one node, or, for a layout larger than any node, on
whole nodes. A lane whose group ended takes the next group of its size if that is the best
use of its devices, else it is closed.

Which group goes first:

1. One that could decide when everything ends: twice its prediction (predictions are
   trusted within a factor of two) reaches the predicted end of all work. Longest first.
2. Else the widest, and of these the longest. While wide groups follow one another on a
   node, nothing has to be drained for them, and the narrow ones come last, where they fill
   the gaps that are left. Longest first over all sizes scatters narrow groups over every
   node at the start, and each wide group then waits for a node to run empty.

It goes to the fullest node that has room. The widest waiting gang that has no room reserves
the node (or nodes) that will be free soonest; there, only groups that are predicted to end
before that time may still start, and that time is never put off. So narrow groups fill
what a gang cannot use yet, and none of them keeps it waiting for ever.

When a lane dies, the trial in hand is ended unless the cause lies outside it and a retry
can mend it; the rest of its group waits again, because nothing is known against it. Death
while the engine is built ends the whole group. A node that is gone takes its lanes with it.

No event looks at all groups or all nodes: groups wait in sorted lists by size and class of
device, nodes stand in sets by free devices.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, NamedTuple

from orchestrator.dominance import Frontier
from orchestrator.plan import Group, Planned
from workers.contract.outcome import OomStage
from workers.hardware.device import CPU, device

RETRIES = 3
"""Executions of a trial whose lane was lost through no fault of the trial's own."""
TRUST = 2.0
"""Factor within which a prediction is trusted."""
EAGER_LOOKS = 8
LOOK_S = 5.0
"""After so many, a look through all that waits for trials to skip is taken at most this
often, in seconds. Every group is looked at again before it starts."""


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
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEnded:
    """The group's engine is gone and the lane's process lives."""

    lane_id: int
    clean: bool
    """The devices are as free as before the group."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneLost:
    """The lane's process died or was killed."""

    lane_id: int
    trial_id: str | None
    """Trial in hand; null while the engine was built or closed."""
    retry: bool
    """The cause lies outside the trial, and another try can end better."""
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


Event = TrialEnded | GroupEnded | LaneLost | NodeLost | NodeJoined | Overdue


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


Command = Open | Assign | Close | Blame | Skip | Abandon | Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Exhausted:
    """A trial that an earlier run found out of device memory."""

    one: Planned
    stage: OomStage | None
    together: tuple[Planned, ...]
    """All trials of its group."""


class Unplaceable(ValueError):
    """A group that needs devices that the cluster does not have."""


class _Kind(NamedTuple):
    """Groups that can stand in for one another on a lane."""

    devices: int
    device_class: str | None
    """Null: any."""


class _Queue:
    """Waiting groups of one kind, the longest predicted last; equals in the plan's order."""

    def __init__(self) -> None:
        self._keys: list[tuple[float, int]] = []

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def longest(self) -> tuple[float, int]:
        """Predicted seconds of the longest, and its number below zero."""
        return self._keys[-1]

    def add(self, predicted_s: float, number: int) -> None:
        insort(self._keys, (predicted_s, -number))

    def take(self, key: tuple[float, int]) -> int:
        """Removes a group by its key; its number."""
        del self._keys[bisect_right(self._keys, key) - 1]
        return -key[1]

    def within(self, limit_s: float) -> tuple[float, int] | None:
        """The longest that is predicted to take at most `limit_s`."""
        place = bisect_right(self._keys, (limit_s, 1))
        return self._keys[place - 1] if place else None

    def numbers(self) -> list[int]:
        """Every group's number, the longest first."""
        return [-number for _, number in reversed(self._keys)]


@dataclass(slots=True)
class _Machine:
    """A node and who is on it."""

    node: Node
    free: int
    ends: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Lane → predicted end, and devices that it gives back then."""
    reserved: bool = False
    soonest: float = 0.0
    """When as many devices will be free as the pool's widest waiting gang needs."""

    def frees(self, devices: int) -> float:
        """When `devices` of it will be free."""
        free = self.free
        if free >= devices:
            return 0.0
        for end, given in sorted(self.ends.values()):
            free += given
            if free >= devices:
                return end
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reservation:
    """Nodes that are kept for the next group of a kind."""

    kind: _Kind
    machines: tuple[_Machine, ...]
    until: float
    """When they were predicted to be free."""


class _Pool:
    """The nodes of one class of device."""

    def __init__(self, device_class: str | None) -> None:
        self.device_class = device_class
        self.machines: dict[str, _Machine] = {}
        self.reservation: _Reservation | None = None
        self.widest = 0
        """Devices of its largest node."""
        self.devices = 0
        self.gang_devices = 0
        """Those that a layout over several nodes can use."""
        self._by_free: dict[int, dict[str, None]] = {}
        """Free devices → nodes that are not reserved."""
        self._wanted = 0
        self._heap: list[tuple[float, str]] = []

    def join(self, node: Node) -> None:
        machine = _Machine(node, node.devices)
        self.machines[node.node_id] = machine
        self._shelve(machine)
        self._count()

    def leave(self, node_id: str) -> None:
        machine = self.machines[node_id]
        if machine.reserved:
            self.unreserve()
        self._unshelve(machine)
        del self.machines[node_id]
        self._count()

    def _count(self) -> None:
        nodes = [machine.node for machine in self.machines.values()]
        self.widest = max((node.devices for node in nodes), default=0)
        self.devices = sum(1 if node.cpu_only else node.devices for node in nodes)
        self.gang_devices = sum(node.devices for node in nodes if not node.cpu_only)
        self._wanted = 0

    def hold(self, machine: _Machine, lane_id: int, devices: int, end: float) -> None:
        """Gives devices of a node to a lane that is predicted to end at `end`."""
        machine.ends[lane_id] = (end, devices)
        self._change(machine, -devices)

    def give_back(self, machine: _Machine, lane_id: int) -> None:
        """Takes a lane's devices back."""
        _, devices = machine.ends.pop(lane_id)
        self._change(machine, devices)

    def _change(self, machine: _Machine, devices: int) -> None:
        if not machine.reserved:
            self._unshelve(machine)
        machine.free += devices
        assert 0 <= machine.free <= machine.node.devices, "a device is held twice"
        if not machine.reserved:
            self._shelve(machine)
        if self._wanted:
            self._foresee(machine)

    def _shelve(self, machine: _Machine) -> None:
        self._by_free.setdefault(machine.free, {})[machine.node.node_id] = None

    def _unshelve(self, machine: _Machine) -> None:
        self._by_free[machine.free].pop(machine.node.node_id, None)

    def fullest(self, devices: int) -> _Machine | None:
        """The node with the fewest free devices that are enough."""
        for free in range(devices, self.widest + 1):
            if shelf := self._by_free.get(free):
                return self.machines[next(iter(shelf))]
        return None

    def whole(self, devices: int, kind: _Kind) -> list[_Machine] | None:
        """Free nodes that together have `devices`, those reserved for `kind` first."""
        mine = self.reservation
        found = list(mine.machines) if mine is not None and mine.kind == kind else []
        found = [machine for machine in found if machine.free == machine.node.devices]
        room = sum(machine.node.devices for machine in found)
        for free in range(self.widest, 0, -1):
            if room >= devices:
                break
            for node_id in self._by_free.get(free, ()):
                machine = self.machines[node_id]
                if free == machine.node.devices and not machine.node.cpu_only:
                    found.append(machine)
                    room += free
                    if room >= devices:
                        break
        return found if room >= devices else None

    def reserve(self, kind: _Kind) -> None:
        """Keeps the nodes that will be free soonest for the next group of `kind`."""
        over = kind.devices > self.widest
        wanted = -1 if over else kind.devices
        if self._wanted != wanted:
            self._wanted, self._heap = wanted, []
            for machine in self.machines.values():
                self._foresee(machine)
        chosen: list[_Machine] = []
        room = 0
        while self._heap and room < kind.devices:
            soonest, node_id = heapq.heappop(self._heap)
            found = self.machines.get(node_id)
            if found is None or found.soonest != soonest or found in chosen:
                continue
            chosen.append(found)
            room += found.node.devices
        assert room >= kind.devices, "a gang waits that no node can ever hold"
        for machine in chosen:
            heapq.heappush(self._heap, (machine.soonest, machine.node.node_id))
            self._unshelve(machine)
            machine.reserved = True
        self.reservation = _Reservation(
            kind=kind,
            machines=tuple(chosen),
            until=max(machine.soonest for machine in chosen),
        )

    def _foresee(self, machine: _Machine) -> None:
        node = machine.node
        wanted = node.devices if self._wanted == -1 else self._wanted
        if node.devices < wanted or (self._wanted == -1 and node.cpu_only):
            return
        machine.soonest = machine.frees(wanted)
        heapq.heappush(self._heap, (machine.soonest, node.node_id))

    def unreserve(self) -> None:
        """Gives the reserved nodes back to everyone."""
        assert self.reservation is not None
        for machine in self.reservation.machines:
            machine.reserved = False
            self._shelve(machine)
        self.reservation = None


@dataclass(slots=True)
class _Running:
    """What a lane works on."""

    number: int
    group: Group
    left: dict[str, Planned]
    since: float
    end: float
    """Predicted."""
    predicted_s: float


class Schedule:
    """State of a plan in execution."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.lanes: dict[int, Lane] = {}
        self.attempts: dict[str, int] = {}
        """Trial → executions begun."""
        self.autoscaling = False
        self._skips = False
        self._frontiers: dict[str | None, Frontier] = {}
        """What ran out of memory, by class of device."""
        self._looks = 0
        self._looked_at = 0.0
        self._now = 0.0
        self._numbers = count()
        self._lane_ids = count()
        self._waiting: dict[int, Group] = {}
        """Groups by number, in the plan's order."""
        self._predicted: dict[int, float] = {}
        self._queues: dict[_Kind, _Queue] = {}
        self._pools: dict[str | None, _Pool] = {}
        self._homes: dict[_Kind, tuple[_Pool, ...]] = {}
        """Where each kind can run, found when it is first asked for."""
        self._running: dict[int, _Running] = {}
        self._spare: dict[int, Lane] = {}
        """Lanes without work; none is left when an event is dealt with."""
        self._requested: tuple[Need, ...] = ()
        self._asks_nodes = False
        # Sums from which the predicted end of all work follows, in devices x seconds.
        self._waiting_work = 0.0
        self._claimed: dict[str | None, float] = {}
        self._cpu_only = False
        self._ending_work = 0.0
        self._busy = 0
        self._taken_s = self._foreseen_s = 0.0

    @classmethod
    def of(
        cls,
        groups: Iterable[Group],
        nodes: Iterable[Node],
        *,
        skip: bool = True,
        known: Iterable[Exhausted] = (),
        autoscaling: bool = False,
    ) -> Schedule:
        """The start: everything waits, all devices are free.

        Args:
            groups: in the plan's order.
            nodes: those of the cluster.
            skip: whether an out-of-memory makes larger trials pointless.
            known: trials that an earlier run found out of memory, on these devices.
            autoscaling: nodes can be asked for, so nothing is unplaceable yet.

        Raises:
            Unplaceable: a group can never run on these nodes.
            UnknownDevice: a trial asks for a device that the catalogue does not hold.
        """
        state = cls()
        state.autoscaling = autoscaling
        for node in nodes:
            state._join(node)
        state._cpu_only = all(node.cpu_only for node in state.nodes.values())
        for group in groups:
            state._enqueue(next(state._numbers), group)
        state._skips = skip
        for earlier in known if skip else ():
            classes = state._classes(earlier.one)
            if len(classes) == 1:  # else nothing says on which of them it was
                frontier = state._frontiers.setdefault(classes[0], Frontier())
                frontier.add(earlier.one, earlier.stage, earlier.together)
        if not autoscaling:
            for number, kind in state._stranded():
                raise Unplaceable(state._missing(kind, state._waiting[number].label))
        return state

    @property
    def finished(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running

    @property
    def free(self) -> dict[str, int]:
        """Node → devices that no lane holds."""
        return {
            node_id: machine.free
            for pool in self._pools.values()
            for node_id, machine in pool.machines.items()
        }

    @property
    def waiting(self) -> tuple[Group, ...]:
        """Groups that are not on a lane, in the plan's order."""
        return tuple(self._waiting[number] for number in sorted(self._waiting))

    @property
    def stranded(self) -> tuple[Need, ...]:
        """What waits for nodes that are not there."""
        return tuple(
            Need(kind.devices, kind.device_class, len(queue))
            for kind, queue in self._queues.items()
            if queue and not self._home(kind)
        )

    def start(self) -> list[Command]:
        """The first commands."""
        commands: list[Command] = []
        if self._frontiers:
            commands += self._skip(list(self._waiting))
        self._asks_nodes = True
        return commands + self._fill()

    def on(self, event: Event) -> list[Command]:
        """What to do about `event`. What is said of a lane that is gone is not heard."""
        self._now = max(self._now, event.at)
        match event:
            case TrialEnded(lane_id=lane_id, trial_id=trial_id):
                if lane_id not in self._running:
                    return []
                one = self._running[lane_id].left.pop(trial_id)
                return self._learn(event, one) if event.exhausted and self._skips else []
            case GroupEnded(lane_id=lane_id, clean=clean):
                if lane_id not in self._running:
                    return []
                assert not self._running[lane_id].left, "a group ended before its trials"
                self._release(lane_id, done=True)
                commands: list[Command] = []
                if clean:
                    self._spare[lane_id] = self.lanes[lane_id]
                else:
                    commands.append(self._close(lane_id))
                return commands + self._fill()
            case LaneLost(lane_id=lane_id, trial_id=trial_id, retry=retry):
                if lane_id not in self._running:
                    return []
                in_hand = set() if trial_id is None else {trial_id}
                return self._lost(lane_id, in_hand, retry=retry) + self._fill()
            case NodeLost(node_id=node_id, trials=trials):
                return self._leave(node_id, set(trials))
            case NodeJoined(node=node):
                if node.node_id in self.nodes:
                    return []
                self._join(node)
                self._asks_nodes = True
                return self._fill()
            case Overdue():
                return self._abandon() + self._fill()

    # --- what waits

    def _kind(self, group: Group) -> _Kind:
        asked = None if group.predicts else group.trials[0].trial.layout.device
        return _Kind(group.held, asked if asked in (None, CPU) else device(asked).name)

    def _enqueue(self, number: int, group: Group) -> None:
        kind = self._kind(group)
        predicted_s = group.predicted_s
        self._waiting[number] = group
        self._predicted[number] = predicted_s
        self._queues.setdefault(kind, _Queue()).add(predicted_s, number)
        self._weigh(kind, predicted_s)

    def _dequeue(self, number: int, kind: _Kind) -> Group:
        predicted_s = self._predicted[number]
        self._queues[kind].take((predicted_s, -number))
        self._weigh(kind, -predicted_s)
        return self._waiting.pop(number)

    def _weigh(self, kind: _Kind, predicted_s: float) -> None:
        self._waiting_work += predicted_s * self._width(kind)
        claimed = self._claimed.get(kind.device_class, 0.0)
        self._claimed[kind.device_class] = claimed + predicted_s * self._width(kind)

    def _width(self, kind: _Kind) -> int:
        """Devices of a group in the sums; a CPU machine counts as one."""
        return 1 if self._cpu_only else kind.devices

    # --- what is known of memory

    def _learn(self, event: TrialEnded, one: Planned) -> list[Command]:
        """Skips what waits and cannot fit, since `one` did not."""
        lane = self.lanes[event.lane_id]
        name = self.nodes[_nodes(lane)[0]].device_class
        frontier = self._frontiers.setdefault(name, Frontier())
        news = frontier.add(one, event.stage, self._running[event.lane_id].group.trials)
        if not news or (self._looks >= EAGER_LOOKS and self._now < self._looked_at + LOOK_S):
            return []
        self._looks += 1
        self._looked_at = self._now
        return self._skip(list(self._waiting)) + self._ask()

    def _skip(self, numbers: Iterable[int]) -> list[Command]:
        """Takes the trials out of waiting groups that have a witness against them."""
        commands: list[Command] = []
        for number in numbers if self._frontiers else ():
            group = self._waiting[number]
            kind = self._kind(group)
            frontiers = self._against(kind)
            found: dict[str, list[str]] = {}
            for one in group.trials if frontiers else ():
                witnesses = [frontier.witness(one) for frontier in frontiers]
                if witnesses[0] is not None and None not in witnesses:
                    found.setdefault(witnesses[0], []).append(one.trial_id)
            if not found:
                continue
            self._dequeue(number, kind)
            gone = {trial_id for trial_ids in found.values() for trial_id in trial_ids}
            if left := group.only(one.trial_id for one in group.trials if one.trial_id not in gone):
                self._enqueue(number, left)
            for witness, trial_ids in found.items():
                skipped = group.only(trial_ids)
                assert skipped is not None
                commands.append(Skip(witness=witness, group=skipped))
        return commands

    def _against(self, kind: _Kind) -> list[Frontier]:
        """What speaks against trials of a kind: of every class on which they could run."""
        classes = [pool.device_class for pool in self._home(kind)]
        known = [self._frontiers[name] for name in classes if name in self._frontiers]
        return known if len(known) == len(classes) else []

    def _classes(self, one: Planned) -> list[str | None]:
        """Classes of device on which a trial that has run may have been."""
        asked = one.trial.layout.device
        name = asked if asked in (None, CPU) else device(asked).name
        return [name] if name is not None else list(self._pools)

    # --- where it can run

    def _join(self, node: Node) -> None:
        self.nodes[node.node_id] = node
        if node.device_class not in self._pools:
            self._pools[node.device_class] = _Pool(node.device_class)
        self._pools[node.device_class].join(node)
        self._homes.clear()

    def _leave(self, node_id: str, in_hand: set[str]) -> list[Command]:
        node = self.nodes.pop(node_id, None)
        if node is None:
            return []
        pool = self._pools[node.device_class]
        commands: list[Command] = []
        for lane_id in list(pool.machines[node_id].ends):
            begun = in_hand.intersection(self._running[lane_id].left)
            commands += self._lost(lane_id, begun, retry=True)
        pool.leave(node_id)
        if not pool.machines:
            del self._pools[node.device_class]
        self._homes.clear()
        self._asks_nodes = True
        return commands + self._fill()

    def _home(self, kind: _Kind) -> tuple[_Pool, ...]:
        """Pools whose nodes can hold a group, or can together where none does alone."""
        if kind not in self._homes:
            asked = kind.device_class
            pools = [p for name, p in self._pools.items() if asked is None or name == asked]
            homes = tuple(pool for pool in pools if pool.widest >= kind.devices)
            self._homes[kind] = homes or tuple(
                pool for pool in pools if pool.gang_devices >= kind.devices
            )
        return self._homes[kind]

    def _stranded(self) -> Iterator[tuple[int, _Kind]]:
        for kind, queue in self._queues.items():
            if queue and not self._home(kind):
                for number in queue.numbers():
                    yield number, kind

    def _missing(self, kind: _Kind, label: str) -> str:
        asked = kind.device_class
        of_class = "" if asked is None else f" of class {asked}"
        found = [p for name, p in self._pools.items() if asked is None or name == asked]
        most = max((max(pool.widest, pool.gang_devices) for pool in found), default=0)
        text = f"group {label} needs {kind.devices} devices{of_class}, but the cluster has {most}"
        others = sorted({str(name or "unknown") for name in self._pools if name != asked})
        return f"{text} (others: {', '.join(others)})" if asked and others else f"{text} in all"

    def _abandon(self) -> list[Command]:
        commands: list[Command] = []
        for number, kind in list(self._stranded()):
            group = self._dequeue(number, kind)
            attempts = {one.trial_id: self.attempts.get(one.trial_id, 0) for one in group.trials}
            reason = self._missing(kind, group.label)
            commands.append(Abandon(group=group, attempts=attempts, reason=reason))
        self._asks_nodes = True
        return commands

    def _ask(self) -> list[Command]:
        """What the autoscaler should have ready; it hears only of changes that matter."""
        if not self.autoscaling or not (self._asks_nodes or (self._requested and self.finished)):
            return []
        self._asks_nodes = False
        needs: Counter[_Kind] = Counter()
        for kind, queue in self._queues.items():
            needs[kind] += len(queue)
        for running in self._running.values():
            needs[self._kind(running.group)] += 1
        wanted = tuple(
            Need(kind.devices, kind.device_class, number)
            for kind, number in sorted(needs.items(), key=lambda one: _by_width(one[0]))
            if number
        )
        if wanted == self._requested:
            return []
        self._requested = wanted
        return [Request(needs=wanted)]

    # --- giving work

    def _fill(self) -> list[Command]:
        """Gives work to whatever can have some; closes the lanes that got none."""
        commands: list[Command] = []
        while self._waiting:
            for pool in self._pools.values():
                if pool.reservation and not self._queues[pool.reservation.kind]:
                    pool.unreserve()
            order = self._order()
            if not any(self._place(kind, commands) for kind in order):
                self._reserve(order)
                break
        commands += [self._close(lane_id) for lane_id in list(self._spare)]
        return commands + self._ask()

    def _order(self) -> list[_Kind]:
        """Kinds that wait, the one to be served first at the head."""
        scale = self._scale()
        capacity = sum(pool.devices for pool in self._pools.values())
        running = self._ending_work - self._now * self._busy
        work = max(0.0, self._waiting_work * scale + running)
        end = self._now + (work / capacity if capacity else 0.0)

        def place(kind: _Kind) -> tuple[Any, ...]:
            longest, number = self._queues[kind].longest
            decides = longest > 0 and self._now + TRUST * longest * scale >= end
            free_to_choose = kind.device_class is None
            if decides:
                return (0, -longest, free_to_choose, -number)
            return (1, -kind.devices, -longest, free_to_choose, -number)

        return sorted((kind for kind, queue in self._queues.items() if queue), key=place)

    def _scale(self) -> float:
        """Seconds really taken over those predicted."""
        known = self._taken_s > 0 and self._foreseen_s > 0
        return self._taken_s / self._foreseen_s if known else 1.0

    def _place(self, kind: _Kind, commands: list[Command]) -> bool:
        """Starts one group of a kind where there is room for it, or skips trials of it."""
        homes = self._home(kind)
        if len(homes) > 1:  # where groups with no choice leave most
            homes = tuple(sorted(homes, key=self._crowding))
        longest = self._queues[kind].longest
        for pool in homes:
            if kind.devices > pool.widest:
                if machines := pool.whole(kind.devices, kind):
                    if skipped := self._skip([-longest[1]]):
                        commands += skipped
                        return True
                    self._begin_over(pool, machines, kind, longest, commands)
                    return True
            elif machine := self._room(pool, kind):
                if skipped := self._skip([-longest[1]]):
                    commands += skipped
                    return True
                self._begin(pool, machine, kind, longest, commands)
                return True
        return any(self._backfill(pool, kind, commands) for pool in homes)

    def _crowding(self, pool: _Pool) -> tuple[float, int]:
        """How much waits that can run nowhere else."""
        if pool.device_class is None:
            return (0.0, 0)
        waiting = sum(
            len(queue)
            for kind, queue in self._queues.items()
            if kind.device_class == pool.device_class
        )
        return (self._claimed.get(pool.device_class, 0.0) / pool.devices, waiting)

    def _room(self, pool: _Pool, kind: _Kind) -> _Machine | None:
        mine = pool.reservation
        if mine is not None and mine.kind == kind:
            for machine in mine.machines:
                if machine.free >= kind.devices:
                    return machine
        best = pool.fullest(kind.devices)
        for lane in self._spare.values():
            if lane.devices != kind.devices or lane.node_id not in pool.machines:
                continue
            warm = pool.machines[lane.node_id]
            if best is None or warm.reserved:
                continue
            if warm.free == best.free or not self._wider_waits(kind.devices):
                return warm
        return best

    def _wider_waits(self, devices: int) -> bool:
        return any(queue and kind.devices > devices for kind, queue in self._queues.items())

    def _backfill(self, pool: _Pool, kind: _Kind, commands: list[Command]) -> bool:
        """Starts a group on a reserved node if it ends before its time."""
        kept = pool.reservation
        if kept is None or kept.kind == kind or kind.devices > pool.widest:
            return False
        limit = (kept.until - self._now) / self._scale()
        key = self._queues[kind].within(limit) if limit > 0 else None
        if key is None or key[0] <= 0:
            return False
        for machine in kept.machines:
            if machine.free >= kind.devices:
                if skipped := self._skip([-key[1]]):
                    commands += skipped
                else:
                    self._begin(pool, machine, kind, key, commands)
                return True
        return False

    def _reserve(self, order: list[_Kind]) -> None:
        """Keeps nodes for the widest gang that waits, where narrower groups wait too."""
        by_width = sorted(order, key=lambda kind: -kind.devices)  # stable
        kept = {pool.reservation.kind for pool in self._pools.values() if pool.reservation}
        for kind in by_width:
            if kind in kept or not self._home(kind):
                continue
            pool = min(self._home(kind), key=self._crowding)
            narrower = any(
                other.devices < kind.devices and pool in self._home(other) for other in by_width
            )
            if narrower and pool.reservation is None:
                pool.reserve(kind)
                kept.add(kind)

    def _begin(
        self,
        pool: _Pool,
        machine: _Machine,
        kind: _Kind,
        key: tuple[float, int],
        commands: list[Command],
    ) -> None:
        node = machine.node
        lane = next(
            (
                spare
                for spare in self._spare.values()
                if spare.node_id == node.node_id and spare.devices == kind.devices
            ),
            None,
        )
        if lane is not None:
            del self._spare[lane.lane_id]
        else:
            self._make_room(node.node_id, commands)
            lane = Lane(lane_id=next(self._lane_ids), node_id=node.node_id, devices=kind.devices)
            self.lanes[lane.lane_id] = lane
            commands.append(Open(lane=lane))
        self._assign(pool, [(machine, kind.devices)], lane, kind, key, commands)

    def _begin_over(
        self,
        pool: _Pool,
        machines: list[_Machine],
        kind: _Kind,
        key: tuple[float, int],
        commands: list[Command],
    ) -> None:
        names = {machine.node.node_id for machine in machines}
        lane = next(
            (
                spare
                for spare in self._spare.values()
                if spare.devices == kind.devices and {name for name, _ in spare.parts} == names
            ),
            None,
        )
        if lane is not None:
            del self._spare[lane.lane_id]
        else:
            left, parts = kind.devices, []
            for machine in machines:
                self._make_room(machine.node.node_id, commands)
                part = min(left, machine.node.devices)
                parts.append((machine.node.node_id, part))
                left -= part
            lane = Lane(
                lane_id=next(self._lane_ids),
                node_id=None,
                devices=kind.devices,
                parts=tuple(parts),
            )
            self.lanes[lane.lane_id] = lane
            commands.append(Open(lane=lane))
        held = [(machine, machine.node.devices) for machine in machines]
        self._assign(pool, held, lane, kind, key, commands)

    def _make_room(self, node_id: str, commands: list[Command]) -> None:
        """Closes the lanes without work on a node: their devices count as free already."""
        in_the_way = [one for one in self._spare.values() if node_id in _nodes(one)]
        commands += [self._close(lane.lane_id) for lane in in_the_way]

    def _assign(
        self,
        pool: _Pool,
        machines: list[tuple[_Machine, int]],
        lane: Lane,
        kind: _Kind,
        key: tuple[float, int],
        commands: list[Command],
    ) -> None:
        predicted_s, number = key[0], -key[1]
        group = self._dequeue(number, kind)
        if pool.reservation is not None and pool.reservation.kind == kind:
            pool.unreserve()
        end = self._now + predicted_s * self._scale()
        for machine, devices in machines:
            whole = machine.node.devices if machine.node.cpu_only else devices
            pool.hold(machine, lane.lane_id, whole, end)
        self._running[lane.lane_id] = _Running(
            number=number,
            group=group,
            left={one.trial_id: one for one in group.trials},
            since=self._now,
            end=end,
            predicted_s=predicted_s,
        )
        self._ending_work += end * self._width(kind)
        self._busy += self._width(kind)
        for one in group.trials:
            self.attempts[one.trial_id] = self.attempts.get(one.trial_id, 0) + 1
        attempts = {one.trial_id: self.attempts[one.trial_id] for one in group.trials}
        commands.append(Assign(lane_id=lane.lane_id, group=group, attempts=attempts))

    # --- taking it back

    def _release(self, lane_id: int, *, done: bool) -> _Running:
        """Counts a lane's devices as free; the lane itself stays."""
        running = self._running.pop(lane_id)
        lane = self.lanes[lane_id]
        kind = self._kind(running.group)
        self._ending_work -= running.end * self._width(kind)
        self._busy -= self._width(kind)
        if done:
            self._taken_s += self._now - running.since
            self._foreseen_s += running.predicted_s
        for node_id in _nodes(lane):
            if (node := self.nodes.get(node_id)) is not None:
                pool = self._pools[node.device_class]
                pool.give_back(pool.machines[node_id], lane_id)
        return running

    def _close(self, lane_id: int) -> Close:
        del self.lanes[lane_id]
        self._spare.pop(lane_id, None)
        return Close(lane_id=lane_id)

    def _lost(self, lane_id: int, begun: set[str], *, retry: bool) -> list[Command]:
        """Ends a lane that is gone. Without a trial in hand, its group was being built."""
        node_id = self.lanes[lane_id].node_id
        running = self._release(lane_id, done=False)
        commands: list[Command] = [self._close(lane_id)]
        left = running.left
        in_hand = (begun & left.keys()) or set(left)
        mendable = {one for one in in_hand if retry and self.attempts[one] < RETRIES}
        if blamed := running.group.only(in_hand - mendable):
            attempts = {one.trial_id: self.attempts[one.trial_id] for one in blamed.trials}
            commands.append(Blame(node_id=node_id, group=blamed, attempts=attempts))
        for trial_id in left.keys() - in_hand:
            self.attempts[trial_id] -= 1  # it had not begun
        if rest := running.group.only(left.keys() - (in_hand - mendable)):
            self._enqueue(running.number, rest)
        return commands


def _nodes(lane: Lane) -> tuple[str, ...]:
    return tuple(name for name, _ in lane.parts) if lane.node_id is None else (lane.node_id,)


def _by_width(kind: _Kind) -> tuple[int, str]:
    return (-kind.devices, kind.device_class or "")


def replay(
    groups: Iterable[Group],
    nodes: Iterable[Node],
    events: Iterable[Event],
    *,
    skip: bool = True,
    known: Iterable[Exhausted] = (),
    autoscaling: bool = False,
) -> tuple[Schedule, list[list[Command]]]:
    """The schedule after a history, with the commands of the start and of every event.

    Args:
        groups, nodes, skip, known, autoscaling: as given to `Schedule.of`.
        events: in the order in which they happened.
    """
    state = Schedule.of(groups, nodes, skip=skip, known=known, autoscaling=autoscaling)
    return state, [state.start(), *(state.on(event) for event in events)]


_EVENTS: Mapping[str, type[Any]] = {
    one.__name__: one for one in (TrialEnded, GroupEnded, LaneLost, NodeLost, NodeJoined, Overdue)
}


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
    if "trials" in fields:
        fields["trials"] = tuple(fields["trials"])
    made: Event = kind(**fields)
    return made


def brief(command: Command) -> str:
    """A command in one short line, for the log of events."""
    match command:
        case Open(lane=lane):
            return f"open {lane.lane_id}: {lane.devices} on {' '.join(_nodes(lane))}"
        case Assign(lane_id=lane_id, group=group):
            return f"assign {lane_id}: {group.group_id}, {len(group.trials)} trials"
        case Close(lane_id=lane_id):
            return f"close {lane_id}"
        case Blame(group=group) | Abandon(group=group):
            word = type(command).__name__.lower()
            return f"{word} {group.group_id}, {len(group.trials)} trials"
        case Skip(witness=witness, group=group):
            return f"skip {group.group_id}, {len(group.trials)} trials, by {witness}"
        case Request(needs=needs):
            return "request " + ", ".join(
                f"{need.groups} x {need.devices} {need.device_class or 'any'}" for need in needs
            )
