"""Utilisation, against golden numbers and ratios made by hand."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache

import numpy as np
import pytest

from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trace import Step, Trace
from workers.moe.accounting import decode, forward, prefill
from workers.moe.architecture import resolve
from workers.moe.families import read
from workers.moe.precision import Precision
from workers.moe.structure import Architecture
from workers.moe.utilisation import (
    Observed,
    Peaks,
    Utilisation,
    decode_utilisation,
    practical_bandwidth_gb_s,
    practical_tflops,
    traced_utilisation,
    utilisation,
)

BF16 = Precision(dtype="bfloat16", kv_dtype="bfloat16")
H100 = Peaks(bandwidth_gb_s=3350, tflops=989)
ONE = Layout()


@cache
def model(name: str) -> Architecture:
    a = resolve(Model(name=name))
    assert a is not None
    return a


def mixtral() -> Architecture:
    return model("mixtral-8x7b")


def test_bandwidth_that_a_deployment_needs() -> None:
    """MoE-CAP's Figure 7: nominal sizes in 16 bits, 0.1 s per token, no cache."""
    assert practical_bandwidth_gb_s(671e9 * 2, 0.1, 0.71) == pytest.approx(18_901, abs=1)
    assert practical_bandwidth_gb_s(37e9 * 2, 0.1, 0.71) == pytest.approx(1_042, abs=1)
    assert practical_tflops(2e12, 0.5, 0.25) == pytest.approx(16)


def test_one_pass_against_hand_made_ratios() -> None:
    seconds = 0.01
    one = utilisation(
        mixtral(), BF16, ONE, H100, [Observed(slices=decode(1, 99), latency_s=seconds)]
    )
    bytes_, flops = 3350e9 * seconds, 989e12 * seconds
    cache_ = 100 * 131_072
    assert one.mbu == pytest.approx((2 * 46_702_792_704 + cache_) / bytes_)
    active = 2 * (12_879_925_248 - 32000 * 4096)
    assert one.s_mbu == pytest.approx((active + 2 * 4096 + cache_) / bytes_)
    paper = 2 * 32 * (41_943_040 + 2 * 176_160_768)
    assert one.s_mbu_paper == pytest.approx((paper + cache_) / bytes_)
    scores = 32 * 4 * 32 * 128 * 100
    assert one.s_mfu == pytest.approx((paper + 2 * 32 * 8 * 4096 + scores) / flops)
    assert one.mfu == pytest.approx((2 * 46_702_792_704 + scores) / flops)


def test_ratios_of_sums_never_means_of_ratios() -> None:
    """Defect: a mean of the passes' ratios, in which a short pass weighs as a long one."""
    fast = Observed(slices=decode(1, 100), latency_s=0.01)
    slow = Observed(slices=decode(1, 100), latency_s=0.09)
    both = utilisation(mixtral(), BF16, ONE, H100, [fast, slow])
    alone = [utilisation(mixtral(), BF16, ONE, H100, [one]).s_mbu for one in (fast, slow)]
    needed = forward(mixtral(), BF16, decode(1, 100)).total.read_bytes
    assert both.s_mbu == pytest.approx(2 * needed / (0.1 * 3350e9))
    assert both.s_mbu != pytest.approx(sum(filter(None, alone)) / 2, rel=0.5)


def test_a_mixed_pass_charges_its_latency_once() -> None:
    """Defect: the whole latency of a mixed pass charged to prefill and to decode."""
    mixed = Observed(slices=(*prefill(1, 512), *decode(8, 700)), latency_s=0.02)
    got = utilisation(mixtral(), BF16, ONE, H100, [mixed])
    total = forward(mixtral(), BF16, mixed.slices).total
    assert got.s_mbu == pytest.approx(total.read_bytes / (0.02 * 3350e9))
    assert got.s_mfu == pytest.approx(total.flops_paper / (0.02 * 989e12))


SMALL = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
"""In 16 bits: attention 384 bytes (64 + 32 + 32 + 64 numbers), an expert 192 (3 × 32), router 64,
norms 48, head 1024, an embedding row 16, the cache of a token 16."""


def _step(
    request: list[int],
    new: list[int],
    context: list[int],
    prefill: list[int],
    decode: list[int],
    seconds: float,
) -> Step:
    return Step(
        request=np.array(request),
        new=np.array(new),
        context=np.array(context),
        decoding=np.array([n == 1 and c > 0 for n, c in zip(new, context, strict=True)]),
        prefill=np.array([prefill]),
        decode=np.array([decode]),
        seconds=seconds,
    )


def test_passes_that_mix_prefill_and_decode_by_hand() -> None:
    """Eq 6 of a run of three passes, the second one mixed, in numbers that can be read.

    An expert that both phases of a pass chose is read once, so the mixed pass reads 3 and
    not 4. The peaks are 10,000 bytes and 10,000 FLOPs a second.
    """
    trace = Trace(
        layers=(0,),
        top_k=2,
        steps=(
            _step([0], [3], [0], [3, 2, 1, 0], [0, 0, 0, 0], 0.5),  # 3 experts
            _step([0, 1], [1, 2], [3, 0], [2, 0, 0, 2], [1, 1, 0, 0], 0.3),  # 0, 1 and 3
            _step([1], [1], [2], [0, 0, 0, 0], [0, 0, 1, 1], 0.2),  # 2 experts
        ),
        tokens=((1, 2), (3, 4)),
    )
    a = read(SMALL)
    peaks = Peaks(bandwidth_gb_s=1e-5, tflops=1e-8)
    got = traced_utilisation(a, BF16, ONE, peaks, trace)
    first = 384 + 3 * 192 + 16 * 3
    mixed = 384 + 3 * 192 + 16 * (4 + 2)
    last = 384 + 2 * 192 + 16 * 3
    assert (first, mixed, last) == (1008, 1056, 816)
    assert got.s_mbu_paper == pytest.approx(0.2880)  # 2880 bytes in 1.0 s
    assert got.s_mbu == pytest.approx((2880 + 3 * (64 + 48 + 1024) + 7 * 16) / 10_000)
    assert got.s_mbu == pytest.approx(0.64)
    # 7 tokens × (384 attention + 64 router + 384 experts), 6 + (4 + 3) + 3 pairs × 32
    assert got.s_mfu == pytest.approx(0.6336)
    assert got.mbu == pytest.approx((3 * 3312 + 16 * 12) / 10_000)
    means = [first / 0.5, mixed / 0.3, last / 0.2]
    assert got.s_mbu_paper != pytest.approx(sum(means) / 3 / 10_000, rel=0.05)


def test_a_trace_has_a_time_per_pass() -> None:
    step = _step([0], [1], [0], [1, 1, 0, 0], [0, 0, 0, 0], 0.5)
    trace = Trace(layers=(0,), top_k=2, steps=(step,), tokens=((1,),))
    with pytest.raises(ValueError, match="2 times for 1 passes"):
        traced_utilisation(read(SMALL), BF16, ONE, H100, trace, seconds=[1.0, 1.0])


def test_experts_are_those_that_were_traced() -> None:
    fewer = Observed(slices=decode(8, 10), latency_s=0.02, activated=[3.0] * 32)
    more = Observed(slices=decode(8, 10), latency_s=0.02, activated=[8.0] * 32)
    low, high = (utilisation(mixtral(), BF16, ONE, H100, [one]) for one in (fewer, more))
    expert = 2 * 176_160_768
    assert high.s_mbu_paper is not None and low.s_mbu_paper is not None
    assert high.s_mbu_paper - low.s_mbu_paper == pytest.approx(32 * 5 * expert / (0.02 * 3350e9))
    assert (low.mbu, low.mfu, low.s_mfu) == (high.mbu, high.mfu, high.s_mfu)


def test_nothing_measured_is_null_never_zero() -> None:
    """Defect: 0.0 published where there was no figure."""
    nothing = (None,) * 5
    assert astuple(utilisation(mixtral(), BF16, ONE, H100, [])) == nothing
    instant = [Observed(slices=decode(1, 1), latency_s=0.0)]
    assert astuple(utilisation(mixtral(), BF16, ONE, H100, instant)) == nothing
    prefill_only = decode_utilisation(
        mixtral(), BF16, ONE, H100, batch=1, input_tokens=10, output_tokens=1, seconds=1.0
    )
    assert astuple(prefill_only) == nothing


@pytest.mark.parametrize(
    "layout", [ONE, Layout(tensor=4), Layout(tensor=2, pipeline=2, data=2, expert=True)]
)
@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v2-lite"])
def test_a_uniform_batch_in_closed_form(name: str, layout: Layout) -> None:
    a = model(name)
    passes = [Observed(slices=decode(4, 20 + step), latency_s=0.01) for step in range(9)]
    stepwise = utilisation(a, BF16, layout, H100, passes)
    closed = decode_utilisation(
        a, BF16, layout, H100, batch=4, input_tokens=20, output_tokens=10, seconds=0.09
    )
    assert astuple(closed) == pytest.approx(astuple(stepwise))


def test_all_devices_of_a_layout_are_counted() -> None:
    """Half the time on two devices is the same share; what each rank reads again is more."""

    def of(layout: Layout, seconds: float) -> Utilisation:
        passes = [Observed(slices=decode(4, 100), latency_s=seconds)]
        return utilisation(mixtral(), BF16, layout, H100, passes)

    one, two = of(ONE, 0.02), of(Layout(tensor=2), 0.01)
    assert two.mbu == pytest.approx(one.mbu)
    assert two.s_mbu_paper == pytest.approx(one.s_mbu_paper)
    assert two.s_mfu == pytest.approx(one.s_mfu)
    assert one.s_mbu is not None and two.s_mbu is not None
    again = 2 * (32 * (8 * 4096 + 2 * 4096) + 4096)  # router and norms on both ranks
    assert two.s_mbu - one.s_mbu == pytest.approx(again / (0.02 * 3350e9), rel=1e-6)
    repeated = of(Layout(tensor=16), 0.02 / 16)
    assert repeated.s_mbu is not None and repeated.s_mbu > one.s_mbu + 2 * 100 / 3350e9
    assert repeated.s_mbu_paper == pytest.approx(one.s_mbu_paper)


@pytest.mark.parametrize("batch", [8, 7, 1])
def test_replicas_share_the_batch(batch: int) -> None:
    passes = [Observed(slices=decode(batch, 100), latency_s=0.02)]
    two = utilisation(mixtral(), BF16, Layout(data=2, expert=True), H100, passes)
    one = utilisation(mixtral(), BF16, ONE, H100, passes)
    assert two.s_mfu is not None and two.s_mbu is not None
    assert one.s_mfu is not None and one.s_mbu is not None
    assert two.s_mfu == pytest.approx(one.s_mfu / 2)
    assert two.s_mbu_paper == pytest.approx(one.s_mbu_paper / 2 if one.s_mbu_paper else 0)
    # What is no expert is read by both.
    again = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 4096 + 2 * 4096) + 4096 + 32000 * 4096
    assert two.s_mbu - one.s_mbu / 2 == pytest.approx(2 * again / (2 * 0.02 * 3350e9), rel=1e-6)
