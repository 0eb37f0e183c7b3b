"""What a class of device can do, and which class is in hand.

A profile of a sweep names such a class. GPUs are looked up in the catalogue by the name
their driver gives; one that is not there is an error that says how to add it, because a
guessed peak makes every utilisation wrong. A CPU has no data sheet that a guest can
trust, so its peaks are measured on the spot (a large read, a large matrix product).
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

CPU = "cpu"


class UnknownDevice(ValueError):
    """A device class that the catalogue does not hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Peaks of one device of a class."""

    name: str
    """Class, as profiles name it."""
    bandwidth_gb_s: float
    """Memory bandwidth, 10⁹ bytes per second."""
    bf16_tflops: float
    """Dense BF16 peak, 10¹² FLOP per second."""
    memory_gib: float
    """Memory, GiB."""
    rebuild_s: float
    """Rough time to build an engine apart from its weights, for the plan's ETA."""
    load_gib_s: float
    """Rough rate at which weights come up, GiB per second, for the plan's ETA."""
    step_s: float
    """Rough time of a forward pass that moves nothing, for the plan's ETA."""


def names() -> tuple[str, ...]:
    """Every class and alias that a profile may name."""
    return (CPU, *(name for entry in _catalogue() for name in _spellings(entry)))


def device(name: str) -> Device:
    """The device class called `name`; for `cpu`, this machine's own, measured.

    Raises:
        UnknownDevice: with what is known and how to add one.
    """
    if name == CPU:
        return _measured_cpu()
    for entry, facts in _catalogue().items():
        if name in _spellings(entry):
            return Device(
                name=entry,
                bandwidth_gb_s=facts["bandwidth_gb_s"],
                bf16_tflops=facts["bf16_tflops"],
                memory_gib=facts["memory_gb"] * 1e9 / 2**30,
                rebuild_s=60.0,
                load_gib_s=2.0,
                step_s=1e-3,
            )
    raise UnknownDevice(
        f"unknown device class {name!r}: known are {', '.join(names())}; "
        "others are added in workers/hardware/catalog/devices.yaml"
    )


def classify(driver_name: str) -> str | None:
    """The class of the device that its driver calls `driver_name`; null if unknown."""
    matches = [
        (len(prefix), entry)
        for entry, facts in _catalogue().items()
        for prefix in facts.get("detect", ())
        if driver_name.startswith(prefix)
    ]
    return max(matches)[1] if matches else None


def _spellings(entry: str) -> tuple[str, ...]:
    return (entry, *_catalogue()[entry].get("aliases", ()))


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    import yaml

    text = (resources.files("workers.hardware") / "catalog" / "devices.yaml").read_text()
    return dict(yaml.safe_load(text))


@cache
def _measured_cpu() -> Device:
    """Read bandwidth and single-precision product of this process, in about 0.3 s.

    The engine computes in BF16 with its own kernels, so this orders a plan and feeds an
    ETA; it is no peak for a utilisation.
    """
    import numpy as np
    import psutil

    block = np.ones(2**24, dtype=np.float64)
    read_s = _fastest(lambda: block.sum())
    side = 1024
    square = np.ones((side, side), dtype=np.float32)
    product_s = _fastest(lambda: square @ square)
    return Device(
        name=CPU,
        bandwidth_gb_s=block.nbytes / read_s / 1e9 * _cores(),
        bf16_tflops=2 * side**3 / product_s / 1e12,
        memory_gib=psutil.virtual_memory().total / 2**30,
        rebuild_s=4.0,
        load_gib_s=0.2,
        step_s=4e-3,
    )


def _fastest(work: Any, times: int = 3) -> float:
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _cores() -> int:
    return len(os.sched_getaffinity(0))
