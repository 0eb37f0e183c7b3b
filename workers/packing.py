"""Whether engines side by side on one machine measure what each of them measures alone.

Engines on devices of their own still share the machine: memory bandwidth of the host, cores,
power, links. A node therefore runs one engine at a time until a check on it has shown that
neighbours change nothing: as many engines of one trial as the node will carry take turns, one
of them alone, then all at once, and the time of a pass side by side is set against the time
alone, turn by turn, so that drift over minutes touches both alike.

The verdict needs the whole confidence interval of the median ratio within 2 % of one. What
does not get there within the turns allowed was not shown, and the node stays exclusive.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.contract.job import Job
from workers.engines.base import Site, engine_class
from workers.metrics import interval
from workers.prompts import random_ids

TOLERANCE = 0.02
"""Change of a pass's time, relative, that counts as none."""
LEAST_TURNS = 8
"""Turns before a verdict: from eight on, an interval of 95 % leaves out the extremes."""
MOST_TURNS = 24
TURN_S = 1.0
"""Least time of one side of a turn, seconds: starts that differ by milliseconds then do not
matter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """What the check found on one node."""

    unchanged: bool
    """Engines may run side by side there."""
    engines: int
    """How many ran at once."""
    trial_id: str
    """Trial that each of them ran."""
    ratio: float | None = None
    """Median over turns of a pass's time side by side over its time alone; null where the
    check failed."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """Its confidence interval."""
    turns: int = 0
    alone_s: float | None = None
    """Median of a pass alone, seconds."""
    reason: str = ""
    """Why there is no ratio."""

    def told(self) -> str:
        """One line for people."""
        if self.ratio is None:
            return f"one engine at a time: the check failed: {self.reason}"
        figures = f"{self.ratio:.3f} [{self.ratio_low:.3f}, {self.ratio_high:.3f}]"
        verdict = "side by side" if self.unchanged else "one engine at a time"
        return f"{verdict}: a pass beside {self.engines - 1} others takes {figures} of its time"


def compare(
    engines: int,
    alone: Callable[[int], Sequence[float]],
    together: Callable[[], Sequence[Sequence[float]]],
    trial_id: str,
) -> Packing:
    """Takes turns until the verdict is clear.

    Args:
        engines: how many there are, at least two.
        alone: times of passes of the engine of that number while the others wait, seconds.
        together: times of passes of every engine, all at once, in seconds.
        trial_id: what they run.
    """
    ratios: list[float] = []
    singles: list[float] = []
    while True:
        one = len(ratios) % engines
        if len(ratios) % 2:  # by turns the other way round, or a drift would count as change
            beside = statistics.median(together()[one])
            single = statistics.median(alone(one))
        else:
            single = statistics.median(alone(one))
            beside = statistics.median(together()[one])
        singles.append(single)
        ratios.append(beside / single)
        found = interval(ratios)
        within = max(abs(found.low - 1), abs(found.high - 1)) <= TOLERANCE
        beyond = found.low > 1 + TOLERANCE or found.high < 1 - TOLERANCE
        if len(ratios) >= LEAST_TURNS and (within or beyond or len(ratios) >= MOST_TURNS):
            return Packing(
                unchanged=within,
                engines=engines,
                trial_id=trial_id,
                ratio=found.median,
                ratio_low=found.low,
                ratio_high=found.high,
                turns=len(ratios),
                alone_s=statistics.median(singles),
            )


class Rehearsal:
    """An engine of a job's first trial that runs passes when it is told to.

    Raises:
        TrialError: it cannot be built, or a pass failed.
    """

    def __init__(self, job: Job, site: Site) -> None:
        self._trial = job.tickets[0].trial
        workload = self._trial.workload
        self._engine = engine_class(self._trial.engine.kind)(self._trial, [workload], site)
        self._index = 0
        for _ in range(max(1, self._trial.measure.warmup)):
            self._pass()

    def passes(self) -> list[float]:
        """Times of passes in full, one after another for `TURN_S`, seconds."""
        start = time.perf_counter()
        found: list[float] = []
        while time.perf_counter() - start < TURN_S:
            found.append(self._pass())
        return found

    def close(self) -> None:
        """Gives the engine back."""
        self._engine.close()

    def _pass(self) -> float:
        workload = self._trial.workload
        vocabulary = self._engine.loaded.vocab_size
        prompts = random_ids(workload, vocab_size=vocabulary, index=self._index)
        self._index += 1
        start = time.perf_counter()
        self._engine.generate(
            prompts,
            workload.output_tokens,
            kind="timed",
            repeat=self._index,
            temperature=workload.temperature,
        )
        return time.perf_counter() - start
