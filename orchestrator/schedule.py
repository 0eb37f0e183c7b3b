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

Engines side by side on one node must not change what each measures. With `check`, a node on
which groups could share is checked first (`workers.packing`), and runs one lane at a time
where neighbours are found to change something. A CPU machine is one device in any case.

When a lane dies, the trial in hand is ended unless the cause lies outside it and a retry
can mend it; the rest of its group waits again, because nothing is known against it. Death
while the engine is built ends the whole group. A node that is gone takes its lanes with it.

Devices that a lane did not leave clean, those of a process that died, and those that fail
group after group (`orchestrator.health`) are inspected before anything else runs there. What
does not pass is withheld: the node counts as smaller, and what needs it whole waits for another.

No event looks at all groups or all nodes (`orchestrator.ledger`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from orchestrator.dominance import Frontier
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
    nodes_of,
)
from orchestrator.health import Device, Health
from orchestrator.ledger import Kind, Ledger, Machine, Queue
from orchestrator.plan import Group, Planned
from workers.contract.outcome import OomStage
from workers.hardware.device import CPU, device

RETRIES = 3
"""Executions of a trial whose lane was lost through no fault of the trial's own."""
TRUST = 2.0
"""Factor within which a prediction is trusted."""
CHECK_S = 120.0
"""What a check of a node is taken to last, seconds."""
EAGER_LOOKS = 8
LOOK_S = 5.0
"""After so many, a look through all that waits for trials to skip is taken at most this
often, in seconds. Every group is looked at again before it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exhausted:
    """A trial that an earlier run found out of device memory."""

    one: Planned
    stage: OomStage | None
    together: tuple[Planned, ...]
    """All trials of its group."""


class Unplaceable(ValueError):
    """A group that needs devices that the cluster does not have."""


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
    well: dict[str, Planned] = field(default_factory=dict)
    """Trials that ended neither in a crash nor too late."""


class Schedule:
    """State of a plan in execution."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.lanes: dict[int, Lane] = {}
        self.attempts: dict[str, int] = {}
        """Trial → executions begun."""
        self.autoscaling = False
        self._skips = False
        self._checks = False
        self._known: dict[str, bool] = {}
        """Node → engines may run there side by side."""
        self._checking: dict[str, int] = {}
        """Node under check → lane that holds it in the ledger."""
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
        self._queues: dict[Kind, Queue] = {}
        self._ledgers: dict[str | None, Ledger] = {}
        self._homes: dict[Kind, tuple[Ledger, ...]] = {}
        """Where each kind can run, found when it is first asked for."""
        self._running: dict[int, _Running] = {}
        self._spare: dict[int, Lane] = {}
        """Lanes without work; none is left when an event is dealt with."""
        self._health = Health()
        self._inspected: dict[int, tuple[Device, ...]] = {}
        """Lane under inspection → its devices that are in doubt."""
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
        check: bool = False,
        side_by_side: Mapping[str, bool] | None = None,
    ) -> Schedule:
        """The start: everything waits, all devices are free.

        Args:
            groups: in the plan's order.
            nodes: those of the cluster.
            skip: whether an out-of-memory makes larger trials pointless.
            known: trials that an earlier run found out of memory, on these devices.
            autoscaling: nodes can be asked for, so nothing is unplaceable yet.
            check: several engines run on a node only where a check allows it.
            side_by_side: node → what is known of that.

        Raises:
            Unplaceable: a group can never run on these nodes.
            UnknownDevice: a trial asks for a device that the catalogue does not hold.
        """
        state = cls()
        state.autoscaling = autoscaling
        state._checks, state._known = check, dict(side_by_side or {})
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
            for ledger in self._ledgers.values()
            for node_id, machine in ledger.machines.items()
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

    @property
    def stuck(self) -> bool:
        """All that is left waits for nodes that are not there."""
        busy = self._running or self._inspected or self._checking
        waits = any(queue and self._home(kind) for kind, queue in self._queues.items())
        return bool(self._waiting) and not busy and not waits

    def ahead(self) -> dict[str, int]:
        """Node → lanes that may be open there at once, for what runs and what waits.

        Read for real nodes after every turn of the driver's loop: those of which nothing waits
        are left out.
        """
        found: dict[str, int] = {}
        for ledger in self._ledgers.values():
            widths = [
                kind.devices for kind, queue in self._queues.items()
                if queue and ledger in self._home(kind) and kind.devices <= ledger.widest
            ]  # fmt: skip
            if not widths:
                continue
            waiting = len(self._waiting)
            for node_id, machine in ledger.machines.items():
                alone = machine.node.cpu_only or machine.side_by_side is False
                lanes = 1 if alone else machine.node.devices // min(widths)
                found[node_id] = min(lanes, len(machine.ends) + waiting)
        return found

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
                if not event.failed:
                    self._running[lane_id].well[trial_id] = one
                return self._learn(event, one) if event.exhausted and self._skips else []
            case GroupEnded(lane_id=lane_id, clean=clean, devices=devices):
                if lane_id not in self._running:
                    return []
                left = self._running[lane_id].left
                assert not clean or not left, "a group ended before its trials"
                running = self._stop(lane_id, done=not left)
                for trial_id in left:
                    self.attempts[trial_id] -= 1  # it had not begun
                if rest := running.group.only(left):
                    self._enqueue(running.number, rest)
                return self._leave_behind(lane_id, running, clean, devices) + self._fill()
            case LaneLost(lane_id=lane_id, trial_id=trial_id, retry=retry, lives=lives):
                if lane_id not in self._running:
                    return []
                in_hand = set() if trial_id is None else {trial_id}
                running = self._stop(lane_id, done=False)
                commands = self._lost(lane_id, running, in_hand, retry=retry)
                if retry:
                    self._give_back(lane_id)
                    commands.append(self._close(lane_id))
                else:
                    commands += self._leave_behind(lane_id, running, lives, event.devices)
                return commands + self._fill()
            case Inspected(lane_id=lane_id, sound=sound):
                if lane_id not in self._inspected:
                    return []
                return self._passed(lane_id, sound) + self._fill()
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
            case Checked(node_id=node_id, side_by_side=allowed):
                self._checked(node_id, allowed)
                return self._fill()

    # --- what waits

    def _kind(self, group: Group) -> Kind:
        asked = None if group.predicts else group.trials[0].trial.layout.device
        return Kind(group.held, asked if asked in (None, CPU) else device(asked).name)

    def _enqueue(self, number: int, group: Group) -> None:
        kind = self._kind(group)
        predicted_s = group.predicted_s
        self._waiting[number] = group
        self._predicted[number] = predicted_s
        self._queues.setdefault(kind, Queue()).add(predicted_s, number)
        self._weigh(kind, predicted_s)

    def _dequeue(self, number: int, kind: Kind) -> Group:
        predicted_s = self._predicted[number]
        self._queues[kind].take((predicted_s, -number))
        self._weigh(kind, -predicted_s)
        return self._waiting.pop(number)

    def _weigh(self, kind: Kind, predicted_s: float) -> None:
        self._waiting_work += predicted_s * self._width(kind)
        claimed = self._claimed.get(kind.device_class, 0.0)
        self._claimed[kind.device_class] = claimed + predicted_s * self._width(kind)

    def _width(self, kind: Kind) -> int:
        """Devices of a group in the sums; a CPU machine counts as one."""
        return 1 if self._cpu_only else kind.devices

    # --- what is known of memory

    def _learn(self, event: TrialEnded, one: Planned) -> list[Command]:
        """Skips what waits and cannot fit, since `one` did not."""
        lane = self.lanes[event.lane_id]
        name = self.nodes[nodes_of(lane)[0]].device_class
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

    def _against(self, kind: Kind) -> list[Frontier]:
        """What speaks against trials of a kind: of every class on which they could run."""
        classes = [ledger.device_class for ledger in self._home(kind)]
        known = [self._frontiers[name] for name in classes if name in self._frontiers]
        return known if len(known) == len(classes) else []

    def _classes(self, one: Planned) -> list[str | None]:
        """Classes of device on which a trial that has run may have been."""
        asked = one.trial.layout.device
        name = asked if asked in (None, CPU) else device(asked).name
        return [name] if name is not None else list(self._ledgers)

    # --- where it can run

    def _join(self, node: Node) -> None:
        self.nodes[node.node_id] = node
        if node.device_class not in self._ledgers:
            self._ledgers[node.device_class] = Ledger(node.device_class)
        known = self._known.get(node.node_id)
        if node.cpu_only or node.devices == 1 or not self._checks:
            known = True if known is None else known
        self._ledgers[node.device_class].join(node, known)
        self._homes.clear()

    def _leave(self, node_id: str, in_hand: set[str]) -> list[Command]:
        node = self.nodes.pop(node_id, None)
        if node is None:
            return []
        ledger = self._ledgers[node.device_class]
        commands: list[Command] = []
        if (checking := self._checking.pop(node_id, None)) is not None:
            ledger.give_back(ledger.machines[node_id], checking)
        for lane_id in list(ledger.machines[node_id].ends):
            self._inspected.pop(lane_id, None)
            if lane_id in self._running:
                running = self._stop(lane_id, done=False)
                begun = in_hand.intersection(running.left)
                commands += self._lost(lane_id, running, begun, retry=True)
            self._give_back(lane_id)
            commands.append(self._close(lane_id))
        ledger.leave(node_id)
        if not ledger.machines:
            del self._ledgers[node.device_class]
        self._homes.clear()
        self._asks_nodes = True
        return commands + self._fill()

    def _home(self, kind: Kind) -> tuple[Ledger, ...]:
        """Pools whose nodes can hold a group, or can together where none does alone."""
        if kind not in self._homes:
            asked = kind.device_class
            ledgers = [p for name, p in self._ledgers.items() if asked is None or name == asked]
            homes = tuple(ledger for ledger in ledgers if ledger.widest >= kind.devices)
            self._homes[kind] = homes or tuple(
                ledger for ledger in ledgers if ledger.gang_devices >= kind.devices
            )
        return self._homes[kind]

    def _stranded(self) -> Iterator[tuple[int, Kind]]:
        for kind, queue in self._queues.items():
            if queue and not self._home(kind):
                for number in queue.numbers():
                    yield number, kind

    def _missing(self, kind: Kind, label: str) -> str:
        asked = kind.device_class
        of_class = "" if asked is None else f" of class {asked}"
        found = [p for name, p in self._ledgers.items() if asked is None or name == asked]
        most = max((max(ledger.widest, ledger.gang_devices) for ledger in found), default=0)
        text = f"group {label} needs {kind.devices} devices{of_class}, but the cluster has {most}"
        others = sorted({str(name or "unknown") for name in self._ledgers if name != asked})
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
        needs: Counter[Kind] = Counter()
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
            for ledger in self._ledgers.values():
                if ledger.reservation and not self._queues[ledger.reservation.kind]:
                    ledger.unreserve()
            order = self._order()
            if not any(self._place(kind, commands) for kind in order):
                self._reserve(order)
                break
        commands += [self._close(lane_id) for lane_id in list(self._spare)]
        return commands + self._ask()

    def _order(self) -> list[Kind]:
        """Kinds that wait, the one to be served first at the head."""
        scale = self.slowness
        capacity = sum(ledger.devices for ledger in self._ledgers.values())
        running = self._ending_work - self._now * self._busy
        work = max(0.0, self._waiting_work * scale + running)
        end = self._now + (work / capacity if capacity else 0.0)

        def place(kind: Kind) -> tuple[Any, ...]:
            longest, number = self._queues[kind].longest
            decides = longest > 0 and self._now + TRUST * longest * scale >= end
            free_to_choose = kind.device_class is None
            if decides:
                return (0, -longest, free_to_choose, -number)
            return (1, -kind.devices, -longest, free_to_choose, -number)

        return sorted((kind for kind, queue in self._queues.items() if queue), key=place)

    @property
    def slowness(self) -> float:
        """Seconds that groups have really taken over those predicted; 1 while none has ended."""
        known = self._taken_s > 0 and self._foreseen_s > 0
        return self._taken_s / self._foreseen_s if known else 1.0

    def _place(self, kind: Kind, commands: list[Command]) -> bool:
        """Starts one group of a kind where there is room for it, or skips trials of it."""
        homes = self._home(kind)
        if len(homes) > 1:  # where groups with no choice leave most
            homes = tuple(sorted(homes, key=self._crowding))
        longest = self._queues[kind].longest
        for ledger in homes:
            if kind.devices > ledger.widest:
                if machines := ledger.whole(kind.devices, kind):
                    if skipped := self._skip([-longest[1]]):
                        commands += skipped
                        return True
                    self._begin_over(ledger, machines, kind, longest, commands)
                    return True
            elif machine := self._room(ledger, kind):
                if skipped := self._skip([-longest[1]]):
                    commands += skipped
                    return True
                if machine.side_by_side is None and (check := self._check(ledger, machine)):
                    commands.append(check)
                    return True
                self._begin(ledger, machine, kind, longest, commands)
                return True
        return any(self._backfill(ledger, kind, commands) for ledger in homes)

    def _crowding(self, ledger: Ledger) -> tuple[float, int]:
        """How much waits that can run nowhere else."""
        if ledger.device_class is None:
            return (0.0, 0)
        waiting = sum(
            len(queue)
            for kind, queue in self._queues.items()
            if kind.device_class == ledger.device_class
        )
        return (self._claimed.get(ledger.device_class, 0.0) / ledger.devices, waiting)

    def _room(self, ledger: Ledger, kind: Kind) -> Machine | None:
        mine = ledger.reservation
        if mine is not None and mine.kind == kind:
            for machine in mine.machines:
                if machine.free >= kind.devices:
                    return machine
        best = ledger.fullest(kind.devices)
        for lane in self._spare.values():
            if lane.devices != kind.devices or lane.node_id not in ledger.machines:
                continue
            warm = ledger.machines[lane.node_id]
            if best is None or warm.reserved:
                continue
            if warm.free == best.free or not self._wider_waits(kind.devices):
                return warm
        return best

    def _wider_waits(self, devices: int) -> bool:
        return any(queue and kind.devices > devices for kind, queue in self._queues.items())

    def _backfill(self, ledger: Ledger, kind: Kind, commands: list[Command]) -> bool:
        """Starts a group on a reserved node if it ends before its time."""
        kept = ledger.reservation
        if kept is None or kept.kind == kind or kind.devices > ledger.widest:
            return False
        limit = (kept.until - self._now) / self.slowness
        key = self._queues[kind].within(limit) if limit > 0 else None
        if key is None or key[0] <= 0:
            return False
        for machine in kept.machines:
            if machine.free >= kind.devices:
                if skipped := self._skip([-key[1]]):
                    commands += skipped
                else:
                    self._begin(ledger, machine, kind, key, commands)
                return True
        return False

    def _reserve(self, order: list[Kind]) -> None:
        """Keeps nodes for the widest gang that waits, where narrower groups wait too."""
        by_width = sorted(order, key=lambda kind: -kind.devices)  # stable
        kept = {ledger.reservation.kind for ledger in self._ledgers.values() if ledger.reservation}
        for kind in by_width:
            if kind in kept or not self._home(kind):
                continue
            ledger = min(self._home(kind), key=self._crowding)
            narrower = any(
                other.devices < kind.devices and ledger in self._home(other) for other in by_width
            )
            if narrower and ledger.reservation is None:
                ledger.reserve(kind)
                kept.add(kind)

    def _begin(
        self,
        ledger: Ledger,
        machine: Machine,
        kind: Kind,
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
        self._assign(ledger, [(machine, kind.devices)], lane, kind, key, commands)

    def _begin_over(
        self,
        ledger: Ledger,
        machines: list[Machine],
        kind: Kind,
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
        self._assign(ledger, held, lane, kind, key, commands)

    def _make_room(self, node_id: str, commands: list[Command]) -> None:
        """Closes the lanes without work on a node: their devices count as free already."""
        in_the_way = [one for one in self._spare.values() if node_id in nodes_of(one)]
        commands += [self._close(lane.lane_id) for lane in in_the_way]

    def _assign(
        self,
        ledger: Ledger,
        machines: list[tuple[Machine, int]],
        lane: Lane,
        kind: Kind,
        key: tuple[float, int],
        commands: list[Command],
    ) -> None:
        predicted_s, number = key[0], -key[1]
        group = self._dequeue(number, kind)
        if ledger.reservation is not None and ledger.reservation.kind == kind:
            ledger.unreserve()
        end = self._now + predicted_s * self.slowness
        for machine, devices in machines:
            alone = machine.node.cpu_only or not (machine.side_by_side or group.predicts)
            ledger.hold(machine, lane.lane_id, machine.node.devices if alone else devices, end)
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

    # --- side by side

    def _check(self, ledger: Ledger, machine: Machine) -> Check | None:
        """A check of an idle node, where two groups that wait could share it.

        As many engines as the node carries of the narrowest that wait, each with the shortest
        trial of the shortest group: the more often an engine asks the host for work, the more
        its neighbours can be in the way.
        """
        node = machine.node
        fitting: list[tuple[int, list[int]]] = []
        for kind, queue in self._queues.items():
            if queue and ledger in self._home(kind) and kind.devices <= node.devices:
                measured = [n for n in queue.numbers() if not self._waiting[n].predicts]
                fitting.append((kind.devices, measured))
        fitting = sorted((width, numbers) for width, numbers in fitting if numbers)
        widths = [width for width, numbers in fitting for _ in numbers[:2]]
        if len(widths) < 2 or widths[0] + widths[1] > node.devices:
            return None
        width, numbers = fitting[0]
        groups = [self._waiting[number] for number in reversed(numbers)]
        group = next((g for g in groups if g.predicted_oom < len(g.trials)), groups[0])
        trial = min(group.trials, key=_pass_s)
        one = group.only([trial.trial_id])
        assert one is not None
        lanes = tuple(
            Lane(lane_id=next(self._lane_ids), node_id=node.node_id, devices=width)
            for _ in range(node.devices // width)
        )
        held = lanes[0].lane_id
        self._checking[node.node_id] = held
        ledger.hold(machine, held, node.devices, self._now + CHECK_S)
        return Check(node_id=node.node_id, lanes=lanes, group=one)

    def _checked(self, node_id: str, allowed: bool) -> None:
        held = self._checking.pop(node_id, None)
        if held is not None:
            ledger = self._ledgers[self.nodes[node_id].device_class]
            machine = ledger.machines[node_id]
            machine.side_by_side = self._known[node_id] = allowed
            ledger.give_back(machine, held)

    # --- taking it back

    def _stop(self, lane_id: int, *, done: bool) -> _Running:
        """Ends the work of a lane, which keeps its devices."""
        running = self._running.pop(lane_id)
        kind = self._kind(running.group)
        self._ending_work -= running.end * self._width(kind)
        self._busy -= self._width(kind)
        if done:
            self._taken_s += self._now - running.since
            self._foreseen_s += running.predicted_s
        return running

    def _give_back(self, lane_id: int) -> None:
        """Counts a lane's devices as free; the lane itself stays."""
        for ledger, machine in self._machines(self.lanes[lane_id]):
            ledger.give_back(machine, lane_id)

    def _machines(self, lane: Lane) -> list[tuple[Ledger, Machine]]:
        """Where a lane holds devices, with who keeps account of them."""
        nodes = [self.nodes[node_id] for node_id in nodes_of(lane) if node_id in self.nodes]
        ledgers = [self._ledgers[node.device_class] for node in nodes]
        return [
            (ledger, ledger.machines[node.node_id])
            for ledger, node in zip(ledgers, nodes, strict=True)
        ]

    def _close(self, lane_id: int) -> Close:
        del self.lanes[lane_id]
        self._spare.pop(lane_id, None)
        return Close(lane_id=lane_id)

    def _leave_behind(
        self, lane_id: int, running: _Running, clean: bool, names: Sequence[str]
    ) -> list[Command]:
        """What becomes of a lane whose group ended there: it waits for another, or its devices
        are looked at."""
        lane = self.lanes[lane_id]
        devices = tuple((node, name) for node in nodes_of(lane) for name in names or ("",))
        worked = running.group.only(running.well)
        if worked is not None:
            self._health.worked(devices, worked)
        else:
            self._health.failed(devices, running.group)
        tried = self._health.doubt(devices, running.group.held)
        if clean and tried is None:
            self._give_back(lane_id)
            self._spare[lane_id] = lane
            return []
        self._inspected[lane_id] = devices if tried else ()
        one = tried.only([min(tried.trials, key=_pass_s).trial_id]) if tried else None
        return [Inspect(lane_id=lane_id, group=one)]

    def _passed(self, lane_id: int, sound: bool) -> list[Command]:
        """What becomes of a lane that was inspected."""
        devices = self._inspected.pop(lane_id)
        lane = self.lanes[lane_id]
        if sound:
            self._health.absolved(devices)
            self._give_back(lane_id)
            return [self._close(lane_id)]
        for ledger, machine in self._machines(lane):
            node = machine.node
            whole = lane.node_id is None or node.cpu_only
            ledger.withhold(machine, lane_id, node.devices if whole else lane.devices)
            if node.node_id in ledger.machines:
                self.nodes[node.node_id] = machine.node
            else:
                del self.nodes[node.node_id]
            if not ledger.machines:
                del self._ledgers[node.device_class]
        del self.lanes[lane_id]
        self._homes.clear()
        self._asks_nodes = True
        return [Withhold(lane=lane)]

    def _lost(
        self, lane_id: int, running: _Running, begun: set[str], *, retry: bool
    ) -> list[Command]:
        """Ends the trials in hand of a lane whose engine is gone; the others wait again.
        Without a trial in hand, the engine was being built."""
        node_id = self.lanes[lane_id].node_id
        commands: list[Command] = []
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


def _pass_s(planned: Planned) -> float:
    """Predicted time of a pass; those that are not predicted to fit come last."""
    known = planned.prediction
    return known.e2e_s if known is not None and known.oom is None else math.inf


def _by_width(kind: Kind) -> tuple[int, str]:
    return (-kind.devices, kind.device_class or "")


def replay(
    groups: Iterable[Group],
    nodes: Iterable[Node],
    events: Iterable[Event],
    *,
    skip: bool = True,
    known: Iterable[Exhausted] = (),
    autoscaling: bool = False,
    check: bool = False,
    side_by_side: Mapping[str, bool] | None = None,
) -> tuple[Schedule, list[list[Command]]]:
    """The schedule after a history, with the commands of the start and of every event.

    Args:
        groups, nodes, skip, known, autoscaling, check, side_by_side: as given to `Schedule.of`.
        events: in the order in which they happened.
    """
    state = Schedule.of(
        groups,
        nodes,
        skip=skip,
        known=known,
        autoscaling=autoscaling,
        check=check,
        side_by_side=side_by_side,
    )
    return state, [state.start(), *(state.on(event) for event in events)]
