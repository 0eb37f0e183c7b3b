"""Memory of a CPU device: a limit that really holds, its peak, and giving it back.

On a CPU the device's memory is the process's own, so a limit is the operating system's:
`RLIMIT_DATA` counts private writable mappings, and an allocation beyond it fails where it
is made, as on a GPU. The limit counts from what the idle process already has (interpreter
and libraries), so that it bounds the model alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import psutil

_KIB = 1024
_SHARED = Path("/dev/shm")
_OF_ENGINES = ("psm_", "sem.mp-", "vllm_dist_")
"""How names begin that Python's multiprocessing and vLLM give; Ray's own stay."""


def status(field: str) -> int:
    """A size of `/proc/self/status` (`VmRSS`, `VmHWM`, `VmData`), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * _KIB
    raise KeyError(field)


def kernel_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0  # a kernel before 4.13


def reset_peak() -> None:
    """Starts `VmHWM` anew at the present resident size."""
    # A container may forbid it; the peak is then that of the process so far.
    with contextlib.suppress(PermissionError):
        Path("/proc/self/clear_refs").write_text("5")


def headroom() -> int | None:
    """Bytes left below the limit that is in force; null without one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft - status("VmData")


def trim() -> None:
    """Gives freed heap memory back to the operating system."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def sweep_shared(folder: Path) -> None:
    """Removes shared memory that dead engine ranks left behind.

    vLLM names the segments of a CPU engine after its rendezvous file, which lies in the
    engine's `folder` for temporary files and outlives a crash there.
    """
    for rendezvous in folder.rglob("vllm_dist_*"):
        for segment in _SHARED.glob(f"{rendezvous.name}*"):
            segment.unlink(missing_ok=True)


def shared_segments(pid: int) -> set[Path]:
    """Shared memory and semaphores of engine ranks that a process tree has mapped.

    Their owners remove them when they end by themselves, not when they are killed. They are
    known by their inodes: a semaphore is mapped by its maker under a name that it had before
    it was given its own.
    """
    mapped: set[int] = set()
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return set()
    for process in tree:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if " /dev/shm/" in line:
                    mapped.add(int(line.split()[4]))
    found: set[Path] = set()
    for path in _SHARED.iterdir() if mapped else ():
        with contextlib.suppress(FileNotFoundError):
            if path.name.startswith(_OF_ENGINES) and path.stat().st_ino in mapped:
                found.add(path)
    return found


def limit(added_bytes: int) -> None:
    """Bounds what this process may add to its memory from now on, until `unlimit`."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + added_bytes, hard))


def unlimit() -> None:
    """Lifts `limit`."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
