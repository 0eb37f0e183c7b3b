"""The reference load itself, with torch, in the process that holds the model.

Why there is one stands in `workers.hardware.reference`. A CPU rank takes the memory before its
model and keeps it: what is taken later would count as the model's, and a memory limit could refuse
it. A CUDA rank takes it from a pool of its own for as long as the load runs, so that none of the
engine's memory is held or given back, and none counts as the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch

from workers.hardware.caches import cache_bytes
from workers.hardware.reference import Rate, Reference, rate

LEAST_BYTES = 128 * 2**20
MOST_BYTES = 512 * 2**20
_CACHES = 4
"""Memory that is read: this many times the last-level caches, within the bounds above."""
_SHARE_OF_MEMORY = 32
"""It takes no more than this part of the machine's memory."""
_SIDE = {"cpu": 768, "cuda": 4096}
"""Rows and columns of the matrices."""
_REPEATS = 9
_LEAST_REPEATS = 5
_BUDGET_S = 0.12
"""Time for the repeats of one kind of work; a slow machine makes `_LEAST_REPEATS` all the same."""


class ReferenceLoad:
    """Memory to read and matrices to multiply.

    Args:
        device: of the rank.

    Raises:
        RuntimeError, MemoryError: there is no room for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            caches = torch.cuda.get_device_properties(device).L2_cache_size
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            caches, memory = cache_bytes(), psutil.virtual_memory().total
        bound = min(MOST_BYTES, memory // _SHARE_OF_MEMORY)
        size = min(max(LEAST_BYTES, _CACHES * caches), bound) // 4
        side, dtype = _SIDE[device.type], torch.float32
        if device.type == "cuda":
            dtype = torch.bfloat16
            self._array = torch.ones(size, device=device)
        else:  # numpy fills it with one thread: torch's are not bound to their cores yet
            self._array = torch.from_numpy(np.ones(size, dtype=np.float32))
        self._left, self._right, self._out = (
            torch.ones(side, side, dtype=dtype, device=device) for _ in range(3)
        )

    def run(self) -> Reference:
        """Does the work, after a run of each kind that does not count."""
        operations = 2.0 * self._left.shape[0] ** 3
        return Reference(
            bandwidth_gb_s=self._rate(self._array.nbytes / 1e9, self._array.sum),
            tflops=self._rate(operations / 1e12, self._multiply),
        )

    def _multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._out)

    def _rate(self, amount: float, work: Callable[[], Any]) -> Rate:
        self._seconds(work)
        end = time.perf_counter() + _BUDGET_S
        seconds: list[float] = []
        while len(seconds) < _REPEATS:
            if len(seconds) >= _LEAST_REPEATS and time.perf_counter() > end:
                break
            seconds.append(self._seconds(work))
        return rate(amount, seconds)

    def _seconds(self, work: Callable[[], Any]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


def on_cuda(device: torch.device) -> Reference:
    """Takes memory, does the work, and gives the memory back to the device.

    The caller must put the allocator's peak right (`torch.cuda.reset_peak_memory_stats`).

    Raises:
        RuntimeError: there is no room.
    """
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool, device):
        load = ReferenceLoad(device)
        found = load.run()
        del load
    return found
