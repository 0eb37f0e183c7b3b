"""Families without experts, which sweeps use as drafts and for comparison.

Each is a reader of its language part (`f`) in a whole configuration, as in
`workers.moe.sparse`.
"""

from __future__ import annotations

from workers.moe.blocks import (
    AFTER,
    FUSED,
    GATE_UP_DOWN,
    QK,
    Names,
    decoder,
    dense_ffn,
    grouped,
    norms,
    sliding,
    stack,
)
from workers.moe.fields import Fields
from workers.moe.structure import Architecture, Attention

_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def plain(
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
        dense=dense_ffn(f, bias=f.flag("mlp_bias"), names=ffn_names),
        windows=windows,
    )
    return decoder(f, layers, whole=whole, tied=tied)


def mistral(f: Fields, whole: Fields) -> Architecture:
    return plain(f, whole, attention=grouped(f), windows=f.maybe("sliding_window", 4096))


def qwen2(f: Fields, whole: Fields) -> Architecture:
    return plain(f, whole, attention=grouped(f, bias=True), windows=_qwen_windows(f))


def qwen3(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    attention = grouped(f, head_dim=128, bias=bias, out_bias=bias, norm=QK)
    return plain(f, whole, attention=attention, windows=_qwen_windows(f))


def gemma(f: Fields, whole: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    return plain(
        f,
        whole,
        attention=grouped(f, head_dim=256, bias=bias, out_bias=bias),
        tied=whole.flag("tie_word_embeddings", default=True),
    )


def gemma2(f: Fields, whole: Fields) -> Architecture:
    return _gemma_sandwich(f, whole, every=2, norm=None)


def gemma3(f: Fields, whole: Fields) -> Architecture:
    every = f.whole("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return _gemma_sandwich(f, whole, every=every, norm=QK)


def olmo2(f: Fields, whole: Fields) -> Architecture:
    return plain(f, whole, attention=_olmo_attention(f), names=AFTER)


def olmo3(f: Fields, whole: Fields) -> Architecture:
    windows = sliding(f, f.maybe("sliding_window", 4096), lambda i: (i + 1) % 4 != 0)
    return plain(f, whole, attention=_olmo_attention(f), names=AFTER, windows=windows)


def phi3(f: Fields, whole: Fields) -> Architecture:
    attention = grouped(f, names=("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"))
    return plain(f, whole, attention=attention, ffn_names=FUSED, windows=f.maybe("sliding_window"))


def _gemma_sandwich(
    f: Fields, whole: Fields, *, every: int, norm: tuple[str, str] | None
) -> Architecture:
    bias = f.flag("attention_bias")
    return plain(
        f,
        whole,
        attention=grouped(f, head_dim=256, bias=bias, out_bias=bias, norm=norm),
        names=_SANDWICH,
        windows=sliding(f, f.maybe("sliding_window", 4096), lambda i: (i + 1) % every != 0),
        tied=whole.flag("tie_word_embeddings", default=True),
    )


def _olmo_attention(f: Fields) -> Attention:
    bias = f.flag("attention_bias")
    return grouped(f, bias=bias, out_bias=bias, norm=QK, norm_whole=True)


def _qwen_windows(f: Fields) -> tuple[int | None, ...]:
    window = f.maybe("sliding_window", 4096) if f.flag("use_sliding_window") else None
    first = f.whole("max_window_layers", default=28, least=0)
    return sliding(f, window, lambda i: i >= first)
