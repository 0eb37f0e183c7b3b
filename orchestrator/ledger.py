"""Who holds which devices, which are kept for whom, and who waits for some.

No question that the schedule asks here is answered by going through all nodes or all groups:
groups wait in sorted lists by size and class of device, nodes stand on shelves by how many
devices are free, and those that will be free soonest lie in a heap.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from orchestrator.events import Node


class Kind(NamedTuple):
    """Groups that can stand in for one another on a lane."""

    devices: int
    device_class: str | None
    """Null: any."""


class Queue:
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
class Machine:
    """A node and who is on it."""

    node: Node
    free: int
    ends: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Lane → predicted end, and devices that it gives back then."""
    reserved: bool = False
    side_by_side: bool | None = True
    """Several lanes may be there at once; null: to be checked, and until then one at a time."""
    soonest: float = 0.0
    """When as many devices will be free as the ledger's widest waiting gang needs."""

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
class Reservation:
    """Nodes that are kept for the next group of a kind."""

    kind: Kind
    machines: tuple[Machine, ...]
    until: float
    """When they were predicted to be free."""


class Ledger:
    """The nodes of one class of device."""

    def __init__(self, device_class: str | None) -> None:
        self.device_class = device_class
        self.machines: dict[str, Machine] = {}
        self.reservation: Reservation | None = None
        self.widest = 0
        """Devices of its largest node."""
        self.devices = 0
        self.gang_devices = 0
        """Those that a layout over several nodes can use."""
        self._by_free: dict[int, dict[str, None]] = {}
        """Free devices → nodes that are not reserved."""
        self._wanted = 0
        self._heap: list[tuple[float, str]] = []

    def join(self, node: Node, side_by_side: bool | None = True) -> None:
        machine = Machine(node, node.devices, side_by_side=side_by_side)
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

    def withhold(self, machine: Machine, lane_id: int, devices: int) -> None:
        """Takes devices of a lane out for good; the node itself where no other is left."""
        left = machine.node.devices - devices
        if not left:
            self.leave(machine.node.node_id)
            return
        if machine.reserved:
            self.unreserve()
        _, held = machine.ends.pop(lane_id)
        machine.node = replace(machine.node, devices=left)
        self._change(machine, held - devices)
        self._count()

    def _count(self) -> None:
        nodes = [machine.node for machine in self.machines.values()]
        self.widest = max((node.devices for node in nodes), default=0)
        self.devices = sum(1 if node.cpu_only else node.devices for node in nodes)
        self.gang_devices = sum(node.devices for node in nodes if not node.cpu_only)
        self._wanted = 0

    def hold(self, machine: Machine, lane_id: int, devices: int, end: float) -> None:
        """Gives devices of a node to a lane that is predicted to end at `end`."""
        machine.ends[lane_id] = (end, devices)
        self._change(machine, -devices)

    def give_back(self, machine: Machine, lane_id: int) -> None:
        """Takes a lane's devices back."""
        _, devices = machine.ends.pop(lane_id)
        self._change(machine, devices)

    def _change(self, machine: Machine, devices: int) -> None:
        if not machine.reserved:
            self._unshelve(machine)
        machine.free += devices
        assert 0 <= machine.free <= machine.node.devices, "a device is held twice"
        if not machine.reserved:
            self._shelve(machine)
        if self._wanted:
            self._foresee(machine)

    def _shelve(self, machine: Machine) -> None:
        self._by_free.setdefault(machine.free, {})[machine.node.node_id] = None

    def _unshelve(self, machine: Machine) -> None:
        self._by_free[machine.free].pop(machine.node.node_id, None)

    def fullest(self, devices: int) -> Machine | None:
        """The node with the fewest free devices that are enough."""
        for free in range(devices, self.widest + 1):
            if shelf := self._by_free.get(free):
                return self.machines[next(iter(shelf))]
        return None

    def whole(self, devices: int, kind: Kind) -> list[Machine] | None:
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

    def reserve(self, kind: Kind) -> None:
        """Keeps the nodes that will be free soonest for the next group of `kind`."""
        over = kind.devices > self.widest
        wanted = -1 if over else kind.devices
        if self._wanted != wanted:
            self._wanted, self._heap = wanted, []
            for machine in self.machines.values():
                self._foresee(machine)
        chosen: list[Machine] = []
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
        self.reservation = Reservation(
            kind=kind,
            machines=tuple(chosen),
            until=max(machine.soonest for machine in chosen),
        )

    def _foresee(self, machine: Machine) -> None:
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
