"""Stands for `nvidia-ml-py` where a test puts this folder on the path: GPUs as a file tells them.

`FAKE_NVML` names a JSON file, read at each `nvmlInit`, so that a test can change it under a run:

    {"driver": "570.86.15", "cuda": 12080, "gpus": [{"uuid": "GPU-a", …}]}

Keys of a GPU: uuid, name, used_mib, total_mib, mig (mode), compute and graphics (pid → MiB, null
where NVML does not say), slices (UUIDs of MIG slices). `programs` are the names of processes. What
is not there is not answered, and without the file there is no driver. Only what this project asks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_NVLINK_MAX_LINKS = 18
NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
NVML_TEMPERATURE_GPU = 0
NVML_PERF_POLICY_THERMAL = 1
nvmlMemory_v2 = 2

_state: dict[str, Any] = {}


class NVMLError(Exception):
    """Every refusal."""


def nvmlInit() -> None:
    path = os.environ.get("FAKE_NVML")
    if path is None:
        raise NVMLError("Driver Not Loaded")
    _state.update(json.loads(Path(path).read_text()))


def nvmlShutdown() -> None:
    _state.clear()


def nvmlSystemGetDriverVersion() -> str:
    return str(_told(_state, "driver"))


def nvmlSystemGetCudaDriverVersion_v2() -> int:
    return int(_told(_state, "cuda"))


def nvmlSystemGetProcessName(pid: int) -> str:
    return str(_told(_state.get("programs", {}), str(pid)))


def nvmlDeviceGetCount() -> int:
    return len(_state["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:
    if index >= len(_state["gpus"]):
        raise NVMLError("Invalid Argument")
    gpu: dict[str, Any] = _state["gpus"][index]
    return gpu


def nvmlDeviceGetHandleByUUID(uuid: str) -> dict[str, Any]:
    for gpu in _state["gpus"]:
        if gpu["uuid"] == uuid:
            return dict(gpu)
        if uuid in gpu.get("slices", ()):
            return {"uuid": uuid, "name": f"{gpu['name']} MIG 1g.10gb", "slice": True}
    raise NVMLError("Not Found")


def nvmlDeviceGetUUID(gpu: dict[str, Any]) -> str:
    return str(_told(gpu, "uuid"))


def nvmlDeviceGetName(gpu: dict[str, Any]) -> str:
    return str(_told(gpu, "name"))


def nvmlDeviceGetMemoryInfo(gpu: dict[str, Any], version: int | None = None) -> Any:
    total, used = _told(gpu, "total_mib"), gpu.get("used_mib", 0)
    return SimpleNamespace(total=total * 2**20, used=used * 2**20)


def nvmlDeviceGetMigMode(gpu: dict[str, Any]) -> list[int]:
    return [int(_told(gpu, "mig"))] * 2


def nvmlDeviceIsMigDeviceHandle(gpu: dict[str, Any]) -> int:
    return int("slice" in gpu)


def nvmlDeviceGetComputeRunningProcesses(gpu: dict[str, Any]) -> list[Any]:
    return _processes(gpu, "compute")


def nvmlDeviceGetGraphicsRunningProcesses(gpu: dict[str, Any]) -> list[Any]:
    return _processes(gpu, "graphics")


def _processes(gpu: dict[str, Any], kind: str) -> list[Any]:
    return [
        SimpleNamespace(pid=int(pid), usedGpuMemory=None if size is None else size * 2**20)
        for pid, size in _told(gpu, kind).items()
    ]


def _told(facts: dict[str, Any], key: str) -> Any:
    if facts.get(key) is None:
        raise NVMLError("Not Supported")
    return facts[key]


def __getattr__(name: str) -> Any:
    """Whatever else is asked of a device is not known to it."""
    if not name.startswith("nvmlDevice"):
        raise AttributeError(name)

    def refuse(*_: Any) -> Any:
        raise NVMLError("Not Supported")

    return refuse
