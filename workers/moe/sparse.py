"""Families with experts, each a reader of its language part (`f`) in a whole configuration.

What is not written in a call is as `workers.moe.blocks` has it: SwiGLU experts behind a
router without bias, grouped-query attention, two RMS norms, a head of its own.
"""

from __future__ import annotations

from dataclasses import replace

from workers.moe import towers
from workers.moe.blocks import (
    AFTER,
    FUSED,
    QK,
    W1_W3_W2,
    Apart,
    Names,
    after_first,
    decoder,
    dense_ffn,
    gated,
    grouped,
    latent,
    norms,
    once,
    routed,
    sliding,
    stack,
    stepped,
)
from workers.moe.fields import Fields
from workers.moe.structure import Architecture, Experts, Layer, Weight


def mixtral(f: Fields, whole: Fields) -> Architecture:
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


def minimax_m2(f: Fields, whole: Fields) -> Architecture:
    experts = routed(
        f,
        path="block_sparse_moe",
        names=W1_W3_W2,
        width=("intermediate_size",),
        correction="e_score_correction_bias",
    )
    attention = grouped(f, head_dim=128, norm=QK, norm_whole=True, norm_cut=True)
    return decoder(f, stack(f, attention, norms=norms(f), experts=experts), whole=whole)


def phimoe(f: Fields, whole: Fields) -> Architecture:
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


def qwen2_moe(f: Fields, whole: Fields) -> Architecture:
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
            dense=dense_ffn(f),
            experts=experts,
            sparse=stepped(f),
            windows=sliding(f, window, lambda i: i % 2 == 0 and i < most),
        ),
        whole=whole,
    )


def qwen3_moe(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    return decoder(
        f,
        stack(
            f,
            grouped(f, bias=bias, out_bias=bias, norm=QK),
            norms=norms(f),
            dense=dense_ffn(f),
            experts=routed(f),
            sparse=stepped(f),
            windows=f.maybe("sliding_window", 4096) if f.flag("use_sliding_window") else None,
        ),
        whole=whole,
        tied=whole.flag("tie_word_embeddings"),
    )


def qwen3_vl_moe(f: Fields, whole: Fields) -> Architecture:
    return replace(qwen3_moe(f, whole), apart=towers.qwen3_vl(whole))


def deepseek_v2(f: Fields, whole: Fields) -> Architecture:
    return _deepseek(f, whole, first=0, shared=2, ffn_bias=f.flag("mlp_bias"))


def deepseek_v3(f: Fields, whole: Fields) -> Architecture:
    return _deepseek(f, whole, first=3, shared=1, choice="noaux_tc")


def deepseek_vl2(f: Fields, whole: Fields) -> Architecture:
    return _deepseek(f, whole, first=0, shared=2, apart=towers.deepseek_vl2(whole, f.hidden))


def glm4_moe(f: Fields, whole: Fields) -> Architecture:
    return decoder(
        f,
        stack(
            f,
            grouped(
                f,
                bias=f.flag("attention_bias"),
                norm=QK if f.flag("use_qk_norm") else None,
            ),
            norms=norms(f),
            dense=dense_ffn(f),
            experts=_with_shared(
                f,
                f.whole("n_shared_experts", default=1, least=0),
                correction="gate.e_score_correction_bias",
            ),
            sparse=after_first(f, 1),
        ),
        whole=whole,
    )


def dots1(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    most = f.whole("max_window_layers", default=62, least=0)
    return decoder(
        f,
        stack(
            f,
            grouped(f, bias=bias, out_bias=bias, norm=QK),
            norms=norms(f),
            dense=dense_ffn(f),
            experts=_with_shared(
                f,
                f.whole("n_shared_experts", default=0, least=0),
                correction="gate.e_score_correction_bias",
            ),
            sparse=after_first(f, 0),
            windows=sliding(f, f.maybe("sliding_window", 4096), lambda i: i >= most),
        ),
        whole=whole,
    )


def ernie(f: Fields, whole: Fields) -> Architecture:
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
            dense=dense_ffn(f, bias=bias),
            experts=experts,
            sparse=lambda i: i >= start and (end < 0 or i <= end) and (i + 1) % step == 0,
        ),
        whole=whole,
        tied=whole.flag("tie_word_embeddings", default=True),
        head_bias=bias,
    )


def hunyuan(f: Fields, whole: Fields) -> Architecture:
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


def olmoe(f: Fields, whole: Fields) -> Architecture:
    return _olmo_experts(f, whole, "input_layernorm", "post_attention_layernorm")


def flex_olmo(f: Fields, whole: Fields) -> Architecture:
    return _olmo_experts(f, whole, *AFTER)


def molmo(f: Fields, whole: Fields) -> Architecture:
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
        path="",
        names=("att_proj", "att_proj", "att_proj", "attn_out"),
        bias=f.flag("qkv_bias"),
        norm=QK if f.flag("attention_layer_norm") else None,
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


def dbrx(f: Fields, whole: Fields) -> Architecture:
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


def llama4(f: Fields, whole: Fields) -> Architecture:
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
        else f.numbers("moe_layers")
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
    )


def llama4_vision(f: Fields, whole: Fields) -> Architecture:
    return replace(llama4(f, whole), apart=towers.llama4(whole, f.hidden))


def gpt_oss(f: Fields, whole: Fields) -> Architecture:
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


def granitemoe(f: Fields, whole: Fields) -> Architecture:
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


def aria(f: Fields, whole: Fields) -> Architecture:
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
    )


def aria_vision(f: Fields, whole: Fields) -> Architecture:
    return replace(aria(f, whole), apart=towers.aria(whole, f.hidden))


def grok1(f: Fields, whole: Fields) -> Architecture:
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


def arctic(f: Fields, whole: Fields) -> Architecture:
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
            dense=dense_ffn(f, bias=ffn_bias),
            experts=experts,
            sparse=after_first(f, first),
        ),
        whole=whole,
        apart=apart,
    )


def _olmo_experts(f: Fields, whole: Fields, *names: str) -> Architecture:
    bias = f.flag("attention_bias")
    attention = grouped(f, bias=bias, out_bias=bias, norm=QK, norm_whole=True)
    experts = routed(f, width=("intermediate_size",))
    return decoder(f, stack(f, attention, norms=norms(f, *names), experts=experts), whole=whole)


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
