"""Building blocks that the families share: attention, FFN, experts, a stack of them.

Names are those of checkpoints. Matrices that a checkpoint fuses (`qkv_proj`) are listed
apart under the fused name, because their parts are cut differently and counted alone.
How tensor parallelism cuts each follows vLLM's layers: queries and up-projections by
outputs, what follows them by inputs, keys and values by heads, latents and routers not at
all.

Structures of a sweep differ in a few widths, so weights that are alike are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, lru_cache

from workers.moe.fields import Fields
from workers.moe.structure import Architecture, Attention, Cut, Experts, Layer, Part, Weight

Names = tuple[str, str, str]
"""Gate, up and down projection of a gated FFN."""

GATE_UP_DOWN: Names = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2: Names = ("w1", "w3", "w2")
FUSED: Names = ("gate_up_proj", "gate_up_proj", "down_proj")

QK = ("q_norm", "k_norm")
"""Norms of queries and keys."""

AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Norms of a layer that stand after attention and FFN."""

Apart = tuple[tuple[Weight, int], ...]
"""Weights outside the decoder, each with its copies."""


def grouped(
    f: Fields,
    *,
    path: str = "self_attn",
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    head_dim: int | None = None,
    kv_heads: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    norm: tuple[str, str] | None = None,
    norm_whole: bool = False,
    norm_cut: bool = False,
    sinks: bool = False,
) -> Attention:
    """Multi-head or grouped-query attention.

    `head_dim` is what the family assumes where the configuration does not say; `norm`
    names the norms of queries and keys, `norm_whole` has them over all heads at once and
    `norm_cut` says that the engine cuts those; `sinks` adds one learned logit per head.
    """
    hidden, heads = f.hidden, f.heads
    kv = kv_heads or f.whole("num_key_value_heads", "n_kv_heads", default=heads)
    dim = f.maybe("head_dim", head_dim) or hidden // heads
    q, k, v, o = (_join(path, name) for name in names)
    weights = [
        _weight("attention", q, (heads * dim, hidden), "out", bias=bias),
        _weight("attention", k, (kv * dim, hidden), "kv", bias=bias),
        _weight("attention", v, (kv * dim, hidden), "kv", bias=bias),
        _weight("attention", o, (hidden, heads * dim), "in", bias=out_bias),
    ]
    if norm:
        sizes = (heads * dim, kv * dim) if norm_whole else (dim, dim)
        cuts: tuple[Cut, Cut] = ("out", "kv") if norm_cut else ("none", "none")
        weights += (
            _weight("attention", _join(path, name), (size,), cut)
            for name, size, cut in zip(norm, sizes, cuts, strict=True)
        )
    if sinks:
        weights.append(_weight("attention", _join(path, "sinks"), (heads,), "out"))
    return Attention(heads=heads, kv_heads=kv, qk_dim=dim, v_dim=dim, weights=tuple(weights))


def latent(f: Fields, *, q_rank: int | None = 1536, kv_rank: int = 512) -> Attention:
    """Multi-head latent attention (DeepSeek-V2 §2.1), with queries compressed or not."""
    hidden, heads = f.hidden, f.heads
    rank = f.whole("kv_lora_rank", default=kv_rank)
    nope = f.whole("qk_nope_head_dim", default=128)
    rope = f.whole("qk_rope_head_dim", default=64)
    v_dim = f.whole("v_head_dim", default=128)
    bias = f.flag("attention_bias")
    queries = heads * (nope + rope)
    q: tuple[Weight, ...]
    if compressed := f.maybe("q_lora_rank", q_rank):
        q = (
            _weight("attention", "self_attn.q_a_proj", (compressed, hidden), "none", bias=bias),
            _weight("attention", "self_attn.q_a_layernorm", (compressed,), "none"),
            _weight("attention", "self_attn.q_b_proj", (queries, compressed), "out"),
        )
    else:
        q = (_weight("attention", "self_attn.q_proj", (queries, hidden), "out"),)
    return Attention(
        heads=heads,
        kv_heads=heads,
        qk_dim=nope + rope,
        v_dim=v_dim,
        latent=rank,
        rope=rope,
        weights=(
            *q,
            _weight(
                "attention",
                "self_attn.kv_a_proj_with_mqa",
                (rank + rope, hidden),
                "none",
                bias=bias,
            ),
            _weight("attention", "self_attn.kv_a_layernorm", (rank,), "none"),
            _weight("attention", "self_attn.kv_b_proj", (heads * (nope + v_dim), rank), "out"),
            _weight("attention", "self_attn.o_proj", (hidden, heads * v_dim), "in", bias=bias),
        ),
    )


@lru_cache(maxsize=4096)
def gated(
    path: str,
    hidden: int,
    width: int,
    part: Part,
    *,
    names: Names = GATE_UP_DOWN,
    bias: bool = False,
) -> tuple[Weight, ...]:
    """A gated FFN; empty where its width is 0."""
    if not width:
        return ()
    gate, up, down = (f"{path}.{name}" for name in names)
    return (
        Weight(name=gate, part=part, shape=(width, hidden), bias=bias, cut="out"),
        Weight(name=up, part=part, shape=(width, hidden), bias=bias, cut="out"),
        Weight(name=down, part=part, shape=(hidden, width), bias=bias, cut="in"),
    )


def routed(
    f: Fields,
    *,
    path: str = "mlp",
    router: str = "gate",
    each: str = "experts.*",
    names: Names = GATE_UP_DOWN,
    num: tuple[str, ...] = ("num_local_experts", "num_experts", "n_routed_experts"),
    top_k: tuple[str, ...] = ("num_experts_per_tok",),
    width: tuple[str, ...] = ("moe_intermediate_size",),
    bias: bool = False,
    correction: str | None = None,
    shared: int = 0,
    shared_weights: tuple[Weight, ...] = (),
) -> Experts:
    """Gated experts behind a router.

    `num`, `top_k` and `width` are the keys to read. `bias` is for the router and every
    projection. `correction` names the bias that is added to scores for the choice of
    experts only. Checkpoints and vLLM hold it as a parameter, so it counts as one here;
    transformers keeps it as a buffer in most families.
    """
    experts, expert_width = f.whole(*num), f.whole(*width)
    weights = [_weight("router", _join(path, router), (experts, f.hidden), bias=bias)]
    if correction:
        weights.append(_weight("router", _join(path, correction), (experts,)))
    return Experts(
        num=experts,
        top_k=f.whole(*top_k),
        width=expert_width,
        shared=shared,
        router=tuple(weights),
        expert=gated(_join(path, each), f.hidden, expert_width, "expert", names=names, bias=bias),
        shared_weights=shared_weights,
    )


@lru_cache(maxsize=4096)
def vectors(part: Part, size: int, *names: str, bias: bool = False) -> tuple[Weight, ...]:
    """Norms and the like: one vector of `size` for each name."""
    return tuple(Weight(name=name, part=part, shape=(size,), bias=bias) for name in names)


def norms(
    f: Fields,
    *names: str,
    bias: bool = False,
) -> tuple[Weight, ...]:
    """Norms of a layer; without names the two that stand before attention and FFN."""
    usual = ("input_layernorm", "post_attention_layernorm")
    return vectors("norm", f.hidden, *(names or usual), bias=bias)


def sliding(
    f: Fields,
    window: int | None,
    usual: Callable[[int], bool],
    *,
    kinds: Iterable[str] = ("sliding_attention", "chunked_attention"),
) -> tuple[int | None, ...]:
    """Window of each layer: by `layer_types`, or where that is missing, by `usual`."""
    types, narrow = f.per_layer("layer_types"), set(kinds)
    return tuple(
        window if (types[i] in narrow if types else usual(i)) else None for i in range(f.layers)
    )


def stack(
    f: Fields,
    attention: Attention,
    *,
    norms: tuple[Weight, ...],
    dense: tuple[Weight, ...] = (),
    experts: Experts | None = None,
    sparse: Callable[[int], bool] = lambda _: True,
    windows: Sequence[int | None] | int | None = None,
) -> tuple[Layer, ...]:
    """All layers: with `experts` where `sparse` says so, with the `dense` FFN elsewhere.

    `windows` is one for all layers, or one for each.
    """
    kinds: dict[tuple[int | None, bool], Layer] = {}
    layers = []
    for i in range(f.layers):
        window = windows[i] if isinstance(windows, Sequence) else windows
        moe = experts if experts is not None and sparse(i) else None
        kind = (window, moe is not None)
        if kind not in kinds:
            chunked = attention.chunked and window is not None
            alike = (window, chunked) == (attention.window, attention.chunked)
            kinds[kind] = Layer(
                attention=attention
                if alike
                else replace(attention, window=window, chunked=chunked),
                norms=norms,
                dense=() if moe else dense,
                experts=moe,
            )
        layers.append(kinds[kind])
    return tuple(layers)


def once(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The same layers, those that are alike as one object."""
    seen: dict[Layer, Layer] = {}
    return tuple(seen.setdefault(layer, layer) for layer in layers)


def dense_ffn(f: Fields, *, bias: bool = False, names: Names = GATE_UP_DOWN) -> tuple[Weight, ...]:
    return gated("mlp", f.hidden, f.whole("intermediate_size"), "dense", names=names, bias=bias)


def stepped(f: Fields) -> Callable[[int], bool]:
    """Experts in every n-th layer, but in none that is listed as dense."""
    step, dense = f.whole("decoder_sparse_step", default=1), set(f.numbers("mlp_only_layers"))
    return lambda i: i not in dense and (i + 1) % step == 0


def after_first(f: Fields, usual: int) -> Callable[[int], bool]:
    """Experts in every n-th layer after the first dense ones."""
    first = f.whole("first_k_dense_replace", default=usual, least=0)
    step = f.whole("moe_layer_freq", default=1)
    return lambda i: i >= first and i % step == 0


def decoder(
    f: Fields,
    layers: tuple[Layer, ...],
    *,
    whole: Fields | None = None,
    tied: bool | None = None,
    embedding: str = "model.embed_tokens",
    final: tuple[Weight, ...] | None = None,
    head_bias: bool = False,
    vocab: int | None = None,
    extra: tuple[Weight, ...] = (),
    apart: Apart = (),
    exact: bool = True,
) -> Architecture:
    """A language model around `layers`.

    `whole` is the configuration that `f` is a part of. Where `tied` is null the usual field
    says whether the head is the embedding: of the whole, or where that is silent, of `f`.
    `extra` are embeddings beside those of the vocabulary.
    """
    outer = whole or f
    hidden = f.hidden
    vocab = vocab or f.whole("vocab_size")
    if tied is None:
        tied = outer.flag("tie_word_embeddings", default=f.flag("tie_word_embeddings"))
    after = vectors("norm", hidden, "model.norm") if final is None else final
    if tied and head_bias:
        after += (_weight("head", "lm_head", (vocab,), "vocab"),)
    return Architecture(
        family=f.word("model_type"),
        exact=exact,
        hidden_size=hidden,
        vocab_size=vocab,
        layers=layers,
        embedding=(_weight("embedding", embedding, (vocab, hidden), "vocab"), *extra),
        final=after,
        head=_weight("head", "lm_head", (vocab, hidden), "vocab", bias=head_bias),
        tied=tied,
        apart=apart,
        config=outer.config,
    )


@lru_cache(maxsize=4096)
def _weight(
    part: Part, name: str, shape: tuple[int, ...], cut: Cut = "none", *, bias: bool = False
) -> Weight:
    return Weight(name=name, part=part, shape=shape, bias=bias, cut=cut)


@cache
def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
