"""How much of the hardware's peaks a measured pass used.

MoE-CAP's sparsity-aware metrics count what a pass needs instead of what the model has: only
the experts that its tokens were routed to. Every figure here is a ratio of sums over
passes (its Eq 6), never a mean of ratios, and is null where there was nothing to measure.

With dynamic batching (its A.3) one pass feeds prompts and generated tokens together. Eq 6 sums
over forward passes whatever they feed, and so does `traced_utilisation`: a mixed pass counts once,
with its whole time, an expert that both kinds of tokens chose is read once, and every request
reads the cache of its own length. Records keep prefill and decode apart instead and leave mixed
passes out of both (`workers.usage`), since there is no telling which of the two took the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from workers.contract.layout import Layout
from workers.contract.trace import Step, Trace
from workers.moe.accounting import SINGLE, Cost, Slice, decode_total, forward, weight_bytes
from workers.moe.precision import Precision
from workers.moe.sheets import spread
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
    """Of the whole batch, of all data-parallel replicas together; a mixed pass has prefill and
    decode slices."""
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
    needed, read, tokens, count = Cost(), 0.0, 0.0, 0
    for one in passes:
        share = tuple(replace(s, sequences=s.sequences / layout.data) for s in one.slices)
        needed += forward(a, precision, one.slices, activated=one.activated).total
        read += (
            layout.tensor
            * layout.data
            * sum(
                forward(
                    a, precision, share, activated=one.activated, layout=layout, stage=stage
                ).total.read_bytes
                for stage in range(layout.pipeline)
            )
        )
        tokens += sum(s.sequences * s.new for s in one.slices)
        seconds += one.latency_s
        count += 1
    return _shares(a, precision, layout, peaks, needed, read, tokens, count, seconds)


def traced_utilisation(
    a: Architecture,
    precision: Precision,
    layout: Layout,
    peaks: Peaks,
    trace: Trace,
    *,
    seconds: Sequence[float] | None = None,
) -> Utilisation:
    """Utilisation over every pass of a traced batch, mixed ones included (Eq 6 as printed).

    Args:
        a: structure that ran.
        precision: how it is stored.
        layout: devices that it ran on.
        peaks: of one of them.
        trace: of a batch whose prompts and outputs may be of any lengths.
        seconds: of each pass, where they were timed without the probe; null takes the trace's
            own, which have the probe's cost in them and leave sampling out.

    Raises:
        ValueError: not a time per pass.
        SheetError: a trace of another structure.
    """
    times = [step.seconds for step in trace.steps] if seconds is None else list(seconds)
    if len(times) != len(trace.steps):
        raise ValueError(f"{len(times)} times for {len(trace.steps)} passes")
    passes = [
        Observed(
            slices=slices_of(step),
            latency_s=time,
            activated=spread(a, step.activated.tolist()),
        )
        for step, time in zip(trace.steps, times, strict=True)
    ]
    return utilisation(a, precision, layout, peaks, passes)


def slices_of(step: Step) -> tuple[Slice, ...]:
    """What a traced pass was fed: requests that stand at the same point together."""
    alike = Counter(zip(step.new.tolist(), step.context.tolist(), strict=True))
    return tuple(
        Slice(sequences=count, new=new, context=context) for (new, context), count in alike.items()
    )


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

    `batch` is that of all data-parallel replicas together, `seconds` the time of all those
    passes; the experts activated are the expectation under uniform routing.
    """
    needed = decode_total(a, precision, batch, input_tokens, output_tokens)
    read = (
        layout.tensor
        * layout.data
        * sum(
            decode_total(
                a,
                precision,
                batch / layout.data,
                input_tokens,
                output_tokens,
                layout=layout,
                stage=stage,
            ).read_bytes
            for stage in range(layout.pipeline)
        )
    )
    steps = output_tokens - 1
    tokens = batch * steps
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
    tokens: float,
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
