"""From a Hugging Face configuration to its weights, family by family.

A configuration says how wide and how many; that queries are normalised per head, that a
projection has a bias, or which layers have experts is the convention of its `model_type`.
Here each convention is written down once, from `workers.moe.blocks`, together with what
the family assumes where a configuration is silent. Nothing is taken from a model's name. A
family that is not here is read by the fields that most of them share, and the result says
that it is an estimate (`exact` is false).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from workers.moe import towers
from workers.moe.blocks import (
    FUSED,
    GATE_UP_DOWN,
    W1_W3_W2,
    Apart,
    Names,
    decoder,
    gated,
    grouped,
    latent,
    norms,
    once,
    routed,
    sliding,
    stack,
)
from workers.moe.fields import Fields
from workers.moe.structure import Architecture, Attention, Experts, Layer, Weight

Config = Mapping[str, Any]
Reader = Callable[[Fields, Fields], Architecture]
"""Reads the language part (first) of a whole configuration (second)."""

_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_QK = ("q_norm", "k_norm")


def read(config: Config) -> Architecture:
    """The structure in a Hugging Face configuration.

    Raises:
        UnknownModel: a field that even an estimate needs is missing or not what it should be.
    """
    whole = Fields(config)
    text = whole.language
    if reader := _FAMILIES.get(whole.word("model_type")):
        return reader(text, whole)
    if reader := _FAMILIES.get(text.word("model_type")):
        return _language_only(reader(text, whole))
    return _estimate(text, whole)


def _mixtral(f: Fields, whole: Fields) -> Architecture:
    return decoder(
        f,
        stack(
            f,
            grouped(f),
            norms=norms(f),
            experts=routed(
                f, path="block_sparse_moe", names=W1_W3_W2, width=("intermediate_size",)
            ),
            windows=f.maybe("sliding_window"),
        ),
        whole=whole,
    )


def _minimax_m2(f: Fields, whole: Fields) -> Architecture:
    experts = routed(
        f,
        path="block_sparse_moe",
        names=W1_W3_W2,
        width=("intermediate_size",),
        correction="e_score_correction_bias",
    )
    attention = grouped(f, head_dim=128, norm=_QK, norm_whole=True, norm_cut=True)
    return decoder(f, stack(f, attention, norms=norms(f), experts=experts), whole=whole)


def _phimoe(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    layers = stack(
        f,
        grouped(f, bias=bias, out_bias=bias),
        norms=norms(f, bias=True),
        experts=routed(f, path="block_sparse_moe", names=W1_W3_W2, width=("intermediate_size",)),
        windows=f.maybe("sliding_window"),
    )
    return decoder(
        f,
        layers,
        whole=whole,
        final=norms(f, "model.norm", bias=True),
        head_bias=f.flag("lm_head_bias"),
    )


def _qwen2_moe(f: Fields, whole: Fields) -> Architecture:
    hidden = f.hidden
    shared = f.whole("shared_expert_intermediate_size", default=5632, least=0)
    experts = routed(
        f,
        shared=1 if shared else 0,
        shared_weights=(
            *gated("mlp.shared_expert", hidden, shared, "shared"),
            Weight(name="mlp.shared_expert_gate", part="shared", shape=(1, hidden)),
        ),
    )
    window = f.maybe("sliding_window", 4096) if f.flag("use_sliding_window") else None
    most = f.whole("max_window_layers", default=28, least=0)
    return decoder(
        f,
        stack(
            f,
            grouped(f, bias=f.flag("qkv_bias", default=True)),
            norms=norms(f),
            dense=_dense_ffn(f),
            experts=experts,
            sparse=_stepped(f),
            windows=sliding(f, window, lambda i: i % 2 == 0 and i < most),
        ),
        whole=whole,
    )


def _qwen3_moe(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    return decoder(
        f,
        stack(
            f,
            grouped(f, bias=bias, out_bias=bias, norm=_QK),
            norms=norms(f),
            dense=_dense_ffn(f),
            experts=routed(f),
            sparse=_stepped(f),
            windows=f.maybe("sliding_window", 4096) if f.flag("use_sliding_window") else None,
        ),
        whole=whole,
        tied=whole.flag("tie_word_embeddings"),
        apart=towers.qwen3_vl(whole) if whole is not f else (),
    )


def _deepseek_v2(f: Fields, whole: Fields) -> Architecture:
    return _deepseek(f, whole, first=0, shared=2, ffn_bias=f.flag("mlp_bias"))


def _deepseek_v3(f: Fields, whole: Fields) -> Architecture:
    return _deepseek(f, whole, first=3, shared=1, choice="noaux_tc")


def _deepseek_vl2(f: Fields, whole: Fields) -> Architecture:
    return _deepseek(f, whole, first=0, shared=2, apart=towers.deepseek_vl2(whole, f.hidden))


def _deepseek(
    f: Fields,
    whole: Fields,
    *,
    first: int,
    shared: int,
    choice: str = "greedy",
    ffn_bias: bool = False,
    apart: Apart = (),
) -> Architecture:
    # Multi-token-prediction layers (`num_nextn_predict_layers`) are a draft, not the model.
    corrected = f.word("topk_method", choice) == "noaux_tc"
    experts = None
    if f.maybe("n_routed_experts", 64):
        experts = _with_shared(
            f,
            f.whole("n_shared_experts", default=shared, least=0),
            correction="gate.e_score_correction_bias" if corrected else None,
            bias=ffn_bias,
        )
    rope = f.config.get("qk_rope_head_dim", 64) or f.config.get("qk_nope_head_dim", 128)
    multihead = not f.flag("use_mla", default=True) or not rope
    return decoder(
        f,
        stack(
            f,
            grouped(f) if multihead else latent(f),
            norms=norms(f),
            dense=_dense_ffn(f, bias=ffn_bias),
            experts=experts,
            sparse=_after_first(f, first),
        ),
        whole=whole,
        apart=apart,
    )


def _glm4_moe(f: Fields, whole: Fields) -> Architecture:
    return decoder(
        f,
        stack(
            f,
            grouped(
                f,
                bias=f.flag("attention_bias"),
                norm=_QK if f.flag("use_qk_norm") else None,
            ),
            norms=norms(f),
            dense=_dense_ffn(f),
            experts=_with_shared(
                f,
                f.whole("n_shared_experts", default=1, least=0),
                correction="gate.e_score_correction_bias",
            ),
            sparse=_after_first(f, 1),
        ),
        whole=whole,
    )


def _dots1(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    most = f.whole("max_window_layers", default=62, least=0)
    return decoder(
        f,
        stack(
            f,
            grouped(f, bias=bias, out_bias=bias, norm=_QK),
            norms=norms(f),
            dense=_dense_ffn(f),
            experts=_with_shared(
                f,
                f.whole("n_shared_experts", default=0, least=0),
                correction="gate.e_score_correction_bias",
            ),
            sparse=_after_first(f, 0),
            windows=sliding(f, f.maybe("sliding_window", 4096), lambda i: i >= most),
        ),
        whole=whole,
    )


def _ernie(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("use_bias")
    shared = f.whole("moe_num_shared_experts", default=2, least=0)
    experts = routed(
        f,
        num=("moe_num_experts", "num_experts"),
        top_k=("moe_k", "num_experts_per_tok"),
        correction="moe_statics.e_score_correction_bias",
        shared=shared,
        shared_weights=gated(
            "mlp.shared_experts",
            f.hidden,
            shared * f.whole("moe_intermediate_size"),
            "shared",
            bias=bias,
        ),
    )
    start = f.whole("moe_layer_start_index", default=1, least=0)
    end = f.whole("moe_layer_end_index", default=-1, least=-1)
    step = f.whole("moe_layer_interval", default=1)
    return decoder(
        f,
        stack(
            f,
            grouped(f, bias=bias, out_bias=bias),
            norms=norms(f),
            dense=_dense_ffn(f, bias=bias),
            experts=experts,
            sparse=lambda i: i >= start and (end < 0 or i <= end) and (i + 1) % step == 0,
        ),
        whole=whole,
        tied=whole.flag("tie_word_embeddings", default=True),
        head_bias=bias,
    )


def _hunyuan(f: Fields, whole: Fields) -> Architecture:
    bias, width = f.flag("attention_bias"), ("moe_intermediate_size", "intermediate_size")
    shared = f.whole("num_shared_expert", default=1, least=0)
    experts = routed(
        f,
        router="gate.wg",
        top_k=("moe_topk", "num_experts_per_tok"),
        width=width,
        shared=shared,
        shared_weights=gated(
            "mlp.shared_mlp", f.hidden, shared * f.whole("intermediate_size"), "shared"
        ),
    )
    attention = grouped(f, bias=bias, out_bias=bias, norm=("query_layernorm", "key_layernorm"))
    return decoder(f, stack(f, attention, norms=norms(f), experts=experts), whole=whole)


def _olmoe(f: Fields, whole: Fields) -> Architecture:
    return _olmo_experts(f, whole, "input_layernorm", "post_attention_layernorm")


def _flex_olmo(f: Fields, whole: Fields) -> Architecture:
    return _olmo_experts(f, whole, *_AFTER)


def _olmo_experts(f: Fields, whole: Fields, *names: str) -> Architecture:
    bias = f.flag("attention_bias")
    attention = grouped(f, bias=bias, out_bias=bias, norm=_QK, norm_whole=True)
    experts = routed(f, width=("intermediate_size",))
    return decoder(f, stack(f, attention, norms=norms(f, *names), experts=experts), whole=whole)


def _molmo(f: Fields, whole: Fields) -> Architecture:
    # The width counts both halves of the gated FFN; 128 embeddings stand for image tokens.
    hidden, width = f.hidden, f.whole("intermediate_size") // 2
    vocab = f.whole("embedding_size", "vocab_size")
    names: Names = ("ff_proj", "ff_proj", "ff_out")
    sparse = f.maybe("moe_num_experts") or f.maybe("num_experts")
    experts = None
    if sparse:
        experts = Experts(
            num=sparse,
            top_k=f.whole("moe_top_k", "num_experts_per_tok"),
            width=width,
            router=(Weight(name="mlp.gate", part="router", shape=(sparse, hidden)),),
            expert=gated("mlp.experts.*", hidden, width, "expert"),
        )
    attention = grouped(
        f,
        path="attn",
        names=("att_proj", "att_proj", "att_proj", "attn_out"),
        bias=f.flag("qkv_bias"),
        norm=_QK if f.flag("attention_layer_norm") else None,
        norm_whole=True,
    )
    return decoder(
        f,
        stack(
            f,
            attention,
            norms=norms(f, "attn_norm", "ff_norm"),
            dense=() if experts else gated("mlp", hidden, width, "dense", names=names),
            experts=experts,
        ),
        whole=whole,
        tied=f.flag("weight_tying"),
        vocab=vocab,
        embedding="model.transformer.wte.embedding",
        extra=(
            Weight(
                name="model.transformer.wte.new_embedding",
                part="embedding",
                shape=(f.whole("additional_vocab_size", default=128, least=0), hidden),
                cut="vocab",
            ),
        ),
    )


def _dbrx(f: Fields, whole: Fields) -> Architecture:
    attn, ffn = f.part("attn_config"), f.part("ffn_config")
    experts = routed(
        Fields({**ffn.config, "hidden_size": f.hidden}),
        path="ffn",
        router="router.layer",
        each="experts.mlp",
        names=("w1", "v1", "w2"),
        num=("moe_num_experts",),
        top_k=("moe_top_k",),
        width=("ffn_hidden_size",),
    )
    attention = grouped(
        f,
        path="norm_attn_norm.attn",
        names=("Wqkv", "Wqkv", "Wqkv", "out_proj"),
        kv_heads=attn.whole("kv_n_heads", default=f.whole("num_key_value_heads", default=1)),
    )
    layers = stack(
        f,
        attention,
        norms=norms(f, "norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        experts=experts,
    )
    return decoder(
        f,
        layers,
        whole=whole,
        embedding="transformer.wte",
        final=norms(f, "transformer.norm_f"),
    )


def _llama4(f: Fields, whole: Fields) -> Architecture:
    bias, width = f.flag("attention_bias"), f.whole("intermediate_size")
    experts = routed(
        f,
        path="feed_forward",
        router="router",
        each="experts",
        names=FUSED,
        width=("intermediate_size",),
        shared=1,
        shared_weights=gated("feed_forward.shared_expert", f.hidden, width, "shared"),
    )
    step = f.whole("interleave_moe_layer_step", default=1, least=0)
    with_experts = set(
        range(step - 1, f.layers, step)
        if step
        else ()
        if f.config.get("moe_layers") is None
        else f.items("moe_layers")
    )
    rotary, interval = f.per_layer("no_rope_layers"), f.whole("no_rope_layer_interval", default=4)
    attention = grouped(f, head_dim=128, bias=bias, out_bias=bias)
    return decoder(
        f,
        stack(
            f,
            replace(attention, chunked=True),
            norms=norms(f),
            dense=gated(
                "feed_forward", f.hidden, f.whole("intermediate_size_mlp", default=16384), "dense"
            ),
            experts=experts,
            sparse=lambda i: i in with_experts,
            windows=sliding(
                f,
                f.maybe("attention_chunk_size", 8192),
                lambda i: bool(rotary[i]) if rotary else (i + 1) % interval != 0,
            ),
        ),
        whole=whole,
        tied=f.flag("tie_word_embeddings"),
        apart=towers.llama4(whole, f.hidden) if whole is not f else (),
    )


def _gpt_oss(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias", default=True)
    return decoder(
        f,
        stack(
            f,
            grouped(f, head_dim=64, bias=bias, out_bias=bias, sinks=True),
            norms=norms(f),
            experts=routed(
                f,
                router="router",
                each="experts",
                names=FUSED,
                width=("intermediate_size",),
                bias=True,
            ),
            windows=sliding(f, f.maybe("sliding_window", 128), lambda i: i % 2 == 0),
        ),
        whole=whole,
    )


def _granitemoe(f: Fields, whole: Fields) -> Architecture:
    bias, names = f.flag("attention_bias"), ("input_linear", "input_linear", "output_linear")
    shared = f.whole("shared_intermediate_size", default=0, least=0)
    experts = routed(
        f,
        path="block_sparse_moe",
        router="router.layer",
        each="",
        names=names,
        width=("intermediate_size",),
        shared=1 if shared else 0,
        shared_weights=gated("shared_mlp", f.hidden, shared, "shared", names=names),
    )
    attention = grouped(f, bias=bias, out_bias=bias)
    return decoder(f, stack(f, attention, norms=norms(f), experts=experts), whole=whole)


def _aria(f: Fields, whole: Fields) -> Architecture:
    bias, width = f.flag("attention_bias"), f.whole("moe_intermediate_size", "intermediate_size")
    shared = f.whole("moe_num_shared_experts", default=2, least=0)
    experts = routed(
        f,
        router="router",
        each="experts",
        names=("fc1", "fc1", "fc2"),
        num=("moe_num_experts",),
        top_k=("moe_topk",),
        width=("moe_intermediate_size", "intermediate_size"),
        shared=shared,
        shared_weights=gated(
            "mlp.shared_experts", f.hidden, shared * width, "shared", bias=f.flag("mlp_bias")
        ),
    )
    attention = grouped(f, bias=bias, out_bias=bias)
    return decoder(
        f,
        stack(f, attention, norms=norms(f), experts=experts),
        whole=whole,
        apart=towers.aria(whole, f.hidden) if whole is not f else (),
    )


def _grok1(f: Fields, whole: Fields) -> Architecture:
    layers = stack(
        f,
        grouped(f, path="attn"),
        norms=norms(f, "pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"),
        experts=routed(
            f,
            path="moe_block",
            names=("linear", "linear_v", "linear_1"),
            width=("moe_intermediate_size", "intermediate_size"),
        ),
    )
    return decoder(f, layers, whole=whole)


def _arctic(f: Fields, whole: Fields) -> Architecture:
    # Where a layer has experts, a dense FFN of the hidden width runs beside them.
    hidden, width = f.hidden, f.whole("intermediate_size")
    attention, before = grouped(f), norms(f)
    experts = routed(f, path="block_sparse_moe", names=W1_W3_W2, width=("intermediate_size",))
    step = f.whole("moe_layer_frequency", default=2)
    beside = f.flag("use_residual", default=True)
    plain = Layer(
        attention=attention,
        norms=before,
        dense=gated("block_sparse_moe.mlp", hidden, width, "dense", names=W1_W3_W2),
    )
    sparse = Layer(
        attention=attention,
        norms=before + (norms(f, "residual_layernorm") if beside else ()),
        dense=gated("residual_mlp", hidden, hidden if beside else 0, "dense", names=W1_W3_W2),
        experts=experts,
    )
    layers = once(plain if (i + 1) % step else sparse for i in range(f.layers))
    return decoder(f, layers, whole=whole)


def _switch(f: Fields, whole: Fields) -> Architecture:
    """Encoder and decoder (Switch Transformers §2), the decoder's layers with cross attention.

    One expert per token: the family has no top-k. The relative position biases are tables
    that are looked up, not multiplied; they stand as vectors.
    """
    hidden, width, num = f.hidden, f.whole("d_ff"), f.whole("num_experts")
    layers = f.whole("num_decoder_layers", default=f.layers)
    experts = Experts(
        num=num,
        top_k=1,
        width=width,
        router=(
            Weight(
                name="mlp.router.classifier",
                part="router",
                shape=(num, hidden),
                bias=f.flag("router_bias"),
            ),
        ),
        expert=towers.plain("mlp.experts.*", hidden, width, "expert"),
    )
    dense = towers.plain("mlp", hidden, width, "dense")
    step = towers.sparse_step(f, "decoder", layers)
    attention = towers.t5_attention(f, "layer.0.SelfAttention", "layer.1.EncDecAttention")
    built = tuple(
        Layer(
            attention=towers.with_positions(f, attention) if i == 0 else attention,
            norms=norms(f, *(f"layer.{n}.layer_norm" for n in range(3))),
            dense=() if (sparse := i % step == 1 or step == 1) else dense,
            experts=experts if sparse else None,
        )
        for i in range(layers)
    )
    return decoder(
        f,
        once(built),
        whole=whole,
        tied=whole.flag("tie_word_embeddings", default=True),
        embedding="shared",
        final=norms(f, "decoder.final_layer_norm"),
        apart=towers.switch_encoder(f, experts, dense),
    )


def _dense(
    f: Fields,
    whole: Fields,
    *,
    attention: Attention | None = None,
    names: tuple[str, ...] = (),
    ffn_names: Names = GATE_UP_DOWN,
    windows: tuple[int | None, ...] | int | None = None,
    tied: bool | None = None,
) -> Architecture:
    bias = f.flag("attention_bias")
    layers = stack(
        f,
        attention or grouped(f, bias=bias, out_bias=bias),
        norms=norms(f, *names),
        dense=_dense_ffn(f, bias=f.flag("mlp_bias"), names=ffn_names),
        windows=windows,
    )
    return decoder(f, layers, whole=whole, tied=tied)


def _mistral(f: Fields, whole: Fields) -> Architecture:
    return _dense(f, whole, attention=grouped(f), windows=f.maybe("sliding_window", 4096))


def _qwen2(f: Fields, whole: Fields) -> Architecture:
    return _dense(f, whole, attention=grouped(f, bias=True), windows=_qwen_windows(f))


def _qwen3(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    attention = grouped(f, head_dim=128, bias=bias, out_bias=bias, norm=_QK)
    return _dense(f, whole, attention=attention, windows=_qwen_windows(f))


def _gemma(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    return _dense(
        f,
        whole,
        attention=grouped(f, head_dim=256, bias=bias, out_bias=bias),
        tied=whole.flag("tie_word_embeddings", default=True),
    )


def _gemma2(f: Fields, whole: Fields) -> Architecture:
    return _gemma_sandwich(f, whole, every=2, norm=None)


def _gemma3(f: Fields, whole: Fields) -> Architecture:
    every = f.whole("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return _gemma_sandwich(f, whole, every=every, norm=_QK)


def _gemma_sandwich(
    f: Fields, whole: Fields, *, every: int, norm: tuple[str, str] | None
) -> Architecture:
    bias = f.flag("attention_bias")
    return _dense(
        f,
        whole,
        attention=grouped(f, head_dim=256, bias=bias, out_bias=bias, norm=norm),
        names=_SANDWICH,
        windows=sliding(f, f.maybe("sliding_window", 4096), lambda i: (i + 1) % every != 0),
        tied=whole.flag("tie_word_embeddings", default=True),
    )


def _olmo2(f: Fields, whole: Fields) -> Architecture:
    return _dense(f, whole, attention=_olmo_attention(f), names=_AFTER)


def _olmo3(f: Fields, whole: Fields) -> Architecture:
    windows = sliding(f, f.maybe("sliding_window", 4096), lambda i: (i + 1) % 4 != 0)
    return _dense(f, whole, attention=_olmo_attention(f), names=_AFTER, windows=windows)


def _olmo_attention(f: Fields) -> Attention:
    bias = f.flag("attention_bias")
    return grouped(f, bias=bias, out_bias=bias, norm=_QK, norm_whole=True)


def _phi3(f: Fields, whole: Fields) -> Architecture:
    attention = grouped(f, names=("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"))
    return _dense(f, whole, attention=attention, ffn_names=FUSED, windows=f.maybe("sliding_window"))


def _estimate(f: Fields, whole: Fields) -> Architecture:
    """By the fields that most families share."""
    bias = f.flag("attention_bias") or f.flag("qkv_bias")
    num = next((n for key in _NUM if (n := f.maybe(key))), None)
    experts = None
    if num and num > 1:
        shared = next((n for key in _SHARED if (n := f.maybe(key))), 0)
        width = f.whole(*_WIDTH)
        together = f.maybe("shared_expert_intermediate_size") or shared * width
        experts = routed(
            f,
            num=_NUM,
            top_k=_TOP_K,
            width=_WIDTH,
            shared=shared or (1 if together else 0),
            shared_weights=gated("mlp.shared_experts", f.hidden, together, "shared"),
        )
    first, step = _after_first(f, 0), _stepped(f)
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


_NUM = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_selected_experts")
_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)


def _language_only(language: Architecture) -> Architecture:
    """A known language model inside a wrapper that is not spelled out here."""
    return replace(language, exact=False)


def _dense_ffn(f: Fields, *, bias: bool = False, names: Names = GATE_UP_DOWN) -> tuple[Weight, ...]:
    return gated("mlp", f.hidden, f.whole("intermediate_size"), "dense", names=names, bias=bias)


def _with_shared(f: Fields, shared: int, *, correction: str | None, bias: bool = False) -> Experts:
    """Experts beside `shared` ones, which checkpoints hold as one wide FFN."""
    width = shared * f.whole("moe_intermediate_size")
    return routed(
        f,
        num=("n_routed_experts", "num_local_experts", "num_experts"),
        correction=correction,
        shared=shared,
        shared_weights=gated("mlp.shared_experts", f.hidden, width, "shared", bias=bias),
    )


def _stepped(f: Fields) -> Callable[[int], bool]:
    """Experts in every n-th layer, but in none that is listed as dense."""
    step, dense = f.whole("decoder_sparse_step", default=1), set(f.items("mlp_only_layers"))
    return lambda i: i not in dense and (i + 1) % step == 0


def _after_first(f: Fields, usual: int) -> Callable[[int], bool]:
    """Experts in every n-th layer after the first dense ones."""
    first = f.whole("first_k_dense_replace", default=usual, least=0)
    step = f.whole("moe_layer_freq", default=1)
    return lambda i: i >= first and i % step == 0


def _qwen_windows(f: Fields) -> tuple[int | None, ...]:
    window = f.maybe("sliding_window", 4096) if f.flag("use_sliding_window") else None
    first = f.whole("max_window_layers", default=28, least=0)
    return sliding(f, window, lambda i: i >= first)


_FAMILIES: dict[str, Reader] = {
    "arctic": _arctic,
    "aria": _aria,
    "aria_text": _aria,
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "deepseek_vl_v2": _deepseek_vl2,
    "dots1": _dots1,
    "ernie4_5_moe": _ernie,
    "flex_olmo": _flex_olmo,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "granite": _dense,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoe,
    "grok-1": _grok1,
    "hunyuan_v1_moe": _hunyuan,
    "llama": _dense,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "minimax_m2": _minimax_m2,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "molmo": _molmo,
    "molmoe": _molmo,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "olmoe": _olmoe,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_vl_moe": _qwen3_moe,
    "qwen3_vl_moe_text": _qwen3_moe,
    "switch_transformers": _switch,
}
