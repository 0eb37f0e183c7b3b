"""From a Hugging Face configuration to its weights, family by family.

A configuration says how wide and how many; that queries are normalised per head, that a
projection has a bias, or which layers have experts is the convention of its `model_type`.
Each convention is written down once, from `workers.moe.blocks`, together with what the
family assumes where a configuration is silent: `sparse` has the families with experts,
`switch` the one with an encoder, `dense` those without experts. Nothing is taken from a
model's name. A family that is not here is read by the fields that most of them share, and
the result says that it is an estimate (`exact` is false).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from reprlib import repr as short
from typing import Any

from workers.moe import dense, sparse
from workers.moe.blocks import (
    after_first,
    decoder,
    gated,
    grouped,
    latent,
    norms,
    routed,
    sliding,
    stack,
    stepped,
)
from workers.moe.fields import EXPERTS, TOP_K, Fields, Unread
from workers.moe.structure import Architecture
from workers.moe.switch import switch

Config = Mapping[str, Any]
Reader = Callable[[Fields, Fields], Architecture]
"""Reads the language part (first) of a whole configuration (second)."""


def read(config: Config) -> Architecture:
    """The structure in a Hugging Face configuration.

    Raises:
        Unread: a field that even an estimate needs is missing or not what it should be.
    """
    whole = Fields(config)
    text = whole.language
    if reader := _FAMILIES.get(whole.word("model_type")):
        return reader(text, whole)
    try:
        if reader := _FAMILIES.get(text.word("model_type")):
            return replace(reader(text, whole), exact=False)  # what is around it is not known
        return _estimate(text, whole)
    except Unread as error:
        raise Unread(f"{unspelled(config)}; read as its likes are: {error}") from error


def unspelled(config: Config) -> str:
    """What of a configuration is not known here, where its structure is a guess at best."""
    whole = Fields(config)
    outer, inner = whole.word("model_type"), whole.language.word("model_type")
    if not outer and not inner:
        return "it names no model_type"
    words = f"family {short(outer or inner)} is not spelled out"
    if outer and inner and inner != outer:
        known = "is" if inner in _FAMILIES else "is not either"
        words += f" (its language model's, {short(inner)}, {known})"
    return words


def _estimate(f: Fields, whole: Fields) -> Architecture:
    """By the fields that most families share."""
    bias = f.flag("attention_bias") or f.flag("qkv_bias")
    num = next((n for key in EXPERTS if (n := f.maybe(key))), None)
    experts = None
    if num and num > 1:
        shared = next((n for key in _SHARED if (n := f.maybe(key))), 0)
        width = f.whole(*_WIDTH)
        together = f.maybe("shared_expert_intermediate_size") or shared * width
        experts = routed(
            f,
            num=EXPERTS,
            top_k=TOP_K,
            width=_WIDTH,
            shared=shared or (1 if together else 0),
            shared_weights=gated("mlp.shared_experts", f.hidden, together, "shared"),
        )
    first, step = after_first(f, 0), stepped(f)
    return decoder(
        f,
        stack(
            f,
            latent(f, q_rank=None) if f.maybe("kv_lora_rank") else grouped(f, bias=bias),
            norms=norms(f),
            dense=gated(
                "mlp", f.hidden, f.whole("intermediate_size", "ffn_hidden_size", *_WIDTH), "dense"
            ),
            experts=experts,
            sparse=lambda i: first(i) and step(i),
            windows=sliding(f, f.maybe("sliding_window"), lambda _: False),
        ),
        whole=whole,
        exact=False,
    )


_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)


_FAMILIES: dict[str, Reader] = {
    "arctic": sparse.arctic,
    "aria": sparse.aria_vision,
    "aria_text": sparse.aria,
    "dbrx": sparse.dbrx,
    "deepseek_v2": sparse.deepseek_v2,
    "deepseek_v3": sparse.deepseek_v3,
    "deepseek_vl_v2": sparse.deepseek_vl2,
    "dots1": sparse.dots1,
    "ernie4_5_moe": sparse.ernie,
    "flex_olmo": sparse.flex_olmo,
    "gemma": dense.gemma,
    "gemma2": dense.gemma2,
    "gemma3_text": dense.gemma3,
    "glm4_moe": sparse.glm4_moe,
    "gpt_oss": sparse.gpt_oss,
    "granite": dense.plain,
    "granitemoe": sparse.granitemoe,
    "granitemoeshared": sparse.granitemoe,
    "grok-1": sparse.grok1,
    "hunyuan_v1_moe": sparse.hunyuan,
    "kimi_k2": sparse.deepseek_v3,
    "llama": dense.plain,
    "llama4": sparse.llama4_vision,
    "llama4_text": sparse.llama4,
    "minimax_m2": sparse.minimax_m2,
    "mistral": dense.mistral,
    "mixtral": sparse.mixtral,
    "molmo": sparse.molmo,
    "molmoe": sparse.molmo,
    "olmo2": dense.olmo2,
    "olmo3": dense.olmo3,
    "olmoe": sparse.olmoe,
    "phi3": dense.phi3,
    "phimoe": sparse.phimoe,
    "qwen2": dense.qwen2,
    "qwen2_moe": sparse.qwen2_moe,
    "qwen3": dense.qwen3,
    "qwen3_moe": sparse.qwen3_moe,
    "qwen3_vl_moe": sparse.qwen3_vl_moe,
    "qwen3_vl_moe_text": sparse.qwen3_moe,
    "switch_transformers": switch,
}
