"""The caches of the processor, as the operating system tells them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_CORES = Path("/sys/devices/system/cpu")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cache_bytes(used: Iterable[int] | None = None) -> int:
    """Last-level caches of these cores, else of those that this process may use, together;
    0 where the system does not say."""
    levels = data_caches(os.sched_getaffinity(0) if used is None else used)
    return levels[max(levels)] if levels else 0


def data_caches(used: Iterable[int]) -> dict[int, int]:
    """Bytes of the data caches of these cores by level; one that several share counts once."""
    levels: dict[int, dict[str, int]] = {}
    for core in used:
        for index in (_CORES / f"cpu{core}" / "cache").glob("index*"):
            try:
                level = int((index / "level").read_text())
                kind = (index / "type").read_text().strip()
                shared = (index / "shared_cpu_list").read_text().strip()
                size = (index / "size").read_text().strip()
            except (OSError, ValueError):
                continue
            if kind != "Instruction":
                levels.setdefault(level, {})[shared] = int(size[:-1]) * _UNITS[size[-1]]
    return {level: sum(found.values()) for level, found in levels.items()}
