"""The counters of one engine, read right before and right after each of its passes.

`workers.hardware.contention` says what the kernel counts; this is how often it is asked. A pass
can be as short as some milliseconds, so a look must cost microseconds: the files of the engine's
threads stay open from pass to pass and are read again from their beginning (of very many threads
some are opened each time: descriptors are few), and only the threads that computed in the last pass
are asked. Where these do not account for what the processes computed, all are asked the next time.
Which threads there are is looked up again before each pass, which processes only when the caller
says so.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import psutil

from workers.contract.reading import Reading
from workers.hardware import cgroup, contention
from workers.hardware.contention import Cores
from workers.hardware.gpus import Gpus

_LONGEST = 65536
"""Bytes of a file that are read; cores come first in `/proc/stat`."""
_LEAST_SHARE = 0.1
"""Share of a pass that a thread wants a core for, from which on it computes."""
_KNOWN_SHARE = 0.9
"""Of what the processes computed; the threads that are asked must have done as much."""
_MOST_KEPT = 256
"""Files that stay open; a process is often allowed 1,024, most of them for its engine."""


class _File:
    """A file of /proc that is read again and again."""

    def __init__(self, path: str, *, keep: bool) -> None:
        self._path, self._descriptor = path, None
        if keep:
            with contextlib.suppress(OSError):
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def text(self) -> str:
        """From its beginning; empty where it is not there, or its thread has ended."""
        try:
            if self._descriptor is not None:
                return os.pread(self._descriptor, _LONGEST, 0).decode("ascii", "replace")
            return Path(self._path).read_text("ascii", "replace")
        except OSError:
            return ""

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(slots=True)
class _Thread:
    """One thread and its files."""

    tid: int
    schedstat: _File
    status: _File
    computes: bool = False
    """It did in the last pass."""

    def close(self) -> None:
        self.schedstat.close()
        self.status.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """Counters at one moment."""

    at: float
    threads: dict[tuple[int, int], tuple[float, float]]
    """Time on a core and time ready to run, by process and thread."""
    switches: dict[tuple[int, int], int]
    own_cpu_s: float | None
    """Time on a core of all processes of the engine since they began."""
    cores: dict[int, Cores]
    pressure_s: float | None
    throttled_s: float | None
    gpus: list[float | None]
    cost_s: float = 0.0
    """What looking took."""


@dataclass
class Watch:
    """What the machine says while the processes of one engine compute.

    Args:
        gpus: its GPUs; null without one.
    """

    gpus: Gpus | None = None
    _pids: list[int] = field(default_factory=list)
    _threads: dict[tuple[int, int], _Thread] = field(default_factory=dict)
    _before: _Look | None = None
    _ask_all: bool = True
    """Which threads compute is not known."""
    _stat: _File = field(default_factory=lambda: _File("/proc/stat", keep=True))
    _pressure: _File = field(default_factory=lambda: _File("/proc/pressure/cpu", keep=True))

    def find(self) -> None:
        """Looks up the processes: this one and all below it."""
        try:
            below = psutil.Process().children(recursive=True)
        except psutil.Error:
            below = []
        self._pids = [os.getpid(), *(one.pid for one in below)]

    def begin(self) -> None:
        """Right before a pass."""
        start = time.perf_counter()
        if not self._pids:
            self.find()
        self._refresh()
        look = self._look()
        self._before = replace(look, cost_s=time.perf_counter() - start)

    def end(self) -> Reading:
        """Right after it."""
        before = self._before
        assert before is not None, "a pass begins before it ends"
        self._before = None
        start = time.perf_counter()
        found = self._between(before, self._look())
        return replace(found, check_s=before.cost_s + time.perf_counter() - start)

    def close(self) -> None:
        """Closes all files."""
        for thread in self._threads.values():
            thread.close()
        self._threads.clear()
        self._stat.close()
        self._pressure.close()
        if self.gpus is not None:
            self.gpus.close()
            self.gpus = None

    def _refresh(self) -> None:
        """Opens the files of threads that have come, closes those of threads that went."""
        there = {(pid, tid) for pid in self._pids for tid in _tids(pid)}
        for key in self._threads.keys() - there:
            self._threads.pop(key).close()
        for key in there - self._threads.keys():
            folder = "/proc/{}/task/{}".format(*key)
            keep = 2 * len(self._threads) < _MOST_KEPT
            self._threads[key] = _Thread(
                tid=key[1],
                schedstat=_File(f"{folder}/schedstat", keep=keep),
                status=_File(f"{folder}/status", keep=keep),
            )

    def _look(self) -> _Look:
        threads: dict[tuple[int, int], tuple[float, float]] = {}
        switches: dict[tuple[int, int], int] = {}
        for key, thread in self._threads.items():
            if not (self._ask_all or thread.computes):
                continue
            run, wait = contention.run_and_wait_s(thread.schedstat.text())
            if run is None or wait is None:  # it has ended
                continue
            threads[key] = run, wait
            if thread.computes:
                found = contention.switches(thread.status.text())
                if found is not None:
                    switches[key] = found
        now = time.perf_counter()
        gpus = self.gpus.throttled_s() if self.gpus is not None else []
        return _Look(
            at=now,
            threads=threads,
            switches=switches,
            own_cpu_s=_processor_s(self._pids),
            cores=contention.core_times(self._stat.text()),
            pressure_s=contention.waited_for_cores_s(self._pressure.text()),
            throttled_s=cgroup.throttled_s(),
            gpus=gpus,
        )

    def _between(self, before: _Look, after: _Look) -> Reading:
        wall = after.at - before.at
        ran: dict[tuple[int, int], tuple[float, float]] = {}
        for key, (run, wait) in after.threads.items():
            run_before, wait_before = before.threads.get(key, (0.0, 0.0))
            ran[key] = run - run_before, wait - wait_before
        cores: set[int] = set()
        computing = 0
        for key, (run, wait) in ran.items():
            thread = self._threads[key]
            thread.computes = run + wait > _LEAST_SHARE * wall
            if thread.computes:
                computing += 1
                cores |= _affinity(thread.tid)
        known = sum(run for run, _ in ran.values())
        own = _difference(before.own_cpu_s, after.own_cpu_s)
        self._ask_all = own is None or known < _KNOWN_SHARE * own
        here = _grown(before, after, cores)
        everywhere = _grown(before, after, after.cores.keys())
        both = before.switches.keys() & after.switches.keys()
        others = None if here is None or own is None else max(0.0, here.busy_s - own)
        gpu = None
        if self.gpus is not None:
            gpu = self.gpus.reading(self._pids, before.gpus)
        return Reading(
            wall_s=wall,
            computing_threads=computing if ran else None,
            cores=len(cores) or None,
            machine_cores=len(after.cores) or None,
            own_cpu_s=own,
            run_delay_s=sum(wait for _, wait in ran.values()) if ran else None,
            involuntary_switches=sum(after.switches[key] - before.switches[key] for key in both)
            if both
            else None,
            others_cpu_s=others,
            elsewhere_cpu_s=max(0.0, everywhere.busy_s - here.busy_s)
            if everywhere is not None and here is not None
            else None,
            steal_s=here.stolen_s if here is not None else None,
            pressure_s=_difference(before.pressure_s, after.pressure_s),
            throttled_s=_difference(before.throttled_s, after.throttled_s),
            frequency_mhz=_frequency_mhz(cores),
            gpu=gpu,
        )


def _tids(pid: int) -> list[int]:
    try:
        with os.scandir(f"/proc/{pid}/task") as entries:
            return [int(one.name) for one in entries]
    except OSError:  # it has ended
        return []


def _processor_s(pids: Collection[int]) -> float | None:
    """Time on a core of these processes; null where one has ended."""
    try:
        # Linux numbers the clock of a process so (clock_getcpuclockid).
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
    except OSError:
        return None


def _affinity(tid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return os.sched_getaffinity(tid)
    return set()


def _grown(before: _Look, after: _Look, cores: Collection[int]) -> Cores | None:
    """What some cores did between two looks; null where that is not told of all of them."""
    first, last = (contention.together(one.cores, cores) for one in (before, after))
    if first is None or last is None:
        return None
    return Cores(
        busy_s=max(0.0, last.busy_s - first.busy_s),
        stolen_s=max(0.0, last.stolen_s - first.stolen_s),
    )


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


def _frequency_mhz(cores: set[int]) -> float | None:
    """Mean clock of some cores; null where it cannot be read."""
    found = list(_kilohertz(cores))
    return sum(found) / len(found) / 1000 if found else None


def _kilohertz(cores: set[int]) -> Iterator[float]:
    if not _has_frequencies():
        return
    for core in cores:
        with contextlib.suppress(OSError, ValueError):
            yield float(Path(_CLOCK.format(core)).read_text())


_CLOCK = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"


@cache
def _has_frequencies() -> bool:
    return Path(_CLOCK.format(0)).exists()
