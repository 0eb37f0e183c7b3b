"""Columns of a record that are shares of a peak, and which of them cannot be above 1.

What a pass truly read and computed is at most what the device can; a share above 1 against a peak
that was measured says that the peak was measured too low, or that weights were read from caches,
for which the peak of memory is none. `mbu` and `mfu` count experts that were never touched, and
`s_mbu_uniform` those that another routing would touch: they may be above 1 on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

CALIBRATED = "calibrated"
"""`peak_source` of peaks that were measured on the machine; another measurement begins so too."""
DISTURBED = "calibrated-disturbed"
"""The same where no measurement so far was quiet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What is taken against one peak."""

    peak: str
    """Its column."""
    unit: str
    bounded: tuple[str, ...]
    """Shares that are at most 1."""
    others: tuple[str, ...]
    """Shares that may be more."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All that is taken against it."""
        return (*self.bounded, *self.others)


AGAINST = (
    Shares(
        peak="peak_bandwidth_gb_s",
        unit="GB/s",
        bounded=("s_mbu", "s_mbu_paper", "prefill_s_mbu"),
        others=("mbu", "s_mbu_uniform"),
    ),
    Shares(
        peak="peak_tflops",
        unit="TFLOPS",
        bounded=("s_mfu", "prefill_s_mfu"),
        others=("mfu",),
    ),
)
