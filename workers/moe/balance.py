"""How evenly tokens spread over experts, and over the ranks that hold them.

Four figures, because each hides what another shows. The fullest expert over the mean is what
the slowest device of an expert-parallel layout waits for; the coefficient of variation weighs
all of them; the entropy hardly moves while a few experts are hot, and falls when most starve;
the Gini coefficient reads as the share of work that would have to move. All take counts of
choices and depend on proportions alone, so traces of different length compare.

A layer without tokens has no balance: its figures are NaN in arrays here (numpy has no null)
and null in `Balance.rows`, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Placement = Literal["linear", "round_robin"]
"""How vLLM deals experts to ranks; see `expert_ranks`."""

MEASURES = ("max_over_mean", "variation", "entropy", "gini")
"""The figures of `Balance`, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Balance:
    """Figures of one or many layers; every array has a number per layer."""

    max_over_mean: Floats
    """Fullest over mean: 1 is even, E is all in one of E."""
    variation: Floats
    """Coefficient of variation, population standard deviation over mean: 0 to sqrt(E - 1)."""
    entropy: Floats
    """Shannon entropy of the shares over log E: 1 is even, 0 is all in one."""
    gini: Floats
    """Gini coefficient: 0 is even, (E - 1)/E is all in one."""

    def rows(self) -> list[dict[str, float | None]]:
        """A mapping per layer (of one layer: one), keyed by `MEASURES`; null without tokens."""
        columns = [np.atleast_1d(getattr(self, name)) for name in MEASURES]
        return [
            {
                name: None if math.isnan(value) else float(value)
                for name, value in zip(MEASURES, row, strict=True)
            }
            for row in zip(*columns, strict=True)
        ]


def balance(counts: ArrayLike) -> Balance:
    """Figures along the last axis of `counts`.

    Args:
        counts: choices [..., experts], not negative; for instance [layers, experts], or
            [layers, ranks] of `rank_loads`. A single expert is even.

    Raises:
        ValueError: for no experts, or a count that is negative or not finite.
    """
    loads = np.asarray(counts, dtype=np.float64)
    if loads.ndim == 0 or loads.shape[-1] == 0:
        raise ValueError("balance needs counts of at least one expert")
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ValueError("counts of tokens are finite and not negative")
    experts = loads.shape[-1]
    total = loads.sum(axis=-1, keepdims=True)
    share = np.divide(loads, total, out=np.full_like(loads, np.nan), where=total > 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * logs).sum(axis=-1)
    rank = np.arange(1, experts + 1)
    weighted = (np.sort(share, axis=-1) * (2 * rank - experts - 1)).sum(axis=-1)
    even = np.ones_like(entropy) + 0 * entropy  # NaN stays NaN
    return Balance(
        max_over_mean=share.max(axis=-1) * experts,
        variation=experts * share.std(axis=-1),
        entropy=entropy / math.log(experts) if experts > 1 else even,
        gini=weighted / experts,
    )


def expert_ranks(experts: int, ranks: int, placement: Placement = "linear") -> Ints:
    """The expert-parallel rank that holds each expert, [experts].

    As vLLM's `determine_expert_map` deals them: `linear` in contiguous blocks, where the first
    `experts % ranks` ranks hold one more; `round_robin` one by one. vLLM falls back to linear
    for models without expert groups, with redundant experts, and under most all-to-all
    backends, so linear is what runs unless its log says otherwise.

    Raises:
        ValueError: for a number below 1, or a placement that is none of the two.
    """
    if experts < 1 or ranks < 1:
        raise ValueError(f"{experts} experts cannot be dealt to {ranks} ranks")
    if placement == "round_robin":
        return np.arange(experts, dtype=np.int64) % ranks
    if placement != "linear":
        raise ValueError(f"no placement {placement!r}: linear or round_robin")
    base, more = divmod(experts, ranks)
    sizes = [base + (rank < more) for rank in range(ranks)]
    return np.repeat(np.arange(ranks, dtype=np.int64), sizes)


def rank_loads(counts: ArrayLike, ranks: int, placement: Placement = "linear") -> Ints:
    """Choices that each rank computes, [..., ranks], from choices [..., experts].

    Summed over passes these say who works most in all; what a pass waits for is the mean over
    passes of the fullest rank, so give passes as a leading axis where they matter.
    """
    loads = np.asarray(counts, dtype=np.int64)
    held = expert_ranks(loads.shape[-1], ranks, placement)
    return np.stack([loads[..., held == rank].sum(axis=-1) for rank in range(ranks)], axis=-1)


def dense_counts(
    rows: Iterable[tuple[int, int, int]], *, experts: int | None = None
) -> tuple[Sequence[int], Ints]:
    """Layers and their counts [layers, experts] from (layer, expert, tokens) rows.

    Rows as the activations table has them: what is absent is 0, what comes twice adds up.
    Layers without any row (dense ones) are left out. `experts` is the number per layer where
    it is known; else the highest expert seen decides.

    Raises:
        ValueError: a row names an expert beyond `experts`.
    """
    found = list(rows)
    layers = sorted({layer for layer, _, _ in found})
    width = max((expert for _, expert, _ in found), default=-1) + 1
    if experts is not None:
        if width > experts:
            raise ValueError(f"expert {width - 1} of a layer of {experts} experts")
        width = experts
    place = {layer: index for index, layer in enumerate(layers)}
    counts = np.zeros((len(layers), width), dtype=np.int64)
    for layer, expert, tokens in found:
        counts[place[layer], expert] += tokens
    return layers, counts
