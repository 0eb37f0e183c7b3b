"""From stamps to figures.

Each figure is computed within a pass first and then its median is taken over the timed
passes, so that one slow pass moves a headline by one rank and no more. The interval of a
median is the distribution-free one from order statistics: with few repeats it cannot
reach 95 %, so the coverage it really has is given beside it instead of being assumed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from workers.contract.measurement import Measurement, Pass

LEVEL = 0.95
"""Coverage asked of a confidence interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A median and its confidence interval."""

    median: float
    low: float
    high: float
    level: float | None
    """Coverage really reached; null for a single value, which has no interval."""

    @property
    def width(self) -> float:
        """Width relative to the median; infinite for a single value and around 0."""
        known = self.level is not None and self.median > 0
        return (self.high - self.low) / self.median if known else math.inf


def interval(values: Sequence[float]) -> Interval:
    """Median of `values` (at least one) with its order-statistic interval.

    The interval between the k-th smallest and the k-th largest of n values covers the
    median with probability 1 - 2·P(Binomial(n, 1/2) < k), whatever the distribution. The
    narrowest with at least 95 % is taken, else the full range.
    """
    ordered = sorted(values)
    k, level = _rank(len(ordered))
    return Interval(
        median=statistics.median(ordered), low=ordered[k - 1], high=ordered[-k], level=level
    )


@cache
def _rank(n: int) -> tuple[int, float | None]:
    if n == 1:
        return 1, None
    tail, best = 0.0, (1, 1 - 2 * 0.5**n)
    for k in range(1, n // 2 + 1):
        tail += math.comb(n, k - 1) * 0.5**n
        if 1 - 2 * tail < LEVEL:
            break
        best = (k, 1 - 2 * tail)
    return best


def figures(measurement: Measurement, *, output_tokens: int) -> dict[str, float | int | None]:
    """Columns of a record from at least one timed pass.

    Args:
        measurement: passes as observed.
        output_tokens: tokens generated per request.
    """
    timed = measurement.of("timed")
    one_token = measurement.of("one_token")
    batch, length = timed[0].batch_size, timed[0].input_tokens
    e2e = interval([one.e2e_s for one in timed])
    ttft_paper = statistics.median(one.e2e_s for one in one_token) if one_token else None
    spread = len(timed) > 1
    tokens = batch * (length + output_tokens)
    return {
        "repeats": len(timed),
        "ttft_s": _over(timed, lambda one: statistics.median(row[0] for row in one.token_s)),
        "ttft_paper_s": ttft_paper,
        "itl_s": _over(timed, lambda one: _quantile(_gaps(one), 0.5)),
        "itl_p90_s": _over(timed, lambda one: _quantile(_gaps(one), 0.9)),
        "itl_p99_s": _over(timed, lambda one: _quantile(_gaps(one), 0.99)),
        "itl_paper_s": _itl_paper(e2e.median, ttft_paper, batch, output_tokens),
        "tpot_s": _over(timed, _tpot),
        "e2e_s": e2e.median,
        "e2e_s_ci_low": e2e.low if spread else None,
        "e2e_s_ci_high": e2e.high if spread else None,
        "e2e_s_std": statistics.stdev(one.e2e_s for one in timed) if spread else None,
        "ci_level": e2e.level,
        "throughput_tok_s": tokens / e2e.median,
        "throughput_tok_s_ci_low": tokens / e2e.high if spread else None,
        "throughput_tok_s_ci_high": tokens / e2e.low if spread else None,
        "output_throughput_tok_s": batch * output_tokens / e2e.median,
        "requests_s": batch / e2e.median,
        **_acceptance(timed),
    }


def _acceptance(timed: Sequence[Pass]) -> dict[str, float]:
    """Ratios of sums over passes; nothing where no token was drafted or no draft was checked."""
    drafted = [one.drafted for one in timed if one.drafted is not None]
    steps, proposed = sum(one.steps for one in drafted), sum(one.proposed for one in drafted)
    accepted = sum(one.accepted for one in drafted)
    if not (proposed and steps):
        return {}
    return {"acceptance_rate": accepted / proposed, "accepted_length": 1 + accepted / steps}


def _itl_paper(e2e_s: float, ttft_s: float | None, batch: int, output_tokens: int) -> float | None:
    """MoE-Inference-Bench Eq 1 as printed, which divides by the tokens of the whole batch.

    Null without its TTFT. Null, too, where a request has one token: the pass and the one that
    gives the TTFT are then the same thing, and their difference is noise, however many requests
    there are. So it is where the shorter one took no less than the other.
    """
    if ttft_s is None or output_tokens < 2 or e2e_s <= ttft_s:
        return None
    return (e2e_s - ttft_s) / (batch * output_tokens - 1)


def _tpot(one: Pass) -> float | None:
    """Null where no request got a token after the step of its first one."""
    rates = [(row[-1] - row[0]) / (len(row) - 1) for row in one.token_s if row[-1] > row[0]]
    return statistics.median(rates) if rates else None


def _gaps(one: Pass) -> list[float]:
    """Waits between tokens of a request. Tokens of one step arrive together: their stamps are
    the same, and nobody waits between them."""
    return sorted(
        late - early for row in one.token_s for early, late in pairwise(row) if late > early
    )


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """Nearest-rank quantile: a gap that really occurred."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None


def _over(passes: Sequence[Pass], figure: Callable[[Pass], float | None]) -> float | None:
    values = [value for one in passes if (value := figure(one)) is not None]
    return statistics.median(values) if values else None
