"""Experts one after the other: the operator itself, for which torch is enough.

Why there is one, and how vLLM comes to call it, stands in `vllm_unfused`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""Of the gate, whose product with the other half goes into the second matrix; by the names that
vLLM has for them (`MoEActivation`)."""


@torch.library.custom_op("moe_sweep::unfused_experts", mutates_args=("output",))
def unfused_experts(
    output: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
) -> None:
    """Writes the weighted sum of the chosen experts' outputs of every token to `output`.

    Args:
        output: tokens × hidden; may be the storage of `x`.
        x: tokens × hidden.
        w13: experts × 2 FFN × hidden, the gate first.
        w2: experts × hidden × FFN.
        weights: tokens × top-k.
        ids: tokens × top-k, rows of `w13`; below 0 is an expert of another rank.
        activation: one of `ACTIVATIONS`.
    """
    activate, top_k = ACTIVATIONS[activation], ids.shape[1]
    slots, shares = ids.flatten().long(), weights.flatten().float()
    by_expert = slots.argsort(stable=True)
    elsewhere, *counts = torch.bincount(slots.clamp(min=-1) + 1, minlength=len(w13) + 1).tolist()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    first = elsewhere
    for expert, count in enumerate(counts):
        if not count:
            continue
        chosen = by_expert[first : first + count]
        tokens = chosen // top_k
        gate, up = functional.linear(x[tokens], w13[expert]).chunk(2, dim=-1)
        told = functional.linear(activate(gate) * up, w2[expert])
        total.index_add_(0, tokens, told.float() * shares[chosen, None])
        first += count
    output.copy_(total)


@unfused_experts.register_fake
def _(*_: Any) -> None:
    """Nothing to tell of shapes: `output` is given."""
