"""Tiny MoE models of several families, with random weights of ordinary size.

vLLM's own random weights are so small that experts hardly matter to a logit; with these, every
choice of a router is seen in what the model says. A test writes down beside its families only
what it varies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXPERTS, TOP_K = 8, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
"""What all families call the same; heads are 32 wide."""
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "head_dim": 32},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
    "olmoe": {"num_experts": EXPERTS, "norm_topk_prob": False},
}


def model(family: str, **changes: Any) -> Any:
    """A model of transformers, the same at every call.

    A family that is not in `FAMILIES` has in `changes` all that `SHAPE` lacks.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SHAPE | FAMILIES.get(family, {}) | changes)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    for name, weight in made.named_parameters():
        if name.endswith("gate.weight"):  # zeros where the family's own start has none
            torch.nn.init.normal_(weight, std=SHAPE["initializer_range"])
    return made


def checkpoint(folder: Path, family: str, *, dtype: str = "float32", **changes: Any) -> Path:
    """`model`, saved as `dtype` into `folder`."""
    import torch

    model(family, **changes).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
