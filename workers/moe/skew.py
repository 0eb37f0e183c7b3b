"""Routing as an axis: how likely each expert is, and how many a batch then touches.

A token takes k different experts, one after the other, each with the probabilities of those
that are left (successive sampling, which is what top-k of log p plus Gumbel noise draws). The
chance that one token takes expert e is all that a batch of independent tokens needs: n of them
touch Σ_e 1 - (1 - π_e)^n experts. Uniform routing has π = k/E and gives the accounting's
formula back.

π has no short form but a short integral. Give every expert a clock that rings after an
exponential time of rate p_e: the first k that ring are the sample. So expert e is taken if
fewer than k others ring before it, and π_e = ∫ p_e·exp(-p_e·t)·P(fewer than k others by t) dt,
where the number of others that rang has a Poisson-binomial distribution, summed exactly. No
simulation is needed; the integral over log t falls off at both ends like an exponential, where
the trapezoid rule converges at once, and Σ π_e = k tells how near it came (`Inclusion.error`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Kind = Literal["uniform", "zipf", "all-to-one"]

STEEPEST = 20.0
"""Exponent beyond which the second expert has less than a millionth of the first."""
_STEP = 0.05
"""Of the integral, in log t."""
_TINY = 1e-12
"""What the two tails of the integral may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skew:
    """A value of the routing axis."""

    kind: Kind
    exponent: float = 0.0
    """Of zipf: p_e is proportional to 1/(e + 1)^exponent; 0 is uniform."""

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "zipf", "all-to-one"):
            raise ValueError(f"no routing {self.kind!r}: uniform, zipf:A or all-to-one")
        if not 0 <= self.exponent <= STEEPEST:
            raise ValueError(f"zipf:{self.exponent:g}: an exponent is from 0 to {STEEPEST:g}")
        if self.kind != "zipf" and self.exponent:
            raise ValueError(f"routing {self.kind} takes no exponent")

    def __str__(self) -> str:
        return f"zipf:{self.exponent:g}" if self.kind == "zipf" else self.kind


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Inclusion:
    """Chance of each expert to be among the choices of one token."""

    chances: Floats
    """[experts]; they add up to top-k."""
    error: float
    """Bound on what the number of distinct experts of one token is off by; 0.0 where exact."""


def parse(text: str) -> Skew:
    """`uniform`, `zipf:1.2` or `all-to-one`.

    Raises:
        ValueError: for anything else.
    """
    name, sign, number = text.partition(":")
    if name == "zipf":
        try:
            return Skew(kind="zipf", exponent=float(number))
        except ValueError:
            raise ValueError(f"routing {text!r}: zipf needs an exponent, as in zipf:1.2") from None
    if sign or name not in ("uniform", "all-to-one"):
        raise ValueError(f"no routing {text!r}: uniform, zipf:A or all-to-one")
    return Skew(kind="uniform" if name == "uniform" else "all-to-one")


def probabilities(skew: Skew, experts: int) -> Floats:
    """Chance of each expert to be a token's first choice, [experts], adding up to 1."""
    if experts < 1:
        raise ValueError(f"{experts} experts")
    if skew.kind == "all-to-one":
        weights = np.zeros(experts)
        weights[0] = 1
    else:
        weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew.exponent
    shares: Floats = weights / weights.sum()
    return shares


def inclusion(first: ArrayLike, top_k: int) -> Inclusion:
    """Chances from those of the first choice, `first` [experts], adding up to 1.

    Where fewer than `top_k` experts have a chance at all, those are taken by every token, and
    the next ones in order make up the number: all-to-one with top-2 is experts 0 and 1.

    Raises:
        ValueError: the chances are no distribution, or there are fewer experts than `top_k`.
    """
    p = np.asarray(first, dtype=np.float64)
    if p.ndim != 1 or not (np.isfinite(p).all() and (p >= 0).all()):
        raise ValueError("chances of experts are one row of numbers that are not negative")
    if not math.isclose(p.sum(), 1, rel_tol=1e-9):
        raise ValueError(f"chances of experts add up to 1, not {p.sum():g}")
    if not 1 <= top_k <= p.size:
        raise ValueError(f"{top_k} of {p.size} experts cannot be chosen")
    likely = np.flatnonzero(p)
    chances = np.zeros_like(p)
    if likely.size <= top_k:
        rest = np.flatnonzero(p == 0)[: top_k - likely.size]
        chances[likely] = chances[rest] = 1
        return Inclusion(chances=chances, error=0.0)
    some = p[likely]
    if top_k == 1 or np.ptp(some) == 0:
        chances[likely] = some if top_k == 1 else top_k / likely.size
        return Inclusion(chances=chances, error=0.0)
    found = np.minimum(_integral(some, top_k), 1)
    chances[likely] = found
    return Inclusion(chances=chances, error=abs(float(found.sum()) - top_k) + _TINY * p.size)


def expected_distinct(chances: ArrayLike, tokens: ArrayLike) -> Floats:
    """Expected distinct experts of passes of `tokens` independent tokens, in their shape."""
    left_out = 1 - np.asarray(chances, dtype=np.float64)
    sizes = np.asarray(tokens, dtype=np.float64)
    touched: Floats = (1 - left_out ** sizes[..., None]).sum(axis=-1)
    return touched


def curve(skew: Skew, experts: int, top_k: int, tokens: ArrayLike) -> Floats:
    """Expected distinct experts of one layer by tokens in the pass, in the shape of `tokens`."""
    return expected_distinct(inclusion(probabilities(skew, experts), top_k).chances, tokens)


def draw(skew: Skew, experts: int, top_k: int, tokens: int, *, seed: int) -> NDArray[np.int64]:
    """Choices of one layer, [tokens, top_k], by the same law: top-k of log p plus Gumbel."""
    p = probabilities(skew, experts)
    if not 1 <= top_k <= experts:
        raise ValueError(f"{top_k} of {experts} experts cannot be chosen")
    noise = np.random.default_rng(seed).gumbel(size=(tokens, experts))
    with np.errstate(divide="ignore"):
        scores = np.where(p > 0, np.log(p) + noise, -1e300 * np.arange(1, experts + 1) / experts)
    order: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return order


def _integral(p: Floats, top_k: int) -> Floats:
    """π by the trapezoid rule over s = log t, for more than `top_k` likely experts."""
    # Below `low` nobody has rung yet; beyond `high` even the slowest clock has.
    low = math.log(_TINY) - math.log(p.max())
    high = math.log(-math.log(_TINY)) - math.log(p.min())
    s = np.arange(low, high + _STEP, _STEP)
    waiting = p[:, None] * np.exp(s)
    silent = np.exp(-waiting)  # [experts, nodes]: has not rung by t
    rung = -np.expm1(-waiting)
    before = np.zeros((p.size + 1, top_k, s.size))
    before[0, 0] = 1  # numbers of ringers below top_k among the experts before each
    for index in range(p.size):
        before[index + 1] = _with(before[index], silent[index], rung[index])
    found = np.empty_like(p)
    after = np.zeros((top_k, s.size))
    after[0] = 1
    for index in reversed(range(p.size)):
        at_most = np.cumsum(after, axis=0)[::-1]  # row j: at most top_k - 1 - j after it
        free = (before[index] * at_most).sum(axis=0)
        found[index] = _STEP * (waiting[index] * silent[index] * free).sum()
        after = _with(after, silent[index], rung[index])
    return found


def _with(numbers: Floats, silent: Floats, rung: Floats) -> Floats:
    """The distribution of a number of ringers [below top_k, nodes], with one more expert."""
    more: Floats = numbers * silent
    more[1:] += numbers[:-1] * rung
    return more
