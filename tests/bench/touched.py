"""Bytes of a tensor that were truly read: the processor's own mark on every page.

A processor marks a page of memory as accessed in its page table when anything reads it, and
Linux tells and clears those marks (`/proc/self/clear_refs`, `Referenced` in `/proc/self/smaps`).
It tells them per mapping, so each tensor to be watched is moved into one of its own, made from
a nameless file, since neighbours without files are merged. Nothing about models, routing or
kernels is known here: what a kernel reads is seen, and what it leaves out is not.

Pages have 4 KiB: the sum of a tensor is exact where what is read of it begins and ends with a
page, and at most a page too large for each stretch otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLEAR, _MAPS = Path("/proc/self/clear_refs"), Path("/proc/self/smaps")


class Touched:
    """Watches tensors, which keep their values and change their place."""

    def __init__(self, tensors: Mapping[str, torch.nn.Parameter]) -> None:
        self._sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._places: dict[int, str] = {}
        for name, tensor in tensors.items():
            moved = _own_mapping(name, tensor)
            self._places[moved.data_ptr()] = name
            tensor.data = moved

    def clear(self) -> None:
        """Nothing has been read from now on; nobody may read meanwhile.

        Clearing a mark leaves the translations that cores have kept, through which a page would
        be read without a mark. Taking the right to read away, for a moment, drops them.
        """
        _CLEAR.write_text("1")
        for place, name in self._places.items():
            for rights in (0, mmap.PROT_READ | mmap.PROT_WRITE):
                size = ctypes.c_size_t(self._sizes[name])
                if _LIBC.mprotect(ctypes.c_void_p(place), size, rights):
                    raise OSError(ctypes.get_errno(), f"mprotect of {name}")

    def bytes(self) -> dict[str, int]:
        """Of every tensor, what has been read since the last `clear`."""
        found: dict[str, int] = {}
        name: str | None = None
        for line in _MAPS.read_text().splitlines():
            first, *rest = line.split()
            if not first.endswith(":"):
                name = self._places.get(int(first.split("-")[0], 16))
            elif name is not None and first == "Referenced:":
                found[name] = min(1024 * int(rest[0]), self._sizes[name])
        assert found.keys() == self._sizes.keys(), "a mapping was merged or moved"
        return found


def works() -> bool:
    """Whether this kernel tells, tried on three pages of which the middle one is read."""
    try:
        page = mmap.PAGESIZE
        probe = torch.nn.Parameter(torch.ones(3 * page, dtype=torch.uint8), requires_grad=False)
        watch = Touched({"probe": probe})
        watch.clear()
        before = watch.bytes()["probe"]
        int(probe[page : 2 * page].sum())
        return (before, watch.bytes()["probe"]) == (0, page)
    except (OSError, AssertionError):
        return False


def _own_mapping(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` in a mapping that holds nothing else; it lives as long as the copy."""
    file = os.memfd_create(name)
    try:
        os.ftruncate(file, tensor.nbytes)
        room = mmap.mmap(file, tensor.nbytes)
    finally:
        os.close(file)
    moved = torch.frombuffer(room, dtype=tensor.dtype).view(tensor.shape)
    moved.copy_(tensor.detach())
    return moved
