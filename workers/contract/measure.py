"""How a trial is measured, and when there is enough of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.contract.validate import at_least, positive

Activation = bool | Literal["sheet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Warm-up, repeats and the stop rule.

    `repeats` timed passes are always made. With `ci_width`, more follow until the
    confidence interval of the median is narrower than that share of the median, or
    `max_repeats` is reached. Passes that something else disturbed are made up for by as many
    more, at most `extra_repeats`.
    """

    warmup: int = 1
    """Untimed passes of each shape before the first timed one."""
    repeats: int = 5
    """Timed passes."""
    max_repeats: int | None = None
    """Upper bound on timed passes; null is `repeats`, or three times that with `ci_width`.
    Disturbed ones that are made up for come on top."""
    extra_repeats: int | None = None
    """Most timed passes that make up for disturbed ones; null is as many as `repeats`, and of
    short passes as many as take half a second; 0 none."""
    ci_width: float | None = None
    """Wanted width of the median's confidence interval, relative to the median."""
    timeout_s: float = 1800.0
    """Deadline of each of: building the engine, measuring one trial. Seconds."""
    activation: Activation = False
    """Which experts ran: true counts them, in passes of their own; `sheet` takes what an earlier
    probe of the same model, prompts and batch has found; false leaves it to expectation."""
    accuracy: tuple[str, ...] = ()
    """Accuracy tasks to run on the same engine."""
    energy: bool = False
    """Read power counters during timed passes."""

    def __post_init__(self) -> None:
        at_least("measure.warmup", self.warmup, 0)
        at_least("measure.repeats", self.repeats, 1)
        positive("measure.timeout_s", self.timeout_s)
        if self.extra_repeats is not None:
            at_least("measure.extra_repeats", self.extra_repeats, 0)
        if self.ci_width is not None:
            positive("measure.ci_width", self.ci_width)
        if self.max_repeats is not None and self.max_repeats < self.repeats:
            raise ValueError(
                f"measure.max_repeats is {self.max_repeats}, below measure.repeats {self.repeats}"
            )

    @property
    def most_repeats(self) -> int:
        """The number of undisturbed timed passes that is never exceeded."""
        if self.max_repeats is not None:
            return self.max_repeats
        return self.repeats if self.ci_width is None else 3 * self.repeats

    @property
    def most_extra(self) -> int:
        """The most timed passes that make up for disturbed ones."""
        return self.repeats if self.extra_repeats is None else self.extra_repeats
