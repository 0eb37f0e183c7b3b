"""This machine's CPU as a device.

No data sheet tells what a virtual machine was given, so its peaks are measured: read back
from the calibration of this machine where there is one, else estimated with numpy in about
half a second. The engine computes in BF16 with kernels of its own, so the estimate orders a
plan and feeds an ETA, and is no peak to take a utilisation against.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

from workers.hardware import facts, peaks
from workers.hardware.caches import cache_bytes
from workers.hardware.device import CPU, Device
from workers.hardware.host import Host, cores, cpu_name, describe

_LEAST_BYTES = 256 * 2**20
_SHARE_OF_MEMORY = 8
_SIDE = 1024
_REPEATS = 3


def processor(host: Host) -> Host:
    """`host` as if it had no GPU: what a calibration of its CPU is kept under."""
    return replace(
        host,
        device=f"{cpu_name()}, {host.cpus} cores",
        device_class=CPU,
        gpus=0,
        device_facts=facts.dumps(facts.of_cpu()),
    )


def cpu() -> Device:
    """This machine's CPU, for an engine on all the cores that this process may use."""
    found = peaks.stored(_here())
    if found is None:
        return _estimate()
    day = datetime.fromtimestamp(found.measured_at, UTC).date()
    rates = _reachable(found.tflops)
    return replace(
        _device(found.bandwidth_gb_s, rates["bf16"]),
        source=f"best of {found.runs} calibrations with torch, the last on {day}, "
        f"{found.threads} threads; {found.disturbance()}",
        verified=found.quiet,
        fp16_tflops=rates.get("fp16"),
        fp32_tflops=rates.get("fp32"),
        int8_tflops=rates.get("int8"),
    )


def _reachable(tflops: Mapping[str, float]) -> dict[str, float]:
    """Rates by data type that a kernel can reach: at least that of FP32.

    On a CPU without instructions for a narrower type torch multiplies it one number at a time (BF16
    at under a seventieth of FP32 on an EPYC 7003), while an engine unpacks it and multiplies it in
    FP32.
    """
    return {dtype: max(rate, tflops.get("fp32", 0.0)) for dtype, rate in tflops.items()}


@cache
def _here() -> Host:
    return processor(describe())


@cache
def _estimate() -> Device:
    """With numpy: a read over more than the caches hold, a single-precision product."""
    import numpy as np
    import psutil

    threads = cores()
    room = psutil.virtual_memory().available // _SHARE_OF_MEMORY
    share = min(max(_LEAST_BYTES, 2 * cache_bytes()), room) // threads // 8
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the GIL inside a sum
        blocks = list(pool.map(lambda _: np.ones(share), range(threads)))
        read_s = _fastest(lambda: list(pool.map(np.sum, blocks)))
    square = np.ones((_SIDE, _SIDE), dtype=np.float32)
    rate = 2 * _SIDE**3 / _fastest(lambda: square @ square) / 1e12
    return replace(
        _device(threads * share * 8 / read_s / 1e9, rate),
        source="quick estimate with numpy, BF16 taken at the rate of FP32; "
        "python -m workers.engines.calibrate --store measures both",
        fp32_tflops=rate,
    )


def _device(bandwidth_gb_s: float, bf16_tflops: float) -> Device:
    import psutil

    memory = psutil.virtual_memory().total
    return Device(
        name=CPU,
        kind="cpu",
        source="measured",
        verified=False,
        bandwidth_gb_s=bandwidth_gb_s,
        bf16_tflops=bf16_tflops,
        memory_gb=memory / 1e9,
        memory_gib=memory / 2**30,
    )


def _fastest(work: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
