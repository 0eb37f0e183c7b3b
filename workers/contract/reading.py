"""What the machine said of itself while a pass ran, before anybody judges it.

A pass that shared its cores, its memory's bandwidth or its GPU with a stranger is as slow as
they made it, and its stamps alone do not tell. So the operating system's counters are read
right before and right after each pass, outside its stamps, and kept beside them: a doubt about
the verdict (`workers.disturbance`) never needs the machine again.

Whatever the machine does not tell is null. Seconds of several threads or cores add up, so they
can exceed the time that passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """The GPUs of an engine, as NVML tells it: of several the worst."""

    sm_clock_mhz: float | None = None
    """Clock of the multiprocessors; of several GPUs the lowest."""
    sm_clock_asked_mhz: float | None = None
    """What it should be: as set for applications where that is set, else its maximum."""
    memory_clock_mhz: float | None = None
    """Clock of the memory; of several GPUs the lowest."""
    memory_clock_asked_mhz: float | None = None
    """What it should be."""
    throttle_reasons: tuple[str, ...] | None = None
    """Why clocks are held down on any of them, in NVML's words; empty: no reason."""
    throttled_s: float | None = None
    """Time for which heat held clocks down during the pass, of the one with most."""
    temperature_c: float | None = None
    """Of the hottest."""
    power_limit_w: float | None = None
    """Limit in force; of several GPUs the lowest."""
    power_limit_default_w: float | None = None
    """Limit that they come with."""
    other_processes: int | None = None
    """Processes on them that are none of the engine's."""
    other_memory_bytes: int | None = None
    """Memory that those hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One pass, or several added up."""

    wall_s: float
    """Time between the two looks at the counters."""
    cores: int | None = None
    """Cores that the engine's threads computed on."""
    machine_cores: int | None = None
    """Cores of the machine."""
    own_cpu_s: float | None = None
    """Time on a core, all threads of the engine together."""
    run_delay_s: float | None = None
    """Time in which they could have run and did not, all threads together."""
    involuntary_switches: int | None = None
    """Times that one of them had to leave a core."""
    others_cpu_s: float | None = None
    """Time that all other programs had on the cores of the engine."""
    elsewhere_cpu_s: float | None = None
    """Time that they had on the machine's other cores."""
    steal_s: float | None = None
    """Time for which the hypervisor gave the engine's cores to another machine."""
    pressure_s: float | None = None
    """Time in which any task of the machine waited for a core (PSI, `some`)."""
    throttled_s: float | None = None
    """Time for which a quota held the engine's control group back; null without a quota."""
    frequency_mhz: float | None = None
    """Clock of the engine's cores at the end, mean."""
    gpu: GpuReading | None = None
    """Null without a GPU."""
    check_s: float = 0.0
    """What both looks cost, outside the pass."""


def columns(reading: Reading | None) -> dict[str, Any]:
    """A reading as columns of `samples`; nothing without one."""
    if reading is None:
        return {}
    told: dict[str, Any] = {
        one.name: getattr(reading, one.name) for one in fields(reading) if one.name != "gpu"
    }
    if reading.gpu is not None:
        told |= {f"gpu_{one.name}": getattr(reading.gpu, one.name) for one in fields(reading.gpu)}
        memory = told.pop("gpu_other_memory_bytes")
        told["gpu_other_memory_gib"] = None if memory is None else memory / 2**30
    return told


def total(readings: Iterable[Reading | None]) -> Reading | None:
    """Passes added up; what any of them lacks is null, and clocks and GPUs are left out. Null
    without a reading, or where a pass has none."""
    all_of_them = list(readings)
    there = [one for one in all_of_them if one is not None]
    if not there or len(there) < len(all_of_them):
        return None

    def added(name: str) -> Any:
        values = [getattr(one, name) for one in there]
        return None if any(value is None for value in values) else sum(values)

    return Reading(
        wall_s=added("wall_s"),
        cores=max((one.cores for one in there if one.cores is not None), default=None),
        machine_cores=there[0].machine_cores,
        own_cpu_s=added("own_cpu_s"),
        run_delay_s=added("run_delay_s"),
        involuntary_switches=added("involuntary_switches"),
        others_cpu_s=added("others_cpu_s"),
        elsewhere_cpu_s=added("elsewhere_cpu_s"),
        steal_s=added("steal_s"),
        pressure_s=added("pressure_s"),
        throttled_s=added("throttled_s"),
        check_s=added("check_s"),
    )
