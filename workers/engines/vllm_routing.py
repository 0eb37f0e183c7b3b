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

import torch
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
    RoutingSimulator,
    RoutingStrategy,
)

from workers.engines.forced_choice import choose, scores
from workers.moe.skew import parse

VARIABLE = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"


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
        ids = choose(self._of(experts, router_logits.device), tokens, top_k)
        weights = torch.full((tokens, top_k), 1 / top_k, device=ids.device)
        return weights, ids.to(indices_type or torch.int32)

    def _of(self, experts: int, device: torch.device) -> torch.Tensor:
        """log p of each expert. Made by the first pass, which no graph captures."""
        key = (experts, device)
        if key not in self._scores:
            self._scores[key] = scores(self._skew, experts, device)
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
