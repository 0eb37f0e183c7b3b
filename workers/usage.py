"""From stamps to utilisation: how much of the device's peaks a trial used.

The forward passes of a timed batch are read off the stamps: up to the last request's
first token the engine prefills, after it every step decodes one token of each request
that is not done. Steps that do both (long prompts in chunks) belong to neither phase, so
that no phase is charged with the other's time. What a pass had to read and compute comes
from `workers.moe.accounting`; sums over all timed passes are divided, never ratios averaged
(MoE-CAP Eq 6).

Timed passes carry no probe, so the experts that ran are not known here: unless a trace is
given, the expectation under uniform routing stands in, and the record says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from workers.contract.measurement import Pass
from workers.contract.trial import Trial
from workers.hardware.device import CPU, Device
from workers.moe.accounting import Slice, prefill
from workers.moe.precision import precision
from workers.moe.structure import Architecture
from workers.moe.utilisation import Observed, Peaks, decode_utilisation, utilisation


def columns(
    trial: Trial, a: Architecture, timed: Sequence[Pass], device: Device | None
) -> dict[str, Any]:
    """Peaks and utilisations as columns of a record; null where there is no telling.

    Null, too, with speculative decoding (a pass then feeds drafts, and a second model reads
    its own weights) and for encoder-decoders.

    Args:
        trial: what was asked for.
        a: structure that ran.
        timed: its timed passes.
        device: what one device can do; null where that is not known.
    """
    if device is None:
        return {}
    layout = trial.layout
    try:
        stored = precision(a, trial.model, kv_cache_dtype=trial.engine.args.get("kv_cache_dtype"))
    except ValueError:
        return {}
    tflops = device.tflops(stored.compute)
    found: dict[str, Any] = {
        "kv_cache_dtype": stored.kv_dtype,
        "peak_bandwidth_gb_s": device.bandwidth_gb_s,
        "peak_tflops": tflops,
        "peak_source": _peak_source(device),
    }
    if not a.exact or a.params_encoder or trial.engine.speculative is not None:
        return found
    # The ranks of a CPU layout share one machine.
    ranks = layout.devices if device.name == CPU else 1
    peaks = Peaks(bandwidth_gb_s=device.bandwidth_gb_s / ranks, tflops=tflops / ranks)
    if all(_lockstep(one) for one in timed):
        used = decode_utilisation(
            a,
            stored,
            layout,
            peaks,
            batch=-(-timed[0].batch_size // layout.data),
            input_tokens=timed[0].input_tokens,
            output_tokens=len(timed[0].token_s[0]),
            seconds=sum(one.e2e_s - _prefilled_s(one) for one in timed) / len(timed),
        )
    else:
        passes = [observed for one in timed for observed in decodes(one)]
        used = utilisation(a, stored, layout, peaks, passes)
    first = utilisation(
        a, stored, layout, peaks, [observed for one in timed for observed in prefills(one)]
    )
    found |= {
        "mbu": used.mbu,
        "mfu": used.mfu,
        "s_mbu": used.s_mbu,
        "s_mbu_paper": used.s_mbu_paper,
        "s_mfu": used.s_mfu,
        "prefill_s_mbu": first.s_mbu,
        "prefill_s_mfu": first.s_mfu,
    }
    if used.s_mbu is not None or first.s_mbu is not None:
        found["activation_source"] = "uniform" if a.moe else "dense"
    return found


def prefills(one: Pass) -> list[Observed]:
    """The passes that fed prompts; none where decode steps were mixed in.

    Prompts count where they end: one that was cut into chunks is one pass as long as all
    of them, so the weights that its earlier chunks read again are left out.
    """
    prefilled = _prefilled_s(one)
    if any(len(row) > 1 and row[1] <= prefilled for row in one.token_s):
        return []
    ends = sorted(Counter(row[0] for row in one.token_s).items())
    starts = [0.0, *(end for end, _ in ends)]
    return [
        Observed(slices=prefill(count, one.input_tokens), latency_s=end - start, activated=None)
        for start, (end, count) in zip(starts, ends, strict=False)
    ]


def decodes(one: Pass) -> list[Observed]:
    """The passes after the last request's first token, in which every request decodes."""
    prefilled = _prefilled_s(one)
    alike: dict[float, Counter[int]] = {}
    for row in one.token_s:
        for index, stamp in enumerate(row):
            if stamp > prefilled:
                # The pass that yields token `index` feeds the token before it.
                alike.setdefault(stamp, Counter())[one.input_tokens + index - 1] += 1
    ends = sorted(alike)
    return [
        Observed(slices=_slices(alike[end].items()), latency_s=end - start, activated=None)
        for start, end in pairwise([prefilled, *ends])
    ]


def _peak_source(device: Device) -> str:
    return "calibrated" if device.name == CPU else "catalogue"


def _slices(states: Iterable[tuple[int, int]]) -> tuple[Slice, ...]:
    return tuple(Slice(sequences=count, new=1, context=context) for context, count in states)


def _prefilled_s(one: Pass) -> float:
    return max(row[0] for row in one.token_s)


def _lockstep(one: Pass) -> bool:
    """Whether every request got every token after the first in the same step as the others,
    and none before the last first token."""
    first = one.token_s[0][1:]
    prefilled = _prefilled_s(one)
    return all(row[1:] == first for row in one.token_s) and (not first or first[0] > prefilled)
