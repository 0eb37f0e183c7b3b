"""Who holds memory on the GPUs, and whether an engine of ours has left any.

A GPU is rarely empty: a desktop's display holds hundreds of MiB, another user's program
gigabytes. None of that is ours to wait for. So what is in use is noted before the first group of a
run and compared with what is in use after one. Memory of processes that NVML names, and that are
not of the engine's host, is left out on both sides, so that a browser that is opened during the run
withholds no GPU either. What is left over counts as the engine's: memory of its processes, and of
processes that are gone or that nobody names.

NVML names no process in most containers, and no sizes under Windows. Then all that was added since
the beginning counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from workers.hardware import nvml as library

CLEAN_BYTES = 256 * 2**20
"""Memory that may be added to a GPU and still counts as none."""
_LISTS = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process with memory on a GPU."""

    pid: int
    name: str
    """Of its program; empty where NVML does not say."""
    used_bytes: int | None
    """Null where NVML does not say."""

    def __str__(self) -> str:
        size = "" if self.used_bytes is None else f" {_mib(self.used_bytes)}"
        return f"{self.name or 'a process'} (pid {self.pid}){size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """What is in use on one GPU."""

    used_bytes: int
    holders: tuple[Holder, ...] = ()
    """Those with most memory first."""

    def without_others(self, own: Collection[int] = ()) -> int:
        """Bytes that no process holds but, at most, the processes `own`."""
        others = (one.used_bytes or 0 for one in self.holders if one.pid not in own)
        return self.used_bytes - sum(others)

    def __str__(self) -> str:
        names = ", ".join(map(str, self.holders)) or "no process that NVML names"
        return f"{_mib(self.used_bytes)} in use: {names}"


def occupancies(nvml: Any = None) -> dict[str, Occupancy]:
    """UUID → what is in use, of every GPU that this process may use; empty without a driver."""
    with library.opened(nvml) as opened:
        names = library.visible(opened) if opened is not None else []
        found = [_occupancy(opened, name) for name in names]
    return {uuid: one for uuid, one in found if one is not None}


def leftovers(
    devices: str | None, before: Mapping[str, Occupancy], own: Collection[int], nvml: Any = None
) -> list[str]:
    """What an engine has left on its GPUs, in words; empty where they are as they were.

    Args:
        devices: GPUs, as `CUDA_VISIBLE_DEVICES` lists them.
        before: `occupancies` before the first engine; a GPU that is not there had nothing.
        own: processes of the engine's host, if any are left.
    """
    if not devices:
        return []
    found = []
    with library.opened(nvml) as opened:
        for name in devices.split(",") if opened is not None else ():
            uuid, now = _occupancy(opened, name)
            if now is None:
                continue
            then = before.get(uuid, Occupancy(used_bytes=0)).without_others()
            added = now.without_others(own) - then
            if added > CLEAN_BYTES:
                found.append(f"{_mib(added)} more than before the first group on GPU {name}; {now}")
    return found


def _occupancy(nvml: Any, name: str) -> tuple[str, Occupancy | None]:
    """UUID of a GPU, and what is in use there; null where it cannot be told."""
    try:
        gpu = library.handle(nvml, name)
    except nvml.NVMLError:
        return name, None
    uuid = str(library.asked(nvml, "nvmlDeviceGetUUID", gpu) or name)
    used = library.memory_used(nvml, gpu)
    if used is None:
        return uuid, None
    sizes: dict[int, int | None] = {}
    for question in _LISTS:  # a program that draws and computes may be on two of them
        for one in library.asked(nvml, question, gpu) or ():
            sizes[one.pid] = max(sizes.get(one.pid) or 0, one.usedGpuMemory or 0) or None
    holders = [
        Holder(pid=pid, name=_program(nvml, pid), used_bytes=size) for pid, size in sizes.items()
    ]
    holders.sort(key=lambda one: (-(one.used_bytes or 0), one.pid))
    return uuid, Occupancy(used_bytes=used, holders=tuple(holders))


def _program(nvml: Any, pid: int) -> str:
    """The file name of a process's program; its arguments may hold secrets."""
    words = str(library.asked(nvml, "nvmlSystemGetProcessName", pid) or "").split()
    return PurePath(words[0]).name if words else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
