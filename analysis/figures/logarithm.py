"""A logarithmic axis whose pixels are known before it is drawn: names are placed by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import altair as alt


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
