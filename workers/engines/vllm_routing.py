"""Routing that a sweep forces on a model, through vLLM's own routing simulator.

What imbalance costs can only be measured by choosing it: dummy weights leave it to chance, and
a checkpoint has the one that it was trained to. vLLM puts its simulator in the place of every
router if `VLLM_MOE_ROUTING_SIMULATION_STRATEGY` names a strategy that is registered in the
process of the rank. Of its own two, one is uniform and the other may choose an expert twice for
one token, so ours are registered beside them under the sweep's own words (`workers.moe.skew`).

Experts are drawn one after the other without replacement, by the largest of log p plus Gumbel
noise: one small kernel more than a softmax. Every layer prefers the same expert numbers, and
tokens of a request do not depend on each other. What the model then says means nothing.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
    RoutingSimulator,
    RoutingStrategy,
)

from workers.moe.skew import parse, probabilities

VARIABLE = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
_NEVER = -1e30
"""Score of an expert without a chance, per expert: in their order they make up the number."""


class Forced(RoutingStrategy):
    """Routing with the probabilities of a `Skew`, whatever the router's logits say."""

    def __init__(self, routing: str) -> None:
        self._skew = parse(routing)
        self._scores: dict[tuple[int, torch.device], torch.Tensor] = {}

    def route_tokens(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, equal, and ids of the experts: both [tokens, top_k]."""
        tokens, experts = router_logits.shape
        scores = self._of(experts, router_logits.device)
        noise = torch.empty_like(router_logits, dtype=torch.float32).exponential_().log_()
        ids = torch.topk(scores - noise, top_k, dim=-1).indices
        weights = torch.full((tokens, top_k), 1 / top_k, device=ids.device)
        return weights, ids.to(indices_type or torch.int32)

    def _of(self, experts: int, device: torch.device) -> torch.Tensor:
        """log p of each expert. Made by the first pass, which no graph captures."""
        key = (experts, device)
        if key not in self._scores:
            p = probabilities(self._skew, experts)
            never = _NEVER * np.arange(1, experts + 1) / experts
            with np.errstate(divide="ignore"):
                scores = np.where(p > 0, np.log(p), never)
            self._scores[key] = torch.tensor(scores, dtype=torch.float32, device=device)
        return self._scores[key]


def force(routing: str | None) -> None:
    """Has every engine that this process and its ranks build from now on route like that; null
    is the model's own router.

    Raises:
        ValueError: there is no such routing.
    """
    if routing is None:
        os.environ.pop(VARIABLE, None)
        return
    RoutingSimulator.register_strategy(routing, Forced(routing))
    os.environ[VARIABLE] = routing


def take_over() -> None:
    """What `force` was told in the process that started this rank."""
    if routing := os.environ.get(VARIABLE):
        force(routing)
