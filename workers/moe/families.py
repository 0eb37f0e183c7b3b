"""From a Hugging Face configuration to its weights, family by family.

A configuration says how wide and how many; that queries are normalised per head, that a
projection has a bias, or which layers have experts is the convention of its `model_type`.
Here each convention is written down once, from building blocks that the families share.
Nothing is taken from a model's name. A family that is not here is read by the fields that
most of them share, and the result says that it is an estimate (`exact` is false).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workers.moe.structure import Architecture, Attention, Experts, Layer, Part, Weight

Config = Mapping[str, Any]


def read(config: Config) -> Architecture:
    """The structure in a Hugging Face configuration."""
    family = str(config.get("model_type", ""))
    reader = _FAMILIES.get(family)
    if reader is not None:
        return reader(config)
    return _estimate(config)


def _mixtral(config: Config) -> Architecture:
    hidden = config["hidden_size"]
    experts = Experts(
        num=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        width=config["intermediate_size"],
        router=(_router(hidden, config["num_local_experts"], "block_sparse_moe.gate"),),
        expert=_gated(
            "block_sparse_moe.experts.*",
            hidden,
            config["intermediate_size"],
            "expert",
            names=("w1", "w3", "w2"),
        ),
    )
    layer = Layer(
        attention=_grouped(config, window=config.get("sliding_window")),
        norms=_norms(hidden, "input_layernorm", "post_attention_layernorm"),
        experts=experts,
    )
    return _decoder(config, (layer,) * config["num_hidden_layers"])


def _estimate(config: Config) -> Architecture:
    raise NotImplementedError


_FAMILIES: dict[str, Callable[[Config], Architecture]] = {"mixtral": _mixtral}


def _decoder(
    config: Config,
    layers: tuple[Layer, ...],
    *,
    apart: tuple[tuple[Weight, int], ...] = (),
    exact: bool = True,
) -> Architecture:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    return Architecture(
        family=str(config.get("model_type", "")),
        exact=exact,
        hidden_size=hidden,
        vocab_size=vocab,
        layers=layers,
        embedding=(
            Weight(name="model.embed_tokens", part="embedding", shape=(vocab, hidden), cut="vocab"),
        ),
        final=(Weight(name="model.norm", part="norm", shape=(hidden,)),),
        head=Weight(name="lm_head", part="head", shape=(vocab, hidden), cut="vocab"),
        tied=bool(config.get("tie_word_embeddings", False)),
        apart=apart,
        config=config,
    )


def _grouped(config: Config, *, window: int | None = None) -> Attention:
    """Multi-head or grouped-query attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or hidden // heads
    part: Part = "attention"
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        qk_dim=dim,
        v_dim=dim,
        window=window,
        weights=(
            Weight(name="self_attn.q_proj", part=part, shape=(heads * dim, hidden), cut="out"),
            Weight(name="self_attn.k_proj", part=part, shape=(kv_heads * dim, hidden), cut="kv"),
            Weight(name="self_attn.v_proj", part=part, shape=(kv_heads * dim, hidden), cut="kv"),
            Weight(name="self_attn.o_proj", part=part, shape=(hidden, heads * dim), cut="in"),
        ),
    )


def _gated(
    prefix: str,
    hidden: int,
    width: int,
    part: Part,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Weight, ...]:
    """A gated FFN: gate, up and down projections."""
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return (
        Weight(name=gate, part=part, shape=(width, hidden), cut="out"),
        Weight(name=up, part=part, shape=(width, hidden), cut="out"),
        Weight(name=down, part=part, shape=(hidden, width), cut="in"),
    )


def _router(hidden: int, experts: int, name: str) -> Weight:
    return Weight(name=name, part="router", shape=(experts, hidden))


def _norms(hidden: int, *names: str) -> tuple[Weight, ...]:
    return tuple(Weight(name=name, part="norm", shape=(hidden,)) for name in names)
