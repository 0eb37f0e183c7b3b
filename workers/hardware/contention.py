"""Who else wanted the cores: what the operating system says of it, read before and after.

A process that shares its cores is slower and cannot tell from the inside. The kernel can: it
counts for how long each thread was ready to run and did not (`schedstat`), how often one was
taken off its core against its will, what other processes and, on a virtual machine, other
machines had of the cores, and for how long anything waited for a core (PSI). Two snapshots and a
difference are all there is here. What counts as disturbed is for those to decide who measure.

A snapshot reads small files of `/proc` and nothing else, about two per thread, so it may stand
right before and right after what is timed. A field that the system does not tell is null.
Processor time of cores comes in ticks of 10 ms, so shares over much less than a second are coarse.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.hardware import cgroup

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thread:
    """One thread since it began; null where this kernel does not count it."""

    run_s: float | None
    """On a core, seconds."""
    wait_s: float | None
    """Ready to run and not on a core, seconds."""
    involuntary: int | None
    """Times that it was taken off a core while it could have run on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """Time of some cores since the machine started, seconds of all of them together."""

    busy_s: float
    """Spent by any process of this machine, or by its kernel."""
    stolen_s: float
    """Kept by a hypervisor for others while this machine wanted it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What the system had counted at one moment."""

    at: float
    """`time.monotonic`, seconds."""
    cores: frozenset[int]
    """Cores that any of the threads may use."""
    threads: Mapping[tuple[int, int], Thread]
    """Threads of the processes asked for, by process and thread id."""
    time: Cores | None
    """Time of `cores`."""
    pressure_s: float | None
    """Time for which something on the machine waited for a core (PSI, `some`), seconds."""
    throttled_s: float | None
    """Time for which a quota held back this process's control group; null without a quota."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contention:
    """What happened between two snapshots; null where the system says nothing."""

    wall_s: float
    """Time between them, seconds."""
    cores: int
    """Cores that the threads could use."""
    run_s: float | None
    """Time that the threads were on a core, seconds of all together."""
    wait_s: float | None
    """Time that they were ready to run and were not, seconds of all together."""
    involuntary: int | None
    """Times that one was taken off its core."""
    others: float | None
    """Share of the cores' time that other processes of the machine had."""
    stolen: float | None
    """Share of the cores' time that a hypervisor gave to others."""
    pressure: float | None
    """Share of the time in which something on the machine waited for a core."""
    throttled: float | None
    """Share of the time in which a quota held threads back; null without a quota."""

    @property
    def waiting(self) -> float | None:
        """Share of the threads' wish to run that was not met; null where nothing ran."""
        if self.run_s is None or self.wait_s is None or self.run_s + self.wait_s <= 0:
            return None
        return self.wait_s / (self.run_s + self.wait_s)


def snapshot(pids: Iterable[int], cores: Collection[int] | None = None) -> Snapshot:
    """What the system has counted so far.

    Args:
        pids: processes whose threads count as one's own; one that has ended has none.
        cores: cores to look at; by default those that any of the threads may use.
    """
    threads: dict[tuple[int, int], Thread] = {}
    allowed: set[int] = set(cores or ())
    for pid in pids:
        for tid in _tids(pid):
            thread = _thread(pid, tid)
            if thread is None:
                continue
            threads[pid, tid] = thread
            if cores is None:
                allowed |= _affinity(tid)
    return Snapshot(
        at=time.monotonic(),
        cores=frozenset(allowed),
        threads=threads,
        time=_cores(allowed),
        pressure_s=_pressure(),
        throttled_s=cgroup.throttled_s(),
    )


def between(first: Snapshot, last: Snapshot) -> Contention:
    """The difference of two snapshots of the same processes.

    A thread that began in between counts from its begin; of one that ended nothing is known, so
    its time is taken for that of others: keep threads alive over what is measured.
    """
    wall = last.at - first.at
    room = wall * len(last.cores)
    run = _grown(first, last, "run_s")
    wait = _grown(first, last, "wait_s")
    switches = _grown(first, last, "involuntary")
    others = stolen = None
    if first.time and last.time and room > 0 and first.cores == last.cores:
        stolen = max(0.0, last.time.stolen_s - first.time.stolen_s) / room
        if run is not None:
            busy = last.time.busy_s - first.time.busy_s
            others = min(1.0, max(0.0, busy - run) / room)
    return Contention(
        wall_s=wall,
        cores=len(last.cores),
        run_s=run,
        wait_s=wait,
        involuntary=None if switches is None else round(switches),
        others=others,
        stolen=stolen,
        pressure=_share(first.pressure_s, last.pressure_s, wall),
        throttled=_share(first.throttled_s, last.throttled_s, wall),
    )


def _grown(first: Snapshot, last: Snapshot, name: str) -> float | None:
    """By how much a count of all threads grew; null if one of them has none."""
    total = 0.0
    for key, thread in last.threads.items():
        now = getattr(thread, name)
        before = getattr(first.threads[key], name) if key in first.threads else 0
        if now is None or before is None:
            return None
        total += now - before
    return total if last.threads else None


def _share(before: float | None, now: float | None, wall_s: float) -> float | None:
    if before is None or now is None or wall_s <= 0:
        return None
    return (now - before) / wall_s


def _tids(pid: int) -> list[int]:
    try:
        return [int(path.name) for path in (_PROC / str(pid) / "task").iterdir()]
    except OSError:  # it has ended
        return []


def _thread(pid: int, tid: int) -> Thread | None:
    """One thread; null if it has ended meanwhile."""
    folder = f"{_PROC}/{pid}/task/{tid}"
    try:
        status = _read(f"{folder}/status")
    except OSError:
        return None
    run = wait = None
    with suppress(OSError):  # a kernel without it
        run, wait = run_and_wait_s(_read(f"{folder}/schedstat"))
    return Thread(run_s=run, wait_s=wait, involuntary=switches(status))


def run_and_wait_s(schedstat: str) -> tuple[float | None, float | None]:
    """Of a thread's `schedstat`: on a core, and ready to run but not on one, seconds."""
    try:
        on_core, ready, _ = schedstat.split()
        return int(on_core) / 1e9, int(ready) / 1e9
    except ValueError:
        return None, None


def switches(status: str) -> int | None:
    """Of a thread's `status`: times that it was taken off a core; it stands last."""
    for line in reversed(status.splitlines()):
        if line.startswith("nonvoluntary_ctxt_switches:"):
            return int(line.split()[1])
    return None


def _affinity(tid: int) -> set[int]:
    try:
        return os.sched_getaffinity(tid)
    except OSError:
        return set()


def _cores(cores: Collection[int]) -> Cores | None:
    """Time of these cores, from `/proc/stat`; null where it is not told of all of them."""
    try:
        each = core_times(_read(f"{_PROC}/stat"))
    except OSError:
        return None
    return together(each, cores)


def core_times(stat: str) -> dict[int, Cores]:
    """Of `/proc/stat`: the time of each core."""
    found = {}
    for line in stat.splitlines():
        if not line.startswith("cpu"):
            break
        name, *fields = line.split()
        if not name[3:]:  # all of them
            continue
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
        busy = user + nice + system + irq + softirq
        found[int(name[3:])] = Cores(busy_s=busy / _TICKS, stolen_s=steal / _TICKS)
    return found


def together(each: Mapping[int, Cores], cores: Collection[int]) -> Cores | None:
    """Time of some cores; null where it is not told of all of them."""
    if not cores or not set(cores) <= each.keys():
        return None
    return Cores(
        busy_s=sum(each[core].busy_s for core in cores),
        stolen_s=sum(each[core].stolen_s for core in cores),
    )


def _pressure() -> float | None:
    """Seconds; null without PSI."""
    try:
        return waited_for_cores_s(_read(f"{_PROC}/pressure/cpu"))
    except OSError:
        return None


def waited_for_cores_s(pressure: str) -> float | None:
    """Of `/proc/pressure/cpu`: the total of its line `some`, seconds."""
    some = pressure.partition("\n")[0]
    return int(some.rpartition("total=")[2]) / 1e6 if "total=" in some else None


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")
