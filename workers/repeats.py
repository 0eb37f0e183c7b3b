"""How many passes a trial gets, and which of them its figures are of.

A disturbed pass is made up for by another, within a budget: a machine that is never quiet would
otherwise never be done. What counts are the quiet passes; where too few came, those that were
disturbed least fill up, and the record says so. A pass in full and the one of one token before it
come in pairs but are judged each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workers.contract.measure import Measure
from workers.contract.measurement import Pass, PassKind
from workers.disturbance import Verdict, of_passes, of_record
from workers.metrics import interval

CHEAP_S = 0.5
"""Passes beyond `measure.repeats` that together take less than this are always made, where
`measure.extra_repeats` does not say how many: those of milliseconds are disturbed most easily,
right after an engine and Ray have started, and another costs nothing."""


def enough(measure: Measure, passes: Sequence[Pass]) -> bool:
    """The stop rule of `Measure`, counting passes that were not disturbed.

    `measure.repeats` are always made. While fewer than that were quiet, or all together were
    disturbed, up to `measure.most_extra` more are, or as many as take `CHEAP_S`, and only as long
    as the next is expected to end within `measure.timeout_s`.
    """
    verdicts = of_passes(passes)
    timed = _quiet(passes, verdicts, "timed")
    quiet = min(len(timed), len(_quiet(passes, verdicts, "one_token")))
    made = sum(one.kind == "timed" for one in passes)
    disturbed = any(
        verdict.disturbed and one.kind != "warmup"
        for one, verdict in zip(passes, verdicts, strict=True)
    )
    if made < measure.repeats:
        return False
    if disturbed and not _time_for_more(measure, passes, made):
        return True
    if quiet < measure.repeats and disturbed:
        return made >= measure.repeats + measure.most_extra and not _cheap(measure, passes, made)
    if _cheap(measure, passes, made) and of_record(settled(measure, passes)).disturbed:
        return False
    if measure.ci_width is None or len(timed) >= measure.most_repeats:
        return True
    if made >= measure.most_repeats + measure.most_extra:
        return True
    return interval([one.e2e_s for one in timed]).width <= measure.ci_width


def settled(measure: Measure, passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes with the verdict on each, and whether the record's figures are of it."""
    verdicts = of_passes(passes)
    counting = {
        id(one)
        for kind in ("one_token", "timed")
        for one in _counting(measure, passes, verdicts, kind)
    }
    return tuple(
        replace(
            one,
            disturbed=verdict.disturbed,
            disturbed_reason=verdict.reason,
            counted=one.kind == "warmup" or id(one) in counting,
        )
        for one, verdict in zip(passes, verdicts, strict=True)
    )


def _quiet(passes: Sequence[Pass], verdicts: Sequence[Verdict], kind: PassKind) -> list[Pass]:
    pairs = zip(passes, verdicts, strict=True)
    return [one for one, verdict in pairs if one.kind == kind and not verdict.disturbed]


def _counting(
    measure: Measure, passes: Sequence[Pass], verdicts: Sequence[Verdict], kind: PassKind
) -> list[Pass]:
    """The quiet passes of a kind; below `measure.repeats` with those disturbed least."""
    quiet = _quiet(passes, verdicts, kind)
    pairs = zip(passes, verdicts, strict=True)
    rest = [
        (verdict.weight, at)
        for at, (one, verdict) in enumerate(pairs)
        if one.kind == kind and verdict.disturbed
    ]
    lacking = max(0, measure.repeats - len(quiet))
    return quiet + [passes[at] for _, at in sorted(rest)[:lacking]]


def _cheap(measure: Measure, passes: Sequence[Pass], made: int) -> bool:
    """Whether the passes beyond `measure.repeats` took next to no time."""
    if measure.extra_repeats is not None:
        return False
    busy = sum(one.e2e_s for one in passes if one.kind != "warmup")
    return busy * (made + 1 - measure.repeats) / made < CHEAP_S


def _time_for_more(measure: Measure, passes: Sequence[Pass], made: int) -> bool:
    """Whether another pair of passes is expected to end before the trial's deadline."""
    busy = sum(one.e2e_s for one in passes)
    return busy + busy / made <= measure.timeout_s
