"""Which experts ran: what a probe saw in the forward passes of one batch.

A trace is counted where the router decides, never derived from a model of routing. Prefill
and decode are counted apart, because one pass may hold both and their activations differ by
an order of magnitude. Layers without experts are not in it, so no average over layers can be
diluted by them. Rows are counted once: not per rank, and not the padding of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""MoE layers × experts: tokens that chose the expert."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """One forward pass of the batch that the scheduler put together."""

    request: NDArray[np.int64]
    """Requests in the pass, as positions among the prompts, in the order of their tokens."""
    new: NDArray[np.int64]
    """Per such request, its tokens in the pass."""
    context: NDArray[np.int64]
    """Per such request, its tokens whose keys and values were there before the pass."""
    decoding: NDArray[np.bool_]
    """Per such request, whether its token in the pass is a generated one. Where a request was
    put back and is computed anew, its old tokens count as prefill until it has caught up."""
    prefill: Counts
    """Of the tokens of the requests that are not decoding."""
    decode: Counts
    """Of the tokens of those that are."""
    seconds: float
    """From the pass handed to the model runner until its experts lay in host memory, with
    the probe's cost and without sampling; of pipeline stages the longest. Timed passes have
    stamps of their own: this tells what they would not."""

    @property
    def counts(self) -> Counts:
        """Of all tokens in the pass."""
        return self.prefill + self.decode

    @property
    def activated(self) -> Counts:
        """Distinct experts that ran, per MoE layer."""
        distinct: Counts = np.count_nonzero(self.counts, axis=1)
        return distinct

    @property
    def busiest(self) -> Counts:
        """Tokens of the expert with most, per MoE layer: what spread experts wait for."""
        most: Counts = self.counts.max(axis=1)
        return most


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """Every forward pass of one batch, from its prompts to its last token."""

    layers: tuple[int, ...]
    """Positions of the MoE layers among the transformer layers; rows of every count."""
    top_k: int
    """Experts per token."""
    steps: tuple[Step, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Per request, the token ids that it generated; the last one went through no pass."""
    routes: tuple[NDArray[np.int16], ...] | None = None
    """Per request, tokens × MoE layers × top-k: the experts of its prompt's tokens and of all
    generated ones but the last, in the router's order; -1 where no pass computed a token,
    since a prefix cache had it. Null where they were not asked for."""

    @property
    def prefill(self) -> Counts:
        """Sum over passes."""
        return _total([one.prefill for one in self.steps])

    @property
    def decode(self) -> Counts:
        """Sum over passes."""
        return _total([one.decode for one in self.steps])


def per_request(output_tokens: int | Sequence[int], requests: int) -> list[int]:
    """Tokens to generate for each request: one number for all, or a number of each.

    Raises:
        ValueError: not a number per request, or one below 1.
    """
    if isinstance(output_tokens, int):
        output_tokens = [output_tokens] * requests
    if len(output_tokens) != requests or min(output_tokens, default=1) < 1:
        raise ValueError(
            f"output_tokens {list(output_tokens)} of {requests} prompts: one each, at least 1"
        )
    return list(output_tokens)


def _total(counts: list[Counts]) -> Counts:
    total: Counts = np.sum(counts, axis=0)
    return total
