"""NVML, the NVIDIA driver's own library: opened, asked, and closed again.

It knows the GPUs of a machine without touching CUDA, and by other names than CUDA does: always in
the order of the PCI bus, whatever `CUDA_VISIBLE_DEVICES` hides. Processes and engines name GPUs as
that variable does, by index, by UUID (or its first characters), or by the UUID of a MIG slice, so
the names are translated here and nowhere else. Indices agree with CUDA's where
`CUDA_DEVICE_ORDER=PCI_BUS_ID`, which every engine is given.

Whoever runs without a driver gets nothing, and a question that a GPU does not know has no answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Has CUDA number GPUs as NVML and Ray do; by itself it puts the fastest first."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
SLICE = "MIG-"
"""How the names of MIG slices begin."""


@contextmanager
def opened(nvml: Any = None) -> Iterator[Any]:
    """The library while it is needed; null without a driver.

    Args:
        nvml: what answers; by default pynvml.
    """
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def asked(nvml: Any, question: str, *args: Any) -> Any:
    """The answer; null where the GPU, the driver or the library has none."""
    function = getattr(nvml, question, None)
    if function is None:
        return None
    try:
        return function(*args)
    except nvml.NVMLError:
        return None


def visible(nvml: Any, environment: Mapping[str, str] = os.environ) -> list[str]:
    """GPUs that a process of this environment may use, as `CUDA_VISIBLE_DEVICES` names them; all
    of them without it. As CUDA does, it stops at the first name that is none (`-1`, `NoDevFiles`).
    """
    named = environment.get(VISIBLE)
    if named is None:
        return [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    names = []
    for name in map(str.strip, named.split(",")):
        if not (name.isdecimal() or name.startswith(("GPU-", SLICE))):
            break
        names.append(name)
    return names


def handle(nvml: Any, name: str) -> Any:
    """What NVML calls the GPU that `CUDA_VISIBLE_DEVICES` calls `name`.

    Raises:
        NVMLError: there is none.
    """
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    for index in range(nvml.nvmlDeviceGetCount()) if not name.startswith(SLICE) else ():
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        if str(asked(nvml, "nvmlDeviceGetUUID", gpu)).startswith(name):
            return gpu
    return nvml.nvmlDeviceGetHandleByUUID(name)


def memory_used(nvml: Any, gpu: Any) -> int | None:
    """Bytes in use on a GPU, without what the driver reserves for itself; null where the GPU has
    no memory of its own to tell of."""
    memory = asked(nvml, "nvmlDeviceGetMemoryInfo", gpu, nvml.nvmlMemory_v2)
    memory = memory or asked(nvml, "nvmlDeviceGetMemoryInfo", gpu)  # a driver before R510
    return None if memory is None else int(memory.used)


def cuda_version(nvml: Any) -> str | None:
    """The newest CUDA that the driver runs, as `12.4`. It is that of the `libcuda` which a process
    of this environment would load, so a forward-compatibility package counts."""
    version = asked(nvml, "nvmlSystemGetCudaDriverVersion_v2")
    version = version or asked(nvml, "nvmlSystemGetCudaDriverVersion")
    return f"{version // 1000}.{version % 1000 // 10}" if version else None
