"""What NVML says of the GPUs of an engine around a pass.

A GPU slows down on its own (heat), on order (power limits, application clocks) and for others
(processes beside the engine). NVML tells of all three. Its library stays open for the engine's
life, and what cannot change meanwhile is asked once. Every question may be refused (MIG slices,
consumer cards, old drivers): the answer is then null.

The library is an argument, so that all of this can be tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

from workers.contract.reading import GpuReading
from workers.hardware import nvml as library

REASONS = {
    0x1: "GpuIdle",
    0x2: "ApplicationsClocksSetting",
    0x4: "SwPowerCap",
    0x8: "HwSlowdown",
    0x10: "SyncBoost",
    0x20: "SwThermalSlowdown",
    0x40: "HwThermalSlowdown",
    0x80: "HwPowerBrakeSlowdown",
    0x100: "DisplayClockSetting",
}
"""NVML's bits of `nvmlClocksEventReasons`, and what they stand for."""
_CURRENT_REASONS = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
)
"""The question, and what older libraries call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gpu:
    """One GPU and what does not change."""

    handle: Any
    sm_asked_mhz: float | None
    memory_asked_mhz: float | None
    power_default_w: float | None


class Gpus:
    """GPUs of one engine."""

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        """Use `Gpus.open`."""
        self._nvml = nvml
        self._gpus = [
            _Gpu(
                handle=one,
                sm_asked_mhz=self._asked_mhz(one, nvml.NVML_CLOCK_GRAPHICS, nvml.NVML_CLOCK_SM),
                memory_asked_mhz=self._asked_mhz(one, nvml.NVML_CLOCK_MEM, nvml.NVML_CLOCK_MEM),
                power_default_w=_over(
                    self._ask("nvmlDeviceGetPowerManagementDefaultLimit", one), 1000
                ),
            )
            for one in handles
        ]

    @classmethod
    def open(cls, count: int, nvml: ModuleType | Any | None = None) -> Self | None:
        """The first `count` GPUs that this process may use; null without a driver or a GPU.

        Args:
            count: devices of the engine.
            nvml: what answers; by default pynvml.
        """
        if nvml is None:
            import pynvml

            nvml = pynvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        try:
            handles = [library.handle(nvml, name) for name in library.visible(nvml)[:count]]
        except nvml.NVMLError:
            handles = []
        if not handles:
            nvml.nvmlShutdown()
            return None
        return cls(nvml, handles)

    def close(self) -> None:
        """Gives the library back."""
        self._nvml.nvmlShutdown()

    def throttled_s(self) -> list[float | None]:
        """Of each GPU, for how long heat has held its clocks down since the driver began."""
        policy = self._nvml.NVML_PERF_POLICY_THERMAL
        told = [self._ask("nvmlDeviceGetViolationStatus", gpu.handle, policy) for gpu in self._gpus]
        return [None if one is None else one.violationTime / 1e9 for one in told]

    def reading(self, own: Collection[int], before: Sequence[float | None]) -> GpuReading:
        """What is to be said right after a pass.

        Args:
            own: processes of the engine.
            before: `throttled_s` right before the pass.
        """
        nvml = self._nvml
        names = [self._reasons(gpu.handle) for gpu in self._gpus]
        told = [one for one in names if one is not None]
        pairs = zip(before, self.throttled_s(), strict=True)
        throttled = [b - a for a, b in pairs if a is not None and b is not None]
        processes = [self._others(gpu.handle, own) for gpu in self._gpus]
        others = [one for one in processes if one is not None]
        sizes = [one.usedGpuMemory for found in others for one in found]
        return GpuReading(
            sm_clock_mhz=self._worst(min, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            sm_clock_asked_mhz=_extreme(min, (gpu.sm_asked_mhz for gpu in self._gpus)),
            memory_clock_mhz=self._worst(min, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            memory_clock_asked_mhz=_extreme(min, (gpu.memory_asked_mhz for gpu in self._gpus)),
            throttle_reasons=tuple(sorted({name for one in told for name in one}))
            if told
            else None,
            throttled_s=_extreme(max, throttled),
            temperature_c=self._worst(max, "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power_limit_w=_over(self._worst(min, "nvmlDeviceGetEnforcedPowerLimit"), 1000),
            power_limit_default_w=_extreme(min, (gpu.power_default_w for gpu in self._gpus)),
            other_processes=sum(map(len, others)) if others else None,
            other_memory_bytes=sum(sizes) if others and None not in sizes else None,
        )

    def _ask(self, question: str, *args: Any) -> Any:
        """NVML's answer; null where it has none."""
        return library.asked(self._nvml, question, *args)

    def _worst(self, choose: Any, question: str, *args: Any) -> float | None:
        return _extreme(choose, (self._ask(question, gpu.handle, *args) for gpu in self._gpus))

    def _asked_mhz(self, handle: Any, set_for: int, kind: int) -> float | None:
        """The clock set for applications, else the highest there is."""
        asked = self._ask("nvmlDeviceGetApplicationsClock", handle, set_for)
        return _over(asked or self._ask("nvmlDeviceGetMaxClockInfo", handle, kind), 1)

    def _reasons(self, handle: Any) -> list[str] | None:
        for question in _CURRENT_REASONS:
            bits = self._ask(question, handle)
            if bits is not None:
                return [name for bit, name in REASONS.items() if bits & bit]
        return None

    def _others(self, handle: Any, own: Collection[int]) -> list[Any] | None:
        """Processes that compute on a GPU beside the engine.

        A container sees process ids of its host there, among which its own are not found. One
        of them is then the engine's: the one with most memory.
        """
        found = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
        if found is None:
            return None
        others = [one for one in found if one.pid not in own]
        if len(others) == len(found):
            others = sorted(others, key=lambda one: one.usedGpuMemory or 0)[:-1]
        return others


def _over(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def _extreme(choose: Any, values: Iterable[float | None]) -> float | None:
    """The lowest or the highest; null where any is not told."""
    found = list(values)
    return None if not found or None in found else float(choose(found))
