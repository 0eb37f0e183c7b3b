"""A short load of fixed work, run before and after a group: how fast is the machine just now?

The same grid took 4 min 37 s on one day and 10 min 54 s on another, on quiet machines of one kind,
and within a run neighbouring groups differed by more than their intervals. Intervals cannot show
that: the repeats of a group share its minutes. So before a group's first pass and after its last
one every rank of the engine reads memory and multiplies matrices, always as much, with the threads
that it computes on, and the rates go into each record of the group. Records whose rates agree were
made on an equally fast machine; where they do not, the machine drifted, and not what was measured.

The load stays well below a second, takes its memory before the model has any (it counts neither
into a memory limit nor into a peak), and is no peak: a calibration searches the best that a device
can do, this tells what it did in a moment. On CPUs the product is in FP32, which every CPU has
kernels for: BF16 without its instructions takes seconds. On GPUs it is in BF16.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast one kind of work went."""

    median: float
    """Of its repeats, per second."""
    spread: float
    """From the first to the third quartile of the repeats, as a share of the median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What the load reached, by all ranks of an engine together."""

    bandwidth_gb_s: Rate
    """Reading memory, 10⁹ bytes per second."""
    tflops: Rate
    """A matrix product, 10¹² operations per second."""


def rate(amount: float, seconds: Sequence[float]) -> Rate:
    """Of repeats that did `amount` each.

    Raises:
        ValueError: fewer than two repeats, which tell of no spread.
    """
    if len(seconds) < 2:
        raise ValueError("a rate needs two repeats")
    rates = [amount / one for one in seconds]
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return Rate(median=median, spread=(high - low) / median)


def together(ranks: Sequence[Reference | None]) -> Reference | None:
    """What ranks reached that worked at the same time; null if one of them tells nothing."""
    known = [one for one in ranks if one is not None]
    if not known or len(known) < len(ranks):
        return None
    return Reference(
        bandwidth_gb_s=_sum([one.bandwidth_gb_s for one in known]),
        tflops=_sum([one.tflops for one in known]),
    )


def _sum(rates: Sequence[Rate]) -> Rate:
    return Rate(median=sum(one.median for one in rates), spread=max(one.spread for one in rates))


def columns(before: Reference | None, after: Reference | None) -> dict[str, float]:
    """Columns of a record; without those that are not known."""
    found: dict[str, float] = {}
    for figure in ("bandwidth_gb_s", "tflops"):
        known = {
            moment: getattr(one, figure)
            for moment, one in (("before", before), ("after", after))
            if one is not None
        }
        found |= {f"reference_{figure}_{moment}": one.median for moment, one in known.items()}
        if known:
            short = figure.removesuffix("_gb_s")
            found[f"reference_{short}_spread"] = max(one.spread for one in known.values())
    return found
