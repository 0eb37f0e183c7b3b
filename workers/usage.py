"""From stamps to utilisation: how much of the device's peaks a trial used.

The forward passes of a timed batch are read off the stamps: up to the last request's
first token the engine prefills, after it every step decodes one token of each request
that is not done. Steps that do both (long prompts in chunks) belong to neither phase, so
that no phase is charged with the other's time. Data-parallel replicas are put in step first
(`in_step`). What a pass had to read and compute comes
from `workers.moe.accounting`; sums over all timed passes are divided, never ratios averaged
(MoE-CAP Eq 6).

Timed passes carry no probe. Where a probe has replayed some of them, the experts that ran are
known pass by pass, and those of timed passes that it did not replay are taken to be as many
as in the mean of those that it did. Where a trial asks for an activation sheet, every pass of
a phase takes the sheet's mean; without one that fits, what needs it is null. Otherwise an
expectation stands in, under uniform routing or under the one that the sweep forced. The record
says which it was.

A peak that was measured here may have been measured too low. A pass that would have used more than
all of it shows that, and what is taken against it is then no share of anything: `sound` leaves it
out. Only shares that cannot be above 1 show it, those of what a pass really read and computed;
`mbu` and `mfu` count experts that were never touched and may be above 1 on any device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from workers.contract.measurement import Pass
from workers.contract.probed import PHASES, Phase, Probed
from workers.contract.shares import AGAINST, CALIBRATED, DISTURBED
from workers.contract.trace import Step, Trace
from workers.contract.trial import Trial
from workers.hardware.device import CPU, Device
from workers.moe.accounting import Slice, prefill
from workers.moe.partial import Partial
from workers.moe.precision import precision
from workers.moe.sheets import Sheet, spread
from workers.moe.skew import expected_distinct, inclusion, parse, probabilities
from workers.moe.structure import Architecture
from workers.moe.utilisation import (
    Observed,
    Peaks,
    Utilisation,
    decode_utilisation,
    utilisation,
)

INTERPOLATED = "sheet-interpolated"
"""`activation_source` of a batch between two that were probed."""


def columns(
    trial: Trial,
    a: Architecture | Partial,
    timed: Sequence[Pass],
    device: Device | None,
    probed: Probed | None = None,
    sheet: Sheet | None = None,
) -> dict[str, Any]:
    """Peaks and utilisations as columns of a record; null where there is no telling.

    Those that need the experts that ran are null where a sweep asks for a sheet and there is none.

    Null, too, with speculative decoding (a pass then feeds drafts, and a second model reads
    its own weights), for encoder-decoders, and where the structure cannot be told.

    Args:
        trial: what was asked for.
        a: structure that ran.
        timed: its timed passes.
        device: what one device can do; null where that is not known.
        probed: which experts ran in some of the timed passes.
        sheet: how many ran in an earlier probe, for a trial that asks for it.
    """
    if isinstance(a, Partial):
        return {}
    traces = probed.traces if probed is not None else {}
    told = _activation(probed) if probed is not None and traces else {}
    if sheet is not None:
        told = _of_sheet(sheet)
    return told | _utilisations(trial, a, timed, device, traces, sheet)


def contradictions(found: Mapping[str, Any]) -> list[str]:
    """Where columns of a record go beyond a peak that was measured, in words."""
    return [words for _, words in _contradicted(found)]


def sound(found: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Columns without what is taken against a peak that they go beyond, and why that is missing."""
    kept, reasons = dict(found), []
    for names, words in _contradicted(found):
        kept |= dict.fromkeys(names & kept.keys())
        reasons.append(f"{words}: such a peak is none, so what is taken against it is not known")
    return kept, "; ".join(reasons) or None


def _contradicted(found: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    """Columns taken against a measured peak that one of them goes beyond, and which does."""
    if found.get("peak_source") not in (CALIBRATED, DISTURBED):
        return
    for one in AGAINST:
        shares = {name: share for name in one.bounded if (share := found.get(name)) is not None}
        if beyond := [name for name, share in shares.items() if share > 1]:
            name = max(beyond, key=shares.__getitem__)
            peak = f"{found[one.peak]:.3g} {one.unit}"
            yield {*one.columns}, f"{name} would be {shares[name]:.2f} of the {peak} measured"


def _utilisations(
    trial: Trial,
    a: Architecture,
    timed: Sequence[Pass],
    device: Device | None,
    traces: Mapping[int, Trace],
    sheet: Sheet | None,
) -> dict[str, Any]:
    if device is None:
        return {}
    layout = trial.layout
    timed = [in_step(one, layout.data) for one in timed]
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
            batch=timed[0].batch_size,
            input_tokens=timed[0].input_tokens,
            output_tokens=len(timed[0].token_s[0]),
            seconds=sum(one.e2e_s - _prefilled_s(one) for one in timed) / len(timed),
        )
    else:
        passes = [observed for one in timed for observed in decodes(one)]
        used = utilisation(a, stored, layout, peaks, passes)
    prompts = [observed for one in timed for observed in prefills(one)]
    traced = _traced(a, timed, traces, decodes, "decode")
    by_sheet = trial.measure.activation == "sheet" and a.moe is not None
    uniform, expectation = used, "uniform"
    if traced is None and not by_sheet and a.moe and trial.engine.routing not in (None, "uniform"):
        expectation = "routing"
        passes = [observed for one in timed for observed in decodes(one)]
        used = utilisation(a, stored, layout, peaks, _forced(trial, a, passes))
        prompts = _forced(trial, a, prompts)
    elif traced is not None:
        used = utilisation(a, stored, layout, peaks, traced)
        prompts = _traced(a, timed, traces, prefills, "prefill") or prompts
    first = utilisation(a, stored, layout, peaks, prompts)
    if by_sheet:
        ran = _stored(timed, decodes, sheet.decode if sheet is not None else None)
        fed = _stored(timed, prefills, sheet.prefill if sheet is not None else None)
        used = utilisation(a, stored, layout, peaks, ran) if ran else _unknown(used)
        first = utilisation(a, stored, layout, peaks, fed) if fed else _unknown(first)
    found |= {
        "mbu": used.mbu,
        "mfu": used.mfu,
        "s_mbu": used.s_mbu,
        "s_mbu_paper": used.s_mbu_paper,
        "s_mfu": used.s_mfu,
        "prefill_s_mbu": first.s_mbu,
        "prefill_s_mfu": first.s_mfu,
    }
    if by_sheet:
        found["s_mbu_uniform"] = uniform.s_mbu
        if sheet is not None and (used.s_mbu is not None or first.s_mbu is not None):
            found["activation_source"] = "sheet" if sheet.between is None else INTERPOLATED
        return found
    if used.s_mbu is not None or first.s_mbu is not None:
        found["activation_source"] = expectation if a.moe else "dense"
    if traced is not None:
        found |= {"activation_source": "traced", "s_mbu_uniform": uniform.s_mbu}
    return found


def _forced(trial: Trial, a: Architecture, passes: Sequence[Observed]) -> list[Observed]:
    """Passes with the experts that the routing of the sweep is expected to touch."""
    if not (a.num_experts and a.top_k and trial.engine.routing):
        return list(passes)
    skew, moe = parse(trial.engine.routing), sum(layer.experts is not None for layer in a.layers)
    chances = inclusion(probabilities(skew, a.num_experts), a.top_k).chances
    tokens = [sum(one.sequences * one.new for one in this.slices) for this in passes]
    numbers = expected_distinct(chances, tokens)
    return [
        replace(this, activated=spread(a, [float(number)] * moe))
        for this, number in zip(passes, numbers, strict=True)
    ]


def _activation(probed: Probed) -> dict[str, Any]:
    """How many experts ran, in the mean over passes of a phase and over MoE layers."""
    traces = probed.traces.values()
    found: dict[str, Any] = {
        "traced_passes": len(traces),
        "activation_settled": probed.settled,
    }
    for phase in PHASES:
        seen = [step.activated for step in steps_of(traces, phase)]
        if seen:
            found[f"activated_experts_{phase}"] = float(np.mean(seen))
    return found


def _of_sheet(sheet: Sheet) -> dict[str, Any]:
    """The same as a sheet has it, and where that comes from."""
    return {
        "activation_sheet": sheet.source,
        "activation_settled": sheet.settled,
        "activated_experts_decode": sheet.mean(sheet.decode),
        "activated_experts_prefill": sheet.mean(sheet.prefill),
    }


def _stored(
    timed: Sequence[Pass],
    observed: Callable[[Pass], list[Observed]],
    numbers: Sequence[float] | None,
) -> list[Observed]:
    """Passes of a phase with the experts of a sheet; none without it."""
    if numbers is None:
        return []
    return [replace(this, activated=numbers) for one in timed for this in observed(one)]


def _unknown(used: Utilisation) -> Utilisation:
    """Without the shares that need the experts that ran."""
    return replace(used, s_mbu=None, s_mbu_paper=None)


def _traced(
    a: Architecture,
    timed: Sequence[Pass],
    traces: Mapping[int, Trace],
    observed: Callable[[Pass], list[Observed]],
    phase: Phase,
) -> list[Observed] | None:
    """Passes of a phase with the experts that ran in them; null where none can be told.

    A timed pass takes those of its own trace, forward pass by forward pass, if both made as
    many; the mean otherwise.
    """
    seen = [step.activated for step in steps_of(traces.values(), phase)]
    if not seen:
        return None
    mean = spread(a, np.mean(seen, axis=0).tolist())
    found = []
    for one in timed:
        passes = observed(one)
        steps = steps_of([traces[one.repeat]], phase) if one.repeat in traces else []
        own = [spread(a, step.activated.tolist()) for step in steps]
        if len(own) != len(passes):
            own = [mean] * len(passes)
        found += [replace(this, activated=ran) for this, ran in zip(passes, own, strict=True)]
    return found


def steps_of(traces: Iterable[Trace], phase: Phase) -> list[Step]:
    """Forward passes of prefill: those in which no request decoded; of decoding: those after the
    last that fed a prompt."""
    found: list[Step] = []
    for trace in traces:
        if phase == "prefill":
            found += [step for step in trace.steps if not step.decoding.any()]
        else:
            prompts = [at for at, step in enumerate(trace.steps) if not step.decoding.all()]
            found += trace.steps[prompts[-1] + 1 :] if prompts else trace.steps
    return found


def in_step(one: Pass, replicas: int) -> Pass:
    """A pass of data-parallel replicas with the stamps of all of them put in step.

    Request i ran on replica i modulo `replicas`. The k-th stamp of any of them becomes that of
    the last of them, so that the forward passes of all count as one that the whole batch shares.
    Replicas that exchange tokens are hardly apart; of others it is the slowest one's time.
    """
    if replicas == 1:
        return one
    own = [
        sorted({stamp for row in one.token_s[rank::replicas] for stamp in row})
        for rank in range(replicas)
    ]
    shared = [max(stamps) for stamps in zip_longest(*own, fillvalue=0.0)]
    at = [dict(zip(stamps, shared, strict=False)) for stamps in own]
    return replace(
        one,
        token_s=tuple(
            tuple(at[index % replicas][stamp] for stamp in row)
            for index, row in enumerate(one.token_s)
        ),
    )


def tokens_per_pass(timed: Sequence[Pass], phase: Phase) -> float | None:
    """Tokens of a forward pass of that phase, on average; null where there was none.

    Unlike `prefills` it counts every pass that fed a part of a prompt.
    """
    tokens, passes = 0.0, 0
    for one in timed:
        if phase == "decode" and _lockstep(one):
            steps = len(one.token_s[0]) - 1
            tokens, passes = tokens + steps * one.batch_size, passes + steps
        elif phase == "decode":
            found = decodes(one)
            tokens += sum(part.sequences for this in found for part in this.slices)
            passes += len(found)
        elif prefills(one):
            tokens += one.batch_size * one.input_tokens
            passes += sum(stamp <= _prefilled_s(one) for stamp in one.step_s)
    return tokens / passes if passes else None


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
    if device.name != CPU:
        return "catalogue"
    return CALIBRATED if device.verified else DISTURBED


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
