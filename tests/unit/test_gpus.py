"""What is asked of NVML and made of its answers, with a library of our own in its place."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from workers.hardware.gpus import Gpus


class _Refused(Exception):
    pass


class _Nvml:
    """Two GPUs; whatever is in `refused` is not answered."""

    NVMLError = _Refused
    NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
    NVML_TEMPERATURE_GPU = 0
    NVML_PERF_POLICY_THERMAL = 1

    def __init__(self, *refused: str) -> None:
        self._refused = refused
        self.open = 0
        self.throttled_ns = {0: 0, 1: 0}
        self.processes = {0: [(10, 2**30)], 1: [(11, 2**30)]}
        self._answers: dict[str, Callable[..., Any]] = {
            "nvmlDeviceGetClockInfo": lambda gpu, kind: 1000 * kind - gpu,
            "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 1980 * kind,
            "nvmlDeviceGetApplicationsClock": lambda gpu, kind: 1500 if kind == 0 else 2600,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x4 if gpu else 0x40,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x8,
            "nvmlDeviceGetViolationStatus": lambda gpu, policy: SimpleNamespace(
                violationTime=self.throttled_ns[gpu]
            ),
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 60 + gpu,
            "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 500_000 + gpu,
            "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: 700_000,
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [
                SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes[gpu]
            ],
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda name: int(name[-1]),
            "nvmlDeviceGetCount": lambda: 2,
        }

    def nvmlInit(self) -> None:
        if "nvmlInit" in self._refused:
            raise _Refused
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in self._refused:

            def refuse(*args: Any) -> Any:
                raise _Refused

            return refuse
        try:
            return self._answers[name]
        except KeyError:
            raise AttributeError(name) from None


def test_of_several_gpus_the_worst_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = _Nvml()
    gpus = Gpus.open(2, nvml)
    assert gpus is not None
    before = gpus.throttled_s()
    nvml.throttled_ns[1] = 250_000_000
    nvml.processes[1].append((99, 3 * 2**30))
    found = gpus.reading({10, 11}, before)
    assert (found.sm_clock_mhz, found.sm_clock_asked_mhz) == (999, 1500)
    assert (found.memory_clock_mhz, found.memory_clock_asked_mhz) == (1999, 2600)
    assert found.throttle_reasons == ("HwThermalSlowdown", "SwPowerCap")
    assert found.throttled_s == pytest.approx(0.25)
    assert (found.temperature_c, found.power_limit_w, found.power_limit_default_w) == (61, 500, 700)
    assert (found.other_processes, found.other_memory_bytes) == (1, 3 * 2**30)
    gpus.close()
    assert nvml.open == 0


def test_what_nvml_does_not_answer_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    every = [name for name in _Nvml()._answers if "Handle" not in name and "Count" not in name]
    gpus = Gpus.open(1, _Nvml(*every))
    assert gpus is not None
    found = gpus.reading({10}, gpus.throttled_s())
    assert all(getattr(found, name) is None for name in found.__dataclass_fields__)


def test_older_libraries_and_gpus_without_application_clocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,0")
    events = "nvmlDeviceGetCurrentClocksEventReasons"
    gpus = Gpus.open(1, _Nvml(events, "nvmlDeviceGetApplicationsClock"))
    assert gpus is not None
    found = gpus.reading({11}, gpus.throttled_s())
    assert found.throttle_reasons == ("HwSlowdown",)
    assert (found.sm_clock_asked_mhz, found.temperature_c) == (1980, 61), "the one named first"


def test_in_a_container_one_of_the_unknown_processes_is_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = _Nvml()
    gpus = Gpus.open(1, nvml)
    assert gpus is not None
    nvml.processes[0] = [(70001, 9 * 2**30)]
    assert gpus.reading({7}, gpus.throttled_s()).other_processes == 0
    nvml.processes[0].append((70002, 2**30))
    found = gpus.reading({7}, gpus.throttled_s())
    assert (found.other_processes, found.other_memory_bytes) == (1, 2**30)
    nvml.processes[0] = [(7, 9 * 2**30), (70002, None)]
    hidden = gpus.reading({7}, gpus.throttled_s())
    assert (hidden.other_processes, hidden.other_memory_bytes) == (1, None)


def test_without_a_driver_or_a_gpu_there_is_nothing_to_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Gpus.open(1, _Nvml("nvmlInit")) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    nvml = _Nvml()
    assert Gpus.open(1, nvml) is None
    assert nvml.open == 0
