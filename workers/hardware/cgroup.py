"""What a control group leaves of the cores: its quota of time, and how long it held threads back.

A container may be allowed one core's time on a machine of 64, spread over all of them; affinity
says nothing of that. Version 1 and version 2 of control groups are read, from the group of this
process up to the root, since the tightest of them holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


@cache
def cpu_quota() -> float | None:
    """Cores' worth of time that this process may use, as first asked; null without a limit."""
    return quota_of(_folders())


def quota_of(folders: Iterable[Path]) -> float | None:
    """The tightest limit among these groups, in cores' worth of time; null without one."""
    found = []
    for folder in folders:
        try:
            if (limits := folder / "cpu.max").exists():
                quota, period = limits.read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period))
        except (OSError, ValueError):  # the root of version 2 has no such file
            continue
    return min(found, default=None)


def throttled_s() -> float | None:
    """Time for which groups of this process have been held back so far, in seconds; null where
    there is no quota."""
    if cpu_quota() is None:
        return None
    found = []
    for folder in _folders():
        try:
            lines = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if "throttled_usec" in lines:
            found.append(int(lines["throttled_usec"]) / 1e6)
        elif "throttled_time" in lines:
            found.append(int(lines["throttled_time"]) / 1e9)
    return max(found, default=None)


@cache
def _folders() -> tuple[Path, ...]:
    """Folders of the control groups that may limit this process's time, innermost first."""
    return tuple(_find(Path("/proc/self/cgroup"), _MOUNT))


def _find(membership: Path, mount: Path) -> Iterator[Path]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    roots: list[tuple[Path, str]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers and (mount / "cgroup.controllers").exists():
            roots.append((mount, path))
        elif "cpu" in controllers.split(","):
            roots.append((mount / "cpu", path))
    for root, path in roots:
        folder = root / path.lstrip("/")
        while True:
            if folder.is_dir():  # the path is another one where a container has only its part
                yield folder
            if folder == root:
                break
            folder = folder.parent
