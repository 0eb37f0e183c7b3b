"""Switch Transformers, the one family here with an encoder."""

from __future__ import annotations

from dataclasses import replace

from workers.moe.blocks import (
    Apart,
    decoder,
    norms,
    once,
)
from workers.moe.fields import Fields
from workers.moe.structure import Architecture, Attention, Experts, Layer, Part, Weight


def switch(f: Fields, whole: Fields) -> Architecture:
    """Encoder and decoder (Switch Transformers §2), the decoder's layers with cross attention.

    One expert per token: the family has no top-k. The relative position biases are tables
    that are looked up, not multiplied; they stand as vectors.
    """
    hidden, width, num = f.hidden, f.whole("d_ff"), f.whole("num_experts")
    layers = f.depth("num_decoder_layers", default=f.layers)
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
        expert=_plain("mlp.experts.*", hidden, width, "expert"),
    )
    dense = _plain("mlp", hidden, width, "dense")
    step = _sparse_step(f, "decoder", layers)
    attention = _t5_attention(f, "layer.0.SelfAttention", "layer.1.EncDecAttention")
    built = tuple(
        Layer(
            attention=_with_positions(f, attention) if i == 0 else attention,
            norms=norms(f, *(f"layer.{n}.layer_norm" for n in range(3))),
            dense=() if (sparse := _is_sparse(i, step)) else dense,
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
        apart=_encoder(f, experts, dense),
    )


def _t5_attention(f: Fields, *paths: str) -> Attention:
    """Multi-head attention of T5, whose heads need not add up to the hidden width.

    The second path is attention to the encoder; its keys and values are cached per source
    token, not per generated one, so they are no part of `cached_values`.
    """
    hidden, heads, dim = f.hidden, f.heads, f.whole("d_kv", default=64)
    return Attention(
        heads=heads,
        kv_heads=heads,
        qk_dim=dim,
        v_dim=dim,
        weights=tuple(
            Weight(
                name=f"{path}.{name}",
                part="attention",
                shape=(hidden, heads * dim) if name == "o" else (heads * dim, hidden),
                cut="in" if name == "o" else "out",
            )
            for path in paths
            for name in ("q", "k", "v", "o")
        ),
    )


def _with_positions(f: Fields, attention: Attention) -> Attention:
    """The first layer's attention, which holds the position biases for all."""
    return replace(attention, weights=(*attention.weights, _positions(f)))


def _positions(f: Fields) -> Weight:
    """Relative position biases, one per bucket and head."""
    buckets = f.whole("relative_attention_num_buckets", default=32)
    return Weight(
        name="layer.0.SelfAttention.relative_attention_bias",
        part="attention",
        shape=(buckets * f.heads,),
        cut="out",
    )


def _sparse_step(f: Fields, side: str, layers: int) -> int:
    """How often the encoder or the decoder of Switch has a layer with experts."""
    sparse = f.whole(f"num_sparse_{side}_layers", default=3, least=0)
    step = layers // sparse if sparse else layers
    return f.whole(f"{side}_sparse_step", default=step, least=0)


def _is_sparse(layer: int, step: int) -> bool:
    """The second of every `step` layers has experts; with 0 none has."""
    return step == 1 or (step > 1 and layer % step == 1)


def _plain(path: str, hidden: int, width: int, part: Part) -> tuple[Weight, ...]:
    """An FFN without a gate."""
    return (
        Weight(name=f"{path}.wi", part=part, shape=(width, hidden), cut="out"),
        Weight(name=f"{path}.wo", part=part, shape=(hidden, width), cut="in"),
    )


def _encoder(f: Fields, experts: Experts, dense: tuple[Weight, ...]) -> Apart:
    """The encoder of Switch, layer by layer summed up."""
    layers = f.layers
    step = _sparse_step(f, "encoder", layers)
    sparse = sum(_is_sparse(i, step) for i in range(layers))
    copies = [(weight, layers) for weight in _t5_attention(f, "layer.0.SelfAttention").weights]
    copies += [(weight, layers) for weight in norms(f, "layer.0.layer_norm", "layer.1.layer_norm")]
    copies += [(weight, sparse) for weight in experts.router]
    copies += [(weight, sparse * experts.num) for weight in experts.expert]
    copies += [(weight, layers - sparse) for weight in dense]
    copies += [(_positions(f), 1), *((weight, 1) for weight in norms(f, "final_layer_norm"))]
    return tuple(
        (replace(weight, part="encoder", name=f"encoder.{weight.name}"), n)
        for weight, n in copies
        if n
    )
