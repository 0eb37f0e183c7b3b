"""Bytes and FLOPs of forward passes, against golden numbers and sums made by hand."""

from __future__ import annotations

import gc
import time
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest

from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.moe import accounting
from workers.moe.accounting import (
    Cost,
    Slice,
    decode,
    decode_total,
    distinct_experts,
    expected_activation,
    forward,
    kv_cache_bytes,
    prefill,
    stage_layers,
    weight_bytes,
)
from workers.moe.architecture import resolve
from workers.moe.precision import Precision
from workers.moe.structure import Architecture

BF16 = Precision(dtype="bfloat16", kv_dtype="bfloat16")

EXPERT, ATTENTION, LAYERS, HIDDEN, VOCAB = 176_160_768, 41_943_040, 32, 4096, 32000
"""Of Mixtral-8x7B: parameters of an expert, of a layer's attention, and its shape."""
KV = 8 * 128 * 2
"""Values that a token caches in one layer of Mixtral-8x7B."""


@cache
def model(name: str) -> Architecture:
    a = resolve(Model(name=name))
    assert a is not None
    return a


def mixtral() -> Architecture:
    return model("mixtral-8x7b")


def windowed(window: int, *, chunked: bool = False) -> Architecture:
    """Mixtral-8x7B whose odd layers see `window` tokens."""
    a = mixtral()
    near = replace(
        a.layers[0], attention=replace(a.layers[0].attention, window=window, chunked=chunked)
    )
    return replace(a, layers=(a.layers[0], near) * (LAYERS // 2))


def approx(cost: Cost) -> list[object]:
    return [pytest.approx(getattr(cost, one.name), rel=1e-12) for one in fields(Cost)]


def values(cost: Cost) -> list[float]:
    return [getattr(cost, one.name) for one in fields(Cost)]


# Golden numbers of the papers.


def test_flops_per_token_of_mixtral_count_every_chosen_expert() -> None:
    """25.2 GFLOP: attention projections, router and two experts, without scores and head.

    Defect: with one expert per token it is 13.96.
    """
    total = forward(mixtral(), BF16, decode(1, 0)).total
    assert (total.flops_paper - total.score_flops) / 1e9 == pytest.approx(25.2, abs=0.05)
    one = total.flops_paper - total.score_flops - total.expert_flops / 2
    assert one / 1e9 == pytest.approx(13.96, abs=0.005)
    assert total.flops_paper - total.score_flops == LAYERS * (
        2 * ATTENTION + 2 * 8 * HIDDEN + 2 * 2 * EXPERT
    )


@pytest.mark.parametrize(
    ("name", "share"),
    [("deepseek-v2-lite", 57.15), ("qwen1.5-moe-a2.7b", 47.60), ("deepseek-r1", 24.19)],
)
def test_share_of_parameters_activated_at_batch_8(name: str, share: float) -> None:
    """Eq 4 counts dense FFN layers, and neither router nor norms, embedding or head."""
    a = model(name)
    some = forward(a, BF16, decode(8, 0)).total
    every = [layer.experts.num if layer.experts else 0.0 for layer in a.layers]
    full = forward(a, BF16, decode(8, 0), activated=every).total
    assert 100 * some.active_bytes_paper / full.active_bytes_paper == pytest.approx(
        share, abs=0.005
    )


def test_distinct_experts_under_uniform_routing() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2)
    assert distinct_experts(64, 6, 8) == pytest.approx(64 * (1 - (58 / 64) ** 8))
    assert distinct_experts(8, 8, 5) == 8
    assert distinct_experts(60, 4, 10_000) == pytest.approx(60)


# Structure: nothing is lost, nothing is averaged away.


def test_every_parameter_is_read_when_every_expert_is_active() -> None:
    """Defect: router, norms, head and embedding without bytes."""
    for name in ("mixtral-8x7b", "deepseek-v2-lite", "qwen1.5-moe-a2.7b", "olmoe-1b-7b"):
        a = model(name)
        every = [layer.experts.num if layer.experts else 0.0 for layer in a.layers]
        total = forward(a, BF16, decode(1, 0), activated=every).total
        rows = total.embedding_bytes
        assert rows == 2 * a.hidden_size
        assert total.weight_bytes - rows == 2 * a.params_total - 2 * a.embedding[0].params
        assert min(total.router_bytes, total.norm_bytes, total.head_bytes) > 0


def test_one_token_reads_the_active_parameters() -> None:
    a = mixtral()
    total = forward(a, BF16, decode(1, 0)).total
    assert total.weight_bytes == 2 * a.params_active_no_embedding + 2 * HIDDEN
    assert total.activated == 2 * LAYERS


def test_shared_experts_dense_layers_and_latents_come_from_the_structure() -> None:
    """Defect: what a model consists of looked up by a piece of its name."""
    a = replace(model("deepseek-v2-lite"), family="someone's own")
    cost = forward(a, BF16, decode(1, 100))
    assert cost.layers[0].dense_bytes == 2 * 3 * 2048 * 10944
    assert cost.layers[0].expert_bytes == cost.layers[0].activated == 0
    assert cost.layers[1].shared_bytes == 2 * 3 * 2048 * 2 * 1408
    assert cost.layers[1].dense_bytes == 0
    assert cost.layers[1].kv_read_bytes == 2 * (512 + 64) * 101
    wide = forward(model("qwen1.5-moe-a2.7b"), BF16, decode(1, 0)).layers[0]
    assert wide.shared_bytes == 2 * (3 * 2048 * 5632 + 2048)  # own width, and the gate
    assert wide.shared_flops == 2 * (3 * 2048 * 5632 + 2048)


def test_activation_is_per_layer_and_dense_layers_have_none() -> None:
    """Defect: one mean over all layers, dense ones included."""
    a = model("deepseek-v2-lite")
    expected = expected_activation(a, 8)
    assert expected[0] == 0.0
    assert expected[1:] == (distinct_experts(64, 6, 8),) * 26
    traced = [0.0, 3.0, *[20.0] * 25]
    cost = forward(a, BF16, decode(8, 10), activated=traced)
    one = 2 * 3 * 2048 * 1408
    assert [layer.expert_bytes for layer in cost.layers] == [one * n for n in traced]
    assert cost.total.activated == sum(traced)


def test_activation_must_be_given_for_every_layer() -> None:
    with pytest.raises(ValueError, match="2 numbers for 32 layers"):
        forward(mixtral(), BF16, decode(1, 0), activated=[2.0, 2.0])


def test_an_expert_is_read_once_however_many_tokens_chose_it() -> None:
    two = [2.0] * LAYERS
    few = forward(mixtral(), BF16, decode(1, 0), activated=two).total
    many = forward(mixtral(), BF16, decode(64, 0), activated=two).total
    assert many.expert_bytes == few.expert_bytes
    assert many.expert_flops == 64 * few.expert_flops


# Attention and cache.


def test_decode_scores_take_each_sequence_with_its_own_context() -> None:
    """Defect: the summed context of a batch times its batch, B times too much."""
    total = forward(mixtral(), BF16, decode(16, 1000)).total
    assert total.score_flops == 16 * LAYERS * 4 * 32 * 128 * 1001
    mixed = (*decode(1, 10), *decode(1, 500))
    apart = [forward(mixtral(), BF16, (one,)).total.score_flops for one in mixed]
    assert forward(mixtral(), BF16, mixed).total.score_flops == sum(apart)


def test_cache_is_read_for_the_context_and_written_for_new_tokens() -> None:
    """Defect: cache bytes from the tokens fed instead of the context."""
    total = forward(mixtral(), BF16, decode(4, 999)).total
    assert total.kv_read_bytes == 4 * 1000 * LAYERS * KV * 2
    assert total.kv_write_bytes == 4 * LAYERS * KV * 2
    eight = Precision(dtype="bfloat16", kv_dtype="fp8")
    assert forward(mixtral(), eight, decode(4, 999)).total.kv_read_bytes == total.kv_read_bytes / 2


def test_prefill_computes_the_causal_half() -> None:
    total = forward(mixtral(), BF16, prefill(2, 100)).total
    assert total.score_flops == 2 * (100 * 101 / 2) * LAYERS * 4 * 32 * 128
    square = forward(mixtral(), BF16, prefill(2, 100), causal=False).total
    assert square.score_flops == 2 * 100 * 100 * LAYERS * 4 * 32 * 128
    assert total.kv_read_bytes == total.kv_write_bytes == 2 * 100 * LAYERS * KV * 2


def test_a_prefill_in_two_chunks_has_the_scores_of_the_whole() -> None:
    whole = forward(mixtral(), BF16, prefill(1, 700)).total
    parts = (
        forward(mixtral(), BF16, prefill(1, 300)).total
        + forward(mixtral(), BF16, prefill(1, 400, cached=300)).total
    )
    assert parts.score_flops == whole.score_flops
    assert parts.kv_write_bytes == whole.kv_write_bytes
    assert parts.attention_flops == whole.attention_flops


def test_logits_of_the_last_token_or_of_all() -> None:
    last = forward(mixtral(), BF16, prefill(3, 50)).total
    every = forward(mixtral(), BF16, prefill(3, 50), logits="all").total
    assert last.head_flops == 3 * 2 * HIDDEN * VOCAB
    assert every.head_flops == 50 * last.head_flops
    assert every.head_bytes == last.head_bytes == 2 * HIDDEN * VOCAB


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("new", "cached"), [(1, 0), (1, 6), (1, 7), (1, 30), (5, 4), (40, 0)])
def test_windows_cap_what_a_token_sees(new: int, cached: int, chunked: bool) -> None:
    window = 7
    cost = forward(windowed(window, chunked=chunked), BF16, prefill(1, new, cached)).layers[1]
    seen = [p % window + 1 if chunked else min(p + 1, window) for p in range(cached, cached + new)]
    assert cost.score_flops == sum(seen) * 4 * 32 * 128
    past = cached % window if chunked else min(cached, window - 1)
    assert cost.kv_read_bytes == (past + new) * KV * 2


EXPAND = 2 * 512 * 16 * (128 + 128)
"""FLOPs that expand one latent of DeepSeek-V2-Lite to keys and values of its 16 heads."""


def test_absorbed_latents_and_expanded_keys() -> None:
    """MLA decode on latents: 16 heads over 576 + 512; expanded: over 192 + 128."""
    a = model("deepseek-v2-lite")
    absorbed = forward(a, BF16, decode(2, 99)).layers[1]
    expanded = forward(a, BF16, decode(2, 99), absorbed=False).layers[1]
    assert absorbed.score_flops == 2 * 100 * 2 * 16 * (512 + 64 + 512)
    assert expanded.score_flops == 2 * 100 * 2 * 16 * (192 + 128)
    assert expanded.attention_flops - absorbed.attention_flops == 2 * 99 * EXPAND
    assert absorbed.kv_read_bytes == expanded.kv_read_bytes == 2 * 100 * 576 * 2


def test_a_prefill_that_goes_on_expands_the_cached_latents_again() -> None:
    a = model("deepseek-v2-lite")
    fresh = forward(a, BF16, prefill(1, 50)).layers[1]
    going = forward(a, BF16, prefill(1, 50, cached=70)).layers[1]
    assert going.attention_flops - fresh.attention_flops == 70 * EXPAND
    plain = forward(mixtral(), BF16, prefill(1, 50)).layers[1]
    after = forward(mixtral(), BF16, prefill(1, 50, cached=70)).layers[1]
    assert plain.attention_flops == after.attention_flops


# A sum over decode steps without a loop.


@pytest.mark.parametrize(
    "a",
    [mixtral(), windowed(20), windowed(16, chunked=True), model("deepseek-v2-lite")],
    ids=["full", "window", "chunks", "latents"],
)
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2, data=2, expert=True)])
@pytest.mark.parametrize("absorbed", [True, False])
def test_decode_total_is_the_sum_of_its_steps(
    a: Architecture, layout: Layout, absorbed: bool
) -> None:
    for stage in range(layout.pipeline):
        where: dict[str, Any] = {"layout": layout, "stage": stage, "absorbed": absorbed}
        steps = (forward(a, BF16, decode(3, 9 + step), **where).total for step in range(29))
        total = decode_total(a, BF16, 3, 9, 30, **where)
        assert values(total) == approx(sum(steps, Cost()))


def test_one_output_token_has_no_decode() -> None:
    assert decode_total(mixtral(), BF16, 4, 100, 1) == Cost()


def test_costs_add_and_scale() -> None:
    one = forward(mixtral(), BF16, decode(1, 5)).total
    assert values(one + one) == values(one.times(2))
    assert one.flops == one.flops_paper + one.head_flops
    assert one.read_bytes == one.weight_bytes + one.kv_read_bytes


# Layouts.


def test_tensor_parallel_ranks_hold_all_together() -> None:
    """Cut weights and heads add up; router and norms are on every rank."""
    whole = forward(mixtral(), BF16, decode(4, 100)).total
    rank = forward(mixtral(), BF16, decode(4, 100), layout=Layout(tensor=4)).total
    for part in (
        *("attention_bytes", "expert_bytes", "head_bytes", "kv_read_bytes", "kv_write_bytes"),
        *("attention_flops", "score_flops", "expert_flops", "head_flops", "embedding_bytes"),
    ):
        assert getattr(rank, part) * 4 == pytest.approx(getattr(whole, part))
    assert rank.router_bytes == whole.router_bytes
    assert rank.norm_bytes == whole.norm_bytes
    assert rank.activated == whole.activated


def test_key_value_heads_are_repeated_beyond_their_number() -> None:
    rank = forward(mixtral(), BF16, decode(1, 99), layout=Layout(tensor=16)).layers[0]
    assert rank.kv_read_bytes == 100 * 2 * 128 * 2  # one of 8 heads on each of 16 ranks
    assert rank.attention_bytes == 2 * HIDDEN * 128 * (2 + 1 + 1 + 2)


def test_latents_are_on_every_rank() -> None:
    a = model("deepseek-v2-lite")
    rank = forward(a, BF16, decode(1, 99), layout=Layout(tensor=4)).layers[1]
    assert rank.kv_read_bytes == 100 * 576 * 2
    assert rank.score_flops == 100 * 2 * 4 * (576 + 512)


def test_expert_parallel_devices_share_the_activated_experts() -> None:
    layout = Layout(tensor=2, data=2, expert=True)
    traced = [6.0] * LAYERS
    rank = forward(mixtral(), BF16, decode(8, 10), layout=layout, activated=traced).total
    whole = forward(mixtral(), BF16, decode(16, 10), activated=traced).total
    assert rank.expert_bytes * 4 == whole.expert_bytes
    assert rank.expert_flops * 4 == whole.expert_flops  # the tokens of both replicas
    assert rank.activated * 4 == whole.activated
    expected = forward(mixtral(), BF16, decode(8, 10), layout=layout).layers[0]
    assert expected.activated * 4 == pytest.approx(distinct_experts(8, 2, 16))
    cut = forward(mixtral(), BF16, decode(8, 10), layout=Layout(tensor=2, data=2)).layers[0]
    assert cut.expert_bytes == pytest.approx(expected.expert_bytes)
    assert cut.activated == pytest.approx(distinct_experts(8, 2, 16))


def test_pipeline_stages_are_the_whole_together() -> None:
    layout = Layout(pipeline=3)
    stages = [forward(mixtral(), BF16, decode(4, 10), layout=layout, stage=s) for s in range(3)]
    assert [len(stage.layers) for stage in stages] == [11, 11, 10]
    whole = forward(mixtral(), BF16, decode(4, 10)).total
    total = stages[0].total + stages[1].total + stages[2].total
    assert values(total) == approx(whole)
    assert stages[0].outside.embedding_bytes > 0
    assert stages[0].outside.head_bytes == stages[1].outside.flops == 0
    assert stages[2].outside.head_bytes > 0


@pytest.mark.parametrize(
    ("layers", "pipeline", "sizes"),
    [
        (32, 1, [32]),
        (32, 4, [8, 8, 8, 8]),
        (61, 4, [15, 15, 16, 15]),
        (27, 4, [7, 7, 7, 6]),
        (26, 4, [6, 7, 7, 6]),
        (3, 2, [2, 1]),
    ],
)
def test_layers_are_divided_as_vllm_divides_them(
    layers: int, pipeline: int, sizes: list[int]
) -> None:
    stages = stage_layers(layers, pipeline)
    assert [len(stage) for stage in stages] == sizes
    assert [index for stage in stages for index in stage] == list(range(layers))


# What a device holds.


def test_weights_on_one_device_are_all_parameters() -> None:
    for name in ("mixtral-8x7b", "deepseek-v2-lite", "olmoe-1b-7b", "qwen3-30b-a3b"):
        assert weight_bytes(model(name), BF16) == pytest.approx(
            2 * model(name).params_total, rel=1e-4
        )
    assert weight_bytes(mixtral(), BF16) == 2 * 46_702_792_704


def test_weights_of_ranks_and_stages() -> None:
    a = mixtral()
    whole = weight_bytes(a, BF16)
    replicated = 2 * (LAYERS * (8 * HIDDEN + 2 * HIDDEN) + HIDDEN)
    assert weight_bytes(a, BF16, Layout(tensor=4)) == (whole - replicated) / 4 + replicated
    stages = [weight_bytes(a, BF16, Layout(pipeline=4), stage) for stage in range(4)]
    assert sum(stages) == whole
    assert stages[0] - stages[1] == 2 * VOCAB * HIDDEN
    three = Layout(data=3, expert=True)  # three of eight experts on the fullest device
    assert weight_bytes(a, BF16, three) == whole - 2 * 5 * EXPERT * LAYERS


def test_the_vocabulary_is_padded_before_it_is_cut() -> None:
    a = mixtral()
    odd = replace(
        a,
        embedding=(replace(a.embedding[0], shape=(32001, HIDDEN)),),
        head=replace(a.head, shape=(32001, HIDDEN)),
    )
    more = weight_bytes(odd, BF16, Layout(tensor=2)) - weight_bytes(a, BF16, Layout(tensor=2))
    assert more == 2 * 2 * (32 * HIDDEN)


def test_a_tied_head_is_held_once_per_device_and_read_as_head() -> None:
    a = mixtral()
    tied = replace(a, tied=True)
    table = 2 * VOCAB * HIDDEN
    assert weight_bytes(a, BF16) - weight_bytes(tied, BF16) == table
    apart = [weight_bytes(tied, BF16, Layout(pipeline=2), stage) for stage in range(2)]
    assert sum(apart) == weight_bytes(a, BF16)
    assert forward(tied, BF16, decode(1, 0)).total.head_bytes == table


def test_cache_of_a_batch() -> None:
    assert kv_cache_bytes(mixtral(), BF16, 4096, 16) == 16 * 4096 * 131_072
    assert kv_cache_bytes(mixtral(), BF16, 4097, 1, block=128) == (4096 + 128) * 131_072
    quarter = kv_cache_bytes(mixtral(), BF16, 4096, 1, Layout(tensor=4, pipeline=2), 1)
    assert quarter == 4096 * 131_072 / 8
    latents = kv_cache_bytes(model("deepseek-v2-lite"), BF16, 4096, 1, Layout(tensor=4))
    assert latents == 4096 * 31_104
    half_windowed = kv_cache_bytes(windowed(64), BF16, 4096, 1)
    assert half_windowed == (4096 + 64 + 16) * 131_072 / 2


# Use in a plan.


def test_coefficients_go_with_their_architecture() -> None:
    a = replace(mixtral())
    forward(a, BF16, decode(1, 1))
    key = id(a)
    assert key in accounting._SHEETS
    del a
    gc.collect()
    assert key not in accounting._SHEETS


def test_a_pass_is_priced_in_well_under_a_millisecond() -> None:
    a = model("deepseek-r1")
    layout = Layout(tensor=8)
    forward(a, BF16, decode(1, 1), layout=layout)
    best = min(_seconds(a, layout, context) for context in range(20))
    assert best < 1e-3


def _seconds(a: Architecture, layout: Layout, context: int) -> float:
    start = time.perf_counter()
    assert forward(a, BF16, decode(8, context), layout=layout).total.flops > 0
    assert decode_total(a, BF16, 8, context, 1000, layout=layout).flops > 0
    return time.perf_counter() - start


def test_a_mixed_pass_reads_weights_once_and_its_tokens_meet_in_the_experts() -> None:
    mixed = (*prefill(1, 100), Slice(sequences=4, new=1, context=50))
    both = forward(mixtral(), BF16, mixed).total
    first = forward(mixtral(), BF16, mixed[:1]).total
    second = forward(mixtral(), BF16, mixed[1:]).total
    assert both.attention_bytes == first.attention_bytes
    assert both.kv_read_bytes == first.kv_read_bytes + second.kv_read_bytes
    assert both.score_flops == first.score_flops + second.score_flops
    assert both.activated == pytest.approx(LAYERS * distinct_experts(8, 2, 104))
