"""Which experts ran, from counts of tokens, and when enough of them were seen.

MoE-CAP §5 traces routers "until the activation distribution stabilizes" and leaves open when
that is. Here it is a rule. The tokens seen so far are cut into an earlier and a later half,
and the two distributions over experts are compared, layer by layer, by their total-variation
distance (half the sum of absolute differences of shares, 0 to 1). Two halves of a still router
differ too, by chance; how much is known (`chance`). A check passes when, in the median layer,

- the distance is at most `tolerance` (what chance adds is then inside it), or
- chance alone is at most `resolution`, so that the halves are long enough to tell, and the
  distance is at most `factor` times what chance gives: nothing but chance can be seen.

Two passed checks in a row end the probing, and a check is due only when the tokens have grown
by a quarter since the last, so that two checks are not one check twice. What a rule on the
past cannot see: a drift too slow to move by that much within what was seen, and a change that
both halves share. So prompts of several kinds belong shuffled, not one kind after the other.
Tokens of one text are not independent: their halves differ by more than chance, the second
way out then stays shut, and the first one decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workers.moe.accounting import distinct_experts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNKS = 64
"""Sums of passes that are kept; beyond it neighbours are added up, so that memory stays small
and the halves are equal to within a few percent."""


def distinct(counts: ArrayLike) -> Ints:
    """Experts that at least one token chose: counts [..., experts] to numbers [...].

    With passes as the first axis these are the indicators of MoE-CAP Eq 4, summed over
    experts: an expert counts once per pass, however many tokens chose it.
    """
    chosen: Ints = (np.asarray(counts) > 0).sum(axis=-1, dtype=np.int64)
    return chosen


def mean_distinct(counts: ArrayLike) -> Floats | None:
    """Mean over passes: counts [passes, layers, experts] to [layers]; null without passes."""
    passes = np.asarray(counts)
    if passes.ndim != 3:
        raise ValueError(f"counts of passes have 3 axes, not {passes.ndim}")
    return distinct(passes).mean(axis=0) if len(passes) else None


def uniform_distinct(experts: int, top_k: int, tokens: ArrayLike) -> Floats:
    """The expectation under uniform routing beside it, for each number of tokens of a pass.

    E·(1 - (1 - k/E)^B) is exact for independent tokens that choose k different experts:
    C(E-1, k)/C(E, k) = 1 - k/E is the chance that one token leaves an expert out. A mean over
    passes of several sizes is a mean of these, not the value at the mean size.
    """
    sizes = np.asarray(tokens, dtype=np.float64)
    found = np.array([distinct_experts(experts, top_k, float(size)) for size in sizes.flat])
    return found.reshape(sizes.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """When a distribution counts as settled; see the module."""

    tolerance: float = 0.02
    """Total-variation distance of the halves that is near enough, chance included."""
    resolution: float = 0.05
    """Largest distance by chance alone at which the halves can tell a drift."""
    factor: float = 1.25
    """How far above chance a distance still counts as chance."""
    in_a_row: int = 2
    """Checks that must pass one after the other."""
    growth: float = 1.25
    """Factor by which the tokens grow between two checks."""

    def __post_init__(self) -> None:
        if not (0 < self.tolerance <= 1 and 0 < self.resolution <= 1):
            raise ValueError("tolerance and resolution are distances above 0 and up to 1")
        if self.factor < 1 or self.growth <= 1 or self.in_a_row < 1:
            raise ValueError("factor and in_a_row are at least 1, growth is above 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison of the earlier half with the later."""

    tokens: int
    """Seen so far, of the layer with most."""
    distance: float
    """Total-variation distance of the halves in the median layer."""
    by_chance: float
    """What independent draws of one still router would give there, expected."""
    passed: bool


def chance(earlier: ArrayLike, later: ArrayLike, top_k: int) -> Floats:
    """Expected distance of two samples [layers, experts] of one still router, [layers].

    A token chooses `top_k` different experts, so the number of tokens that chose expert e is
    binomial with probability q_e (of both samples together), and its share of the choices has
    the variance q_e·(1 - q_e)/(k²·n). The mean absolute difference of two such shares, nearly
    normal, is sqrt(2/π) of its standard deviation; the distance is half their sum.
    """
    one, other = (np.asarray(counts, dtype=np.float64) for counts in (earlier, later))
    n, m = (counts.sum(axis=-1) / top_k for counts in (one, other))
    both = n + m
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.clip((one + other) / both[:, None], 0, 1)
        deviation = np.sqrt(q * (1 - q)) * np.sqrt(1 / n + 1 / m)[:, None] / top_k
    expected: Floats = np.sqrt(2 / np.pi) / 2 * deviation.sum(axis=-1)
    return expected


def distance(earlier: ArrayLike, later: ArrayLike) -> Floats:
    """Total-variation distance of two counts [layers, experts], [layers]; NaN without tokens."""
    shares = []
    for counts in (earlier, later):
        loads = np.asarray(counts, dtype=np.float64)
        total = loads.sum(axis=-1, keepdims=True)
        shares.append(np.divide(loads, total, out=np.full_like(loads, np.nan), where=total > 0))
    apart: Floats = np.abs(shares[0] - shares[1]).sum(axis=-1) / 2
    return apart


class Settling:
    """Follows a probe, pass by pass, and says when it has seen enough."""

    def __init__(self, top_k: int, rule: Rule | None = None) -> None:
        """`top_k` routed experts per token."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, but must be at least 1")
        self.rule = rule or Rule()
        self.checks: list[Check] = []
        """All made so far; of each phase, keep a `Settling` of its own."""
        self._top_k = top_k
        self._chunks: list[Ints] = []
        self._tokens = 0
        self._checked_at = 0

    @property
    def settled(self) -> bool:
        """Whether the last checks passed, as many as the rule asks for."""
        last = self.checks[-self.rule.in_a_row :]
        return len(last) == self.rule.in_a_row and all(check.passed for check in last)

    @property
    def counts(self) -> Ints | None:
        """All choices so far, [layers, experts]; null before the first pass."""
        return np.sum(self._chunks, axis=0) if self._chunks else None

    def add(self, counts: ArrayLike) -> bool:
        """Take the counts of one pass [MoE layers, experts]; whether it is settled now.

        Raises:
            ValueError: the shape is no such one, or another than before.
        """
        of_pass = np.array(counts, dtype=np.int64)
        if of_pass.ndim != 2 or (self._chunks and of_pass.shape != self._chunks[0].shape):
            raise ValueError(f"counts of shape {of_pass.shape} are not those of this model")
        tokens = self._size(of_pass)
        if tokens == 0:
            return self.settled
        self._chunks.append(of_pass)
        self._tokens += tokens
        if self._tokens >= self.rule.growth * self._checked_at and len(self._chunks) > 1:
            self._check()
            self._checked_at = self._tokens
        if len(self._chunks) > _CHUNKS:
            self._merge()
        return self.settled

    def _check(self) -> None:
        earlier, later = self._halves()
        apart, by_chance = distance(earlier, later), chance(earlier, later, self._top_k)
        seen = np.isfinite(apart) & np.isfinite(by_chance)
        if not seen.any():
            return
        median, noise = float(np.median(apart[seen])), float(np.median(by_chance[seen]))
        still = noise <= self.rule.resolution and median <= self.rule.factor * noise
        self.checks.append(
            Check(
                tokens=self._tokens,
                distance=median,
                by_chance=noise,
                passed=median <= self.rule.tolerance or still,
            )
        )

    def _halves(self) -> tuple[Ints, Ints]:
        """Earlier and later chunks, cut where the tokens come nearest to half."""
        ends = np.cumsum([self._size(chunk) for chunk in self._chunks])
        cut = int(np.argmin(np.abs(ends[:-1] - ends[-1] / 2))) + 1
        return np.sum(self._chunks[:cut], axis=0), np.sum(self._chunks[cut:], axis=0)

    def _merge(self) -> None:
        """Add the two neighbours that are smallest together."""
        sizes = [self._size(chunk) for chunk in self._chunks]
        pairs = [one + other for one, other in pairwise(sizes)]
        first = int(np.argmin(pairs))
        self._chunks[first : first + 2] = [self._chunks[first] + self._chunks[first + 1]]

    def _size(self, counts: Ints) -> int:
        """Tokens of a pass: of the layer with most."""
        return int(counts.sum(axis=-1).max(initial=0)) // self._top_k
