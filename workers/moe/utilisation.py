"""How much of the hardware's peaks a measured pass used.

MoE-CAP's sparsity-aware metrics count what a pass needs instead of what the model has: only
the experts that its tokens were routed to. Every figure here is a ratio of sums over
passes (its Eq 6), never a mean of ratios, and is null where there was nothing to measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from workers.contract.layout import Layout
from workers.moe.accounting import SINGLE, Cost, Slice, decode_total, forward, weight_bytes
from workers.moe.precision import Precision
from workers.moe.structure import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """What one device can do at most, dense, in the type computed in."""

    bandwidth_gb_s: float
    tflops: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """One forward pass as measured."""

    slices: tuple[Slice, ...]
    """Of one data-parallel replica; a mixed pass has prefill and decode slices together."""
    latency_s: float
    activated: Sequence[float] | None = None
    """Distinct routed experts per layer over the whole batch; null where not traced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilisation:
    """Shares of peaks; null where no pass was measured."""

    mbu: float | None
    """(S_model + S_KV) / time over peak bandwidth: as if every weight were read."""
    mfu: float | None
    """2 FLOPs per parameter and token, and scores: as if every expert computed."""
    s_mbu: float | None
    """Every byte that the pass must read, on every device that reads it."""
    s_mbu_paper: float | None
    """Eq 4: attention, activated and shared experts, dense FFNs, KV cache; each byte once."""
    s_mfu: float | None
    """Eq 5: attention, router, top-k and shared experts, dense FFNs."""


def utilisation(
    a: Architecture,
    precision: Precision,
    layout: Layout,
    peaks: Peaks,
    passes: Iterable[Observed],
) -> Utilisation:
    """Utilisation of all devices of `layout` over measured passes."""
    seconds = 0.0
    needed, read, tokens, count = Cost(), 0.0, 0, 0
    for one in passes:
        whole = tuple(replace(s, sequences=s.sequences * layout.data) for s in one.slices)
        needed += forward(a, precision, whole, activated=one.activated).total
        read += (
            layout.tensor
            * layout.data
            * sum(
                forward(
                    a, precision, one.slices, activated=one.activated, layout=layout, stage=stage
                ).total.read_bytes
                for stage in range(layout.pipeline)
            )
        )
        tokens += sum(s.sequences * s.new for s in whole)
        seconds += one.latency_s
        count += 1
    return _shares(a, precision, layout, peaks, needed, read, tokens, count, seconds)


def decode_utilisation(
    a: Architecture,
    precision: Precision,
    layout: Layout,
    peaks: Peaks,
    *,
    batch: int,
    input_tokens: int,
    output_tokens: int,
    seconds: float,
) -> Utilisation:
    """Utilisation of the `output_tokens - 1` decode passes of a uniform batch.

    `batch` is that of one data-parallel replica, `seconds` the time of all those passes;
    the experts activated are the expectation under uniform routing.
    """
    needed = decode_total(a, precision, batch * layout.data, input_tokens, output_tokens)
    read = (
        layout.tensor
        * layout.data
        * sum(
            decode_total(
                a, precision, batch, input_tokens, output_tokens, layout=layout, stage=stage
            ).read_bytes
            for stage in range(layout.pipeline)
        )
    )
    steps = output_tokens - 1
    tokens = batch * layout.data * steps
    return _shares(a, precision, layout, peaks, needed, read, tokens, steps, seconds)


def practical_bandwidth_gb_s(needed_bytes: float, seconds: float, s_mbu: float) -> float:
    """Peak bandwidth that reads `needed_bytes` in `seconds` at that S-MBU (Eq 7), GB/s."""
    return needed_bytes / seconds / s_mbu / 1e9


def practical_tflops(needed_flops: float, seconds: float, s_mfu: float) -> float:
    """Peak compute that does `needed_flops` in `seconds` at that S-MFU (Eq 8), TFLOP/s."""
    return needed_flops / seconds / s_mfu / 1e12


def _shares(
    a: Architecture,
    precision: Precision,
    layout: Layout,
    peaks: Peaks,
    needed: Cost,
    read: float,
    tokens: int,
    passes: int,
    seconds: float,
) -> Utilisation:
    if passes < 1 or seconds <= 0:
        return Utilisation(mbu=None, mfu=None, s_mbu=None, s_mbu_paper=None, s_mfu=None)
    movable = layout.devices * peaks.bandwidth_gb_s * 1e9 * seconds
    computable = layout.devices * peaks.tflops * 1e12 * seconds
    model = passes * weight_bytes(a, precision, SINGLE)
    return Utilisation(
        mbu=(model + needed.kv_read_bytes) / movable,
        mfu=(2 * a.params_total * tokens + needed.score_flops) / computable,
        s_mbu=read / movable,
        s_mbu_paper=(needed.active_bytes_paper + needed.kv_read_bytes) / movable,
        s_mfu=needed.flops_paper / computable,
    )
