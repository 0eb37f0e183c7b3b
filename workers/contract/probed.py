"""What the probe of a trial found, and which of its timed passes it looked at.

A probe replays timed passes: the same prompts, once more, with every choice of experts counted.
So what ran in a timed pass is known without the timed pass having carried anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from workers.contract.trace import Counts, Trace

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """Traces of some timed passes of a trial."""

    traces: Mapping[int, Trace] = field(default_factory=dict)
    """By the `repeat` of the timed pass that each replays."""
    settled: bool = False
    """Whether the distribution over experts had settled when it ended; see
    `workers.moe.activation`."""
    reason: str | None = None
    """Why there is no trace; null where there is one."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Positions of the MoE layers among the transformer layers."""
        return next(iter(self.traces.values())).layers

    def counts(self, phase: Phase) -> Counts | None:
        """MoE layers × experts, over all passes; null without a trace."""
        found = [getattr(one, phase) for one in self.traces.values()]
        total: Counts | None = sum(found[1:], start=found[0]) if found else None
        return total
