"""What this machine's device really reaches: `python -m workers.engines.calibrate`.

Two peaks decide how long a forward pass must take: how fast memory is read and how fast
matrices are multiplied. Both are measured as an engine would meet them, with torch and with
the engine's threads, each pinned to a core. Memory is read in arrays that no cache can hold
(a virtual machine may see a last-level cache of hundreds of MiB), products are large, and
the best of many repeats counts: whatever disturbs a repeat only makes it slower. How far
the median stays behind is kept beside it. A neighbour on the same physical core can slow a
virtual machine for minutes without being seen, so `--store` adds to what is kept: the best
of all runs is the peak.

On a GPU the same patterns and products run, timed by CUDA events.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import psutil

from workers import memory
from workers.hardware import peaks
from workers.hardware.caches import cache_bytes
from workers.hardware.contention import between, snapshot
from workers.hardware.cpu import processor
from workers.hardware.host import Host, describe
from workers.hardware.peaks import Calibration
from workers.output import command

Kind = Literal["cpu", "cuda"]
Work = Callable[[], object]

_ROUNDS = 3
"""Everything is measured in turn, this often: a neighbour's burst of a second or two then
spoils some repeats of each thing rather than all repeats of one."""
_ARRAY_BYTES = 2 * 2**30
_CACHES = 4
_SHARE_OF_FREE = 4
"""The array is `_ARRAY_BYTES` or `_CACHES` times the caches, within this part of free memory."""
_ROW = 4096
_TRAFFIC_S = 0.25
_PRODUCT_S = {"bf16": 0.35, "fp32": 0.2}
_OTHER_S = 0.1
"""Time for the repeats of one pattern, one shape of a product, anything else: all rounds."""
_SMALL = 512
_SHAPES: dict[Kind, tuple[tuple[int, int, int], ...]] = {
    "cpu": ((4096, 1024, 1024), (2048, 2048, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192)),
}
"""Rows, inner and columns of the products. One of `_SMALL` tells first whether they are
worth their time."""
_TINY = 64
_TINY_CALLS = 200


class Impossible(RuntimeError):
    """The measurement asked for cannot run here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """Something to time again and again."""

    name: str
    amount: float
    """Bytes moved, operations done or calls made by one run."""
    work: Work
    budget_s: float
    taken: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Amount per second of the fastest run."""
        return self.amount / min(self.taken)

    @property
    def spread(self) -> float:
        """How far the median run stays below the fastest, as a share of it."""
        return 1 - min(self.taken) / statistics.median(self.taken)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 if the measurement fails, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m workers.engines.calibrate")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: every core")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument(
        "--store", action="store_true", help="add it to what is kept for this machine"
    )
    asked = parser.parse_args(arguments)
    try:
        memory.unlimit()  # an engine that asks has bounded its own memory, and a child inherits it
        cores = _claim(asked.threads)
        host = describe()
        kind: Kind = asked.device or ("cuda" if host.gpus else "cpu")
        host = processor(host) if kind == "cpu" else host
        found = measure(host, kind, cores)
        if asked.store:
            found = peaks.store(found, host)
    except Impossible as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: the calibration failed: {error}", file=sys.stderr)
        return 1
    print(found.dumps() if asked.json else "\n".join(_lines(found)))
    return 0


def measure(host: Host, kind: Kind, cores: Sequence[int]) -> Calibration:
    """Calibrates the device of `host`, which is this machine, with a thread on each of `cores`.

    Raises:
        Impossible: torch is missing, or has no CUDA where `kind` asks for it.
    """
    torch = _torch(kind, len(cores))
    start, before = time.perf_counter(), snapshot([os.getpid()], cores)
    clock = _cuda_seconds if kind == "cuda" else _cpu_seconds
    size, traffic = _traffic(torch, kind, cores)
    products = _products(torch, kind)
    calls = _calls(torch, kind)
    tasks = [*traffic, *products, calls]
    for number in range(_ROUNDS):
        for task in tasks:
            _repeat(torch, task, clock, warm=number > 0)
    fastest: dict[str, _Task] = {}
    for task in tasks:
        if task.name not in fastest or task.best > fastest[task.name].best:
            fastest[task.name] = task
    patterns = {task.name: fastest[task.name].best / 1e9 for task in traffic}
    seen = between(before, snapshot([os.getpid()], cores))
    on_cpu = kind == "cpu"  # who has the cores says nothing of a GPU
    return Calibration(
        device=host.device,
        device_digest=host.device_digest,
        kind=kind,
        threads=len(cores),
        torch_version=host.torch_version or str(torch.__version__),
        bandwidth_gb_s=max(patterns.values()),
        patterns_gb_s=patterns,
        array_gib=size / 2**30,
        tflops={task.name: fastest[task.name].best / 1e12 for task in products},
        overhead_s=1 / calls.best,
        spread={name: task.spread for name, task in fastest.items()},
        others=seen.others if on_cpu else None,
        stolen=seen.stolen if on_cpu else None,
        waiting=seen.waiting if on_cpu else None,
        runs=1,
        measured_at=time.time(),
        seconds=time.perf_counter() - start,
    )


def _claim(threads: int | None) -> list[int]:
    """The cores to measure with; torch, once imported, will pin a thread to each.

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
    return cores


def _torch(kind: Kind, threads: int) -> Any:
    try:
        import torch
    except ImportError as error:
        raise Impossible(
            f"torch is not installed or cannot be imported ({error}); calibration measures "
            "with the library that the engine computes with"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise Impossible(f"torch {torch.__version__} finds no CUDA device; try --device cpu")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch


def _traffic(torch: Any, kind: Kind, cores: Sequence[int]) -> tuple[int, list[_Task]]:
    """Bytes of the array, and the access patterns over it.

    A read is timed as a sum and as a matrix-vector product, which is what decoding one
    token is; the faster counts.
    """
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        caches = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        free, caches = psutil.virtual_memory().available, cache_bytes(cores)
    size = min(max(_ARRAY_BYTES, _CACHES * caches), free // _SHARE_OF_FREE)
    rows = max(1, size // (4 * 6 * _ROW)) * 6  # divides into halves and thirds
    array = torch.ones(rows, _ROW, dtype=torch.float32, device=kind)
    row = torch.ones(_ROW, dtype=torch.float32, device=kind)
    half, (a, b, c) = rows // 2, array.split(rows // 3)
    patterns: list[tuple[str, Work]] = [
        ("read", array.sum),
        ("read", lambda: torch.mv(array, row)),
        ("copy", lambda: array[:half].copy_(array[half:])),
        ("triad", lambda: torch.add(b, c, alpha=0.5, out=a)),
    ]
    return array.nbytes, [
        _Task(name=name, amount=array.nbytes, work=work, budget_s=_TRAFFIC_S)
        for name, work in patterns
    ]


def _products(torch: Any, kind: Kind) -> list[_Task]:
    """Large matrix products in every data type that this device and this torch multiply."""
    tasks = []
    for dtype in ("bf16", "fp32", "fp16", "int8", "fp8"):
        if dtype == "fp8" and kind == "cpu":  # CPU engines unpack FP8 weights to BF16
            continue
        budget = _PRODUCT_S.get(dtype, _OTHER_S)
        try:
            small = _product(torch, kind, dtype, (_SMALL, _SMALL, _SMALL), budget)
            clock = _cuda_seconds if kind == "cuda" else _cpu_seconds
            _repeat(torch, small, clock, warm=False)
            large = [
                _product(torch, kind, dtype, shape, budget)
                for shape in _SHAPES[kind]
                if 2.0 * math.prod(shape) / small.best < budget
            ]
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            if dtype == "bf16":  # had everywhere, and needed
                raise
            print(f"{dtype} is left out: {error}", file=sys.stderr)
            continue
        tasks += large or [small]
    return tasks


def _product(
    torch: Any, kind: Kind, dtype: str, shape: tuple[int, int, int], budget_s: float
) -> _Task:
    """A matrix product in `dtype`, ready to run."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=kind)
    right = torch.randn(columns, inner, device=kind)
    work: Work
    if dtype == "fp8":
        a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=kind)
        # Sums in fewer bits, as the kernels of engines and the figures of data sheets have them.
        # Without it a Hopper adds in FP32 outside of its tensor cores, which costs it a good part.
        work = partial(
            torch._scaled_mm, a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    elif dtype == "int8":
        work = partial(torch._int_mm, left.to(torch.int8), right.to(torch.int8).t())
    else:
        to = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        out = torch.empty(rows, columns, dtype=to, device=kind)
        work = partial(torch.mm, left.to(to), right.t().contiguous().to(to), out=out)
    return _Task(name=dtype, amount=2.0 * math.prod(shape), work=work, budget_s=budget_s)


def _calls(torch: Any, kind: Kind) -> _Task:
    """Linear layers with next to nothing to compute, many in a row."""
    weight = torch.ones(_TINY, _TINY, dtype=torch.bfloat16, device=kind)
    one = torch.ones(1, _TINY, dtype=torch.bfloat16, device=kind)

    def work() -> None:
        for _ in range(_TINY_CALLS):
            torch.nn.functional.linear(one, weight)

    return _Task(name="overhead", amount=_TINY_CALLS, work=work, budget_s=_OTHER_S)


def _repeat(torch: Any, task: _Task, clock: Callable[[Any, Work], float], *, warm: bool) -> None:
    """Times one round of `task`, at least once, after a run that does not count."""
    if not warm:
        clock(torch, task.work)
    deadline = time.perf_counter() + task.budget_s / _ROUNDS
    task.taken.append(clock(torch, task.work))
    while time.perf_counter() < deadline:
        task.taken.append(clock(torch, task.work))


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


def _lines(found: Calibration) -> Iterator[str]:
    """The calibration as a person reads it."""
    yield f"{found.device}, {found.threads} threads, torch {found.torch_version}"
    for name, rate in found.patterns_gb_s.items():
        yield f"  {name:<9}{rate:10.1f} GB/s    median {found.spread[name]:.0%} below"
    for name, rate in found.tflops.items():
        yield f"  {name:<9}{rate:10.3f} TFLOPS  median {found.spread[name]:.0%} below"
    yield f"  overhead {found.overhead_s * 1e6:10.1f} µs of a tiny linear layer"
    yield (
        f"  over {found.array_gib:.1f} GiB, in {found.seconds:.1f} s; {found.disturbance()}; "
        f"best of {found.runs} run{'s' * (found.runs > 1)}"
    )
    if not found.quiet:
        yield "  no run was quiet, so these are no verified peaks: run it again"


if __name__ == "__main__":
    command(main)
