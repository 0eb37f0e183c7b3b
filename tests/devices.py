"""What a process has opened of NVIDIA's devices. A machine without any tells that too."""

from __future__ import annotations

import ctypes
import sys
from multiprocessing.connection import Connection
from pathlib import Path

NVIDIA = "/dev/nvidia"
"""How the names of its devices begin."""
_NOT_INITIALIZED = 3
"""`CUDA_ERROR_NOT_INITIALIZED`."""


def opened(prefix: str = NVIDIA) -> list[str]:
    """Files that this process has open and whose names begin so."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(handle.readlink()))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(name for name in found if name.startswith(prefix))


def cuda_is_up() -> bool:
    """Whether CUDA's driver was initialised here; loading its library alone does nothing."""
    if "/libcuda.so" not in Path("/proc/self/maps").read_text():
        return False
    count = ctypes.c_int()
    answer: int = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    return answer != _NOT_INITIALIZED


def tell(sender: Connection) -> None:
    """Says of this process what is open, whether CUDA is up, and whether vLLM is imported."""
    sender.send((opened(), cuda_is_up(), "vllm.v1.engine.llm_engine" in sys.modules))
