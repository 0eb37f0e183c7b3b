"""Logarithmic axes: one whose pixels are known before it is drawn, since names are placed by
them, and one of counts that double from point to point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import altair as alt


def doublings(low: float, high: float) -> alt.Scale:
    """From `low` to `high` by doublings; where `low` is 0 (a dense model has no active expert),
    even up to 1 and by doublings above it."""
    if low > 0:
        return alt.Scale(type="log", base=2, domain=[low, high], nice=False)
    return alt.Scale(type="symlog", constant=1, domain=[low, high], nice=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """A logarithmic axis: values to pixels and back."""

    low: float
    high: float
    pixels: float
    """Where `high` is; `low` is at 0."""

    def pixel(self, value: float) -> float:
        """Pixels from `low`."""
        return self.pixels * math.log(value / self.low) / math.log(self.high / self.low)

    def value(self, pixel: float) -> float:
        """The inverse."""
        return self.low * math.exp(pixel / self.pixels * math.log(self.high / self.low))

    def scale(self) -> alt.Scale:
        """For a channel of a chart."""
        return alt.Scale(type="log", domain=[self.low, self.high], nice=False)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten inside the axis."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
        return [tick for tick in ticks if self.low <= tick <= self.high]
