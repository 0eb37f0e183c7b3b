"""What this machine's device really reaches: `python -m workers.engines.calibrate`.

Two peaks decide how long a forward pass must take: how fast memory is read and how fast
matrices are multiplied. Both are measured as an engine would meet them, with torch and with
the engine's threads, each pinned to a core. Memory is read in arrays that no cache can hold
(a virtual machine may see a last-level cache of hundreds of MiB), products are large, and
the best of many repeats counts: whatever disturbs a repeat only makes it slower. How far
the median stays behind is kept beside it.

On a GPU the same patterns and products run, timed by CUDA events.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from workers.hardware import peaks
from workers.hardware.cpu import cache_bytes, processor
from workers.hardware.host import Host, describe
from workers.hardware.peaks import Calibration

Kind = Literal["cpu", "cuda"]
Work = Callable[[], object]

_ARRAY_BYTES = 2 * 2**30
_CACHES = 4
_SHARE_OF_FREE = 4
"""The array is `_ARRAY_BYTES` or `_CACHES` times the caches, within this part of free memory."""
_ROW = 4096
_BUDGET_S = {"read": 0.4, "copy": 0.3, "triad": 0.3, "bf16": 0.3, "fp32": 0.2, "fp16": 0.1}
"""Time for the repeats of one pattern, or of one shape of a product; else `_OTHER_S`."""
_OTHER_S = 0.15
_LEAST_REPEATS = 3
_MOST_REPEATS = 100
_SHAPES: dict[Kind, tuple[tuple[int, int, int], ...]] = {
    "cpu": ((256, 256, 256), (1024, 1024, 1024), (4096, 1024, 1024), (2048, 2048, 2048)),
    "cuda": ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192)),
}
"""Rows, inner and columns of the products, the small one first: it tells whether the next
is worth its time."""
_TINY = 64
_TINY_CALLS = 400


class Impossible(RuntimeError):
    """The measurement asked for cannot run here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seconds:
    """Repeats of one thing."""

    best: float
    median: float

    @property
    def spread(self) -> float:
        """How far the median rate stays below the best, as a share of the best."""
        return 1 - self.best / self.median


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 if the measurement fails, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m workers.engines.calibrate")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: every core")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--store", action="store_true", help="keep it for this machine")
    asked = parser.parse_args(arguments)
    threads = _claim(asked.threads)
    host = describe()
    kind: Kind = asked.device or ("cuda" if host.gpus else "cpu")
    if kind == "cpu":
        host = processor(host)
    try:
        found = measure(host, kind, threads)
        if asked.store:
            peaks.store(found, host)
    except Impossible as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: the calibration failed: {error}", file=sys.stderr)
        return 1
    print(found.dumps() if asked.json else "\n".join(_lines(found)))
    return 0


def measure(host: Host, kind: Kind, threads: int) -> Calibration:
    """Calibrates the device of `host`, which is this machine.

    Raises:
        Impossible: torch is missing, or has no CUDA where `kind` asks for it.
    """
    torch = _torch(kind, threads)
    start = time.perf_counter()
    array_bytes, patterns = _patterns(torch, kind)
    products = _products(torch, kind)
    overhead = _overhead(torch, kind)
    found = patterns | products
    rates = {name: work / seconds.best for name, (work, seconds) in found.items()}
    traffic = {name: rates[name] / 1e9 for name in patterns}
    return Calibration(
        device=host.device,
        kind=kind,
        threads=threads,
        torch_version=host.torch_version or str(torch.__version__),
        bandwidth_gb_s=max(traffic.values()),
        patterns_gb_s=traffic,
        array_gib=array_bytes / 2**30,
        tflops={name: rates[name] / 1e12 for name in products},
        overhead_s=overhead.best,
        spread={name: seconds.spread for name, (_, seconds) in found.items()}
        | {"overhead": overhead.spread},
        measured_at=time.time(),
        seconds=time.perf_counter() - start,
    )


def _claim(threads: int | None) -> int:
    """Takes that many cores and has torch, once imported, pin a thread to each.

    An engine leaves its process bound to the first of its cores, and a child inherits
    that; so where more are asked for than are there, all are asked back first.
    """
    if threads and threads > len(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, range(os.cpu_count() or threads))
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.environ["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in cores)
    os.environ["OMP_PROC_BIND"] = "true"
    return len(cores)


def _torch(kind: Kind, threads: int) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise Impossible("torch is not installed: calibration measures with the engine's library")
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise Impossible(f"torch {torch.__version__} finds no CUDA device; try --device cpu")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch


def _patterns(torch: Any, kind: Kind) -> tuple[int, dict[str, tuple[float, _Seconds]]]:
    """Bytes of the array; bytes moved and time taken by access pattern.

    A read is timed as a sum and as a matrix-vector product, which is what decoding one
    token is; the faster counts.
    """
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        caches = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        import psutil

        free, caches = psutil.virtual_memory().available, cache_bytes()
    size = min(max(_ARRAY_BYTES, _CACHES * caches), free // _SHARE_OF_FREE)
    rows = size // (4 * 6 * _ROW) * 6  # divides into halves and thirds
    array = torch.ones(rows, _ROW, dtype=torch.float32, device=kind)
    size = array.nbytes
    row = torch.ones(_ROW, dtype=torch.float32, device=kind)
    lower, upper = array[: rows // 2], array[rows // 2 :]
    a, b, c = array.split(rows // 3)
    reads = [
        _repeat(torch, kind, "read", work) for work in (array.sum, lambda: torch.mv(array, row))
    ]
    copy = _repeat(torch, kind, "copy", lambda: lower.copy_(upper))
    triad = _repeat(torch, kind, "triad", lambda: torch.add(b, c, alpha=0.5, out=a))
    return size, {
        "read": (size, min(reads, key=lambda seconds: seconds.best)),
        "copy": (size, copy),
        "triad": (size, triad),
    }


def _products(torch: Any, kind: Kind) -> dict[str, tuple[float, _Seconds]]:
    """Operations and time of the fastest large product by data type."""
    found: dict[str, tuple[float, _Seconds]] = {}
    for dtype in ("bf16", "fp32", "fp16", "int8", "fp8"):
        for operations, seconds in _rising(torch, kind, dtype):
            if dtype not in found or operations / seconds.best > _rate(found[dtype]):
                found[dtype] = operations, seconds
    return found


def _rising(torch: Any, kind: Kind, dtype: str) -> Iterator[tuple[float, _Seconds]]:
    """Products of growing size, until one would take too long or cannot be done."""
    rate = 0.0
    budget = _BUDGET_S.get(dtype, _OTHER_S)
    for rows, inner, columns in _SHAPES[kind]:
        operations = 2.0 * rows * inner * columns
        if rate and operations / rate * _LEAST_REPEATS > 3 * budget:
            continue
        try:
            work = _product(torch, kind, dtype, rows, inner, columns)
            if work is None:
                return
            seconds = _repeat(torch, kind, dtype, work)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            # This device, or this torch, has no such product; BF16 is had everywhere.
            if dtype == "bf16":
                raise
            print(f"{dtype} is left out: {error}", file=sys.stderr)
            return
        rate = operations / seconds.best
        yield operations, seconds


def _product(
    torch: Any, kind: Kind, dtype: str, rows: int, inner: int, columns: int
) -> Work | None:
    """A matrix product in `dtype`, ready to run; null where an engine has no use for it."""
    if dtype == "fp8":
        if kind == "cpu":  # CPU engines unpack FP8 weights to BF16
            return None
        left = torch.ones(rows, inner, device=kind).to(torch.float8_e4m3fn)
        right = torch.ones(columns, inner, device=kind).to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=kind)
        return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)
    if dtype == "int8":
        left = torch.ones(rows, inner, dtype=torch.int8, device=kind)
        right = torch.ones(columns, inner, dtype=torch.int8, device=kind).t()
        return lambda: torch._int_mm(left, right)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    left = torch.randn(rows, inner, device=kind).to(kinds[dtype])
    right = torch.randn(inner, columns, device=kind).to(kinds[dtype])
    out = torch.empty(rows, columns, dtype=kinds[dtype], device=kind)
    return lambda: torch.mm(left, right, out=out)


def _overhead(torch: Any, kind: Kind) -> _Seconds:
    """Time of one linear layer with next to nothing to compute, in a row of many."""
    weight = torch.ones(_TINY, _TINY, dtype=torch.bfloat16, device=kind)
    one = torch.ones(1, _TINY, dtype=torch.bfloat16, device=kind)

    def calls() -> None:
        for _ in range(_TINY_CALLS):
            torch.nn.functional.linear(one, weight)

    row = _repeat(torch, kind, "overhead", calls)
    return _Seconds(best=row.best / _TINY_CALLS, median=row.median / _TINY_CALLS)


def _repeat(torch: Any, kind: Kind, name: str, work: Work) -> _Seconds:
    """Times `work` again and again within its budget, after one run that does not count."""
    clock = _cuda_seconds if kind == "cuda" else _cpu_seconds
    clock(torch, work)
    deadline = time.perf_counter() + _BUDGET_S.get(name, _OTHER_S)
    taken: list[float] = []
    while len(taken) < _LEAST_REPEATS or (
        len(taken) < _MOST_REPEATS and time.perf_counter() < deadline
    ):
        taken.append(clock(torch, work))
    return _Seconds(best=min(taken), median=statistics.median(taken))


def _cpu_seconds(_: Any, work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(torch: Any, work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _rate(found: tuple[float, _Seconds]) -> float:
    operations, seconds = found
    return operations / seconds.best


def _lines(found: Calibration) -> Iterator[str]:
    """The calibration as a person reads it."""
    yield f"{found.device}, {found.threads} threads, torch {found.torch_version}"
    for name, rate in found.patterns_gb_s.items():
        yield f"  {name:<9}{rate:10.1f} GB/s    median {found.spread[name]:.0%} below"
    for name, rate in found.tflops.items():
        yield f"  {name:<9}{rate:10.3f} TFLOPS  median {found.spread[name]:.0%} below"
    yield f"  overhead {found.overhead_s * 1e6:10.1f} µs of a tiny linear layer"
    yield f"  over {found.array_gib:.1f} GiB, in {found.seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
