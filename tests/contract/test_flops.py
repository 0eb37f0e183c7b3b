"""FLOPs against torch's own counter on real forward passes, and against vLLM's model.

The counter (`torch.utils.flop_counter`) counts the matrix products that run. So that it
sees all of them, attention and experts run in transformers' eager implementations: their
fused kernels are not in its tables on a CPU. What it sees differs from what is needed in
three ways, each of which `forward` can follow: masks are applied after the full square of
scores, logits are computed for every token, and MLA expands its latents in every pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from workers.contract.model import Model
from workers.moe.accounting import Cost, Slice, decode, forward, prefill
from workers.moe.architecture import configuration, resolve
from workers.moe.families import read
from workers.moe.precision import Precision
from workers.moe.structure import Architecture

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

FP32 = Precision(dtype="float32", kv_dtype="float32")
BF16 = Precision(dtype="bfloat16", kv_dtype="bfloat16")

BATCH, PROMPT, CHUNK = 3, 40, 8
PHASES: Mapping[str, tuple[int, tuple[Slice, ...]]] = {
    "prefill": (PROMPT, prefill(BATCH, PROMPT)),
    "decode": (1, decode(BATCH, PROMPT)),
    "chunk": (CHUNK, prefill(BATCH, CHUNK, cached=PROMPT + 1)),
}
"""New tokens of one pass after another through the same cache."""

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
WINDOWS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "head_dim": 16,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 160},
    "qwen3_moe": {**ROUTED, "head_dim": 24},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": {**DEEPSEEK, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, **LATENT},
    "phimoe": LOCAL,
    "gpt_oss": {**LOCAL, **WINDOWS},
    "glm4_moe": {**DEEPSEEK, "head_dim": 16},
    "granitemoe": LOCAL,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(
    family: str, record_property: Callable[[str, object], None]
) -> None:
    """Within 1 % in every phase, and part by part."""
    a, model = built(family)
    cache = None
    for phase, (new, slices) in PHASES.items():
        ids = torch.randint(3, 250, (BATCH, new))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
        ours = forward(a, FP32, slices, logits="all", absorbed=False, causal=False).total
        ratio = ours.flops / counter.get_total_flops()
        record_property(f"{family} {phase}", ratio)
        print(f"{family} {phase}: ours / torch's = {ratio:.6f}")
        assert ratio == pytest.approx(1, abs=0.01)
        counted = by_part(counter)
        expected = {
            "attention": ours.attention_flops + ours.score_flops,
            "experts": ours.expert_flops,
            "head": ours.head_flops,
            "rest": ours.router_flops + ours.shared_flops + ours.dense_flops,
        }
        assert counted == pytest.approx(expected, rel=0.01)


def test_causal_scores_are_just_over_half_of_the_square() -> None:
    a, _ = built("mixtral")
    square = forward(a, FP32, prefill(BATCH, PROMPT), causal=False).total.score_flops
    half = forward(a, FP32, prefill(BATCH, PROMPT)).total.score_flops
    assert half / square == pytest.approx((PROMPT + 1) / (2 * PROMPT))


def built(family: str) -> tuple[Architecture, torch.nn.Module]:
    config = CONFIG_MAPPING[family](**{**SHAPE, **FAMILIES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    return read(config.to_dict()), model.eval()


def by_part(counter: FlopCounterMode) -> dict[str, int]:
    """Counted FLOPs of the modules that stand for a part; what is left over is the rest."""
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(*ends: str) -> int:
        return sum(flops for name, flops in counts.items() if name.endswith(ends))

    parts = {"attention": of(".self_attn"), "experts": of(".experts"), "head": of(".lm_head")}
    return {**parts, "rest": counts["Global"] - sum(parts.values())}


# vLLM's analytic model (vllm/v1/metrics/perf.py), built by vLLM from the same configuration.

VLLM_DECODE, VLLM_PREFILL = (4, 1, 1000), (2, 512, 0)
"""Requests, new tokens and cached tokens of each."""


class Theirs:
    """vLLM's model of one pass, by its component and operation."""

    def __init__(self, metrics: Any, requests: int, new: int, cached: int) -> None:
        from vllm.v1.metrics.perf import ExecutionContext

        context = ExecutionContext()
        for _ in range(requests):
            context.add(new, cached + new, is_prefill=new > 1)
        self.flops: dict[str, int] = metrics.get_num_flops_breakdown(context)
        self.read: dict[str, int] = metrics.get_read_bytes_breakdown(context)
        self.written: dict[str, int] = metrics.get_write_bytes_breakdown(context)

    def weights(self, *components: str) -> int:
        return sum(
            size
            for name, size in self.read.items()
            if name.startswith(components) and name.endswith(("weight", "weights"))
        )


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Catalogue name → what vLLM's parsers make of its configuration; no engine is built."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.perf import ModelMetrics

    def build(name: str) -> Any:
        folder: Path = tmp_path_factory.mktemp(name)
        config = configuration(name)
        assert config is not None
        (folder / "config.json").write_text(json.dumps(dict(config)))
        args = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=4096,
        )
        return ModelMetrics(args.create_engine_config())

    return build


def catalogued(name: str) -> Architecture:
    a = resolve(Model(name=name))
    assert a is not None
    return a


def ours(a: Architecture, requests: int, new: int, cached: int, **how: Any) -> Cost:
    """The pass with experts activated as vLLM counts them: tokens · k, at most all."""
    activated = [
        float(min(requests * new * layer.experts.top_k, layer.experts.num)) if layer.experts else 0
        for layer in a.layers
    ]
    slices = prefill(requests, new, cached) if new > 1 else decode(requests, cached)
    return forward(a, BF16, slices, activated=activated, **how).total


@pytest.mark.parametrize("point", [VLLM_DECODE, VLLM_PREFILL], ids=["decode", "prefill"])
def test_mixtral_against_vllms_model(
    metrics: Callable[[str], Any], point: tuple[int, int, int]
) -> None:
    """Equal, but for what it leaves out or counts otherwise.

    It has no router, no norms and no embedding; it charges every query of a prefill with
    the whole context instead of the causal half; and it takes min(tokens · k, E) experts as
    activated, which for 4 tokens is all 8 where uniform routing expects 5.5. It also counts
    activations that pass between operations, which we leave out: they stay in caches or are
    fused away.
    """
    a = catalogued("mixtral-8x7b")
    theirs, square = Theirs(metrics("mixtral-8x7b"), *point), ours(a, *point, causal=False)
    assert theirs.flops["attn.qkv_proj"] + theirs.flops["attn.out_proj"] == square.attention_flops
    assert theirs.flops["attn.attn_qk"] + theirs.flops["attn.attn_av"] == square.score_flops
    assert theirs.flops["ffn.routed_ffn"] == square.expert_flops
    assert theirs.flops["unembed.unembed"] == square.head_flops
    assert sum(theirs.flops.values()) == square.flops - square.router_flops

    requests, new, cached = point
    queries = requests * new * 32 * 128 * 2 * 32
    assert theirs.weights("attn") == square.attention_bytes
    assert theirs.weights("ffn") == square.expert_bytes
    assert theirs.weights("unembed") == square.head_bytes
    assert theirs.read["attn.attn_input"] - queries == square.kv_read_bytes
    assert theirs.written["attn.kv_cache"] == square.kv_write_bytes
    assert not any("router" in name or "norm" in name for name in theirs.read)

    expected = forward(a, BF16, prefill(requests, new, cached)).total
    if new == 1:
        assert square.expert_bytes / expected.expert_bytes == pytest.approx(8 / 5.46875)
    else:
        assert expected.expert_bytes == pytest.approx(square.expert_bytes)
        assert expected.score_flops < 0.51 * square.score_flops


@pytest.mark.parametrize("point", [VLLM_DECODE, VLLM_PREFILL], ids=["decode", "prefill"])
def test_deepseek_v2_against_vllms_model(
    metrics: Callable[[str], Any], point: tuple[int, int, int]
) -> None:
    """As Mixtral, and one more difference: MLA decode is charged as if keys were expanded.

    Its scores cost heads · (qk_dim + v_dim) per pair in both phases, while the cache that it
    reads holds latents; vLLM's own decode kernels attend to the latents, at
    heads · (2 · latent + rope) per pair, 3.4 times as much here. The expansion of the cached
    latents that the cheaper scores would need is in neither.
    """
    a = catalogued("deepseek-v2-lite")
    theirs = Theirs(metrics("deepseek-v2-lite"), *point)
    absorbed, expanded = (
        ours(a, *point, causal=False, absorbed=choice) for choice in (True, False)
    )
    projections = ("q_proj", "kv_a_proj", "kv_b_proj", "out_proj")
    assert sum(theirs.flops[f"mla_attn.{p}"] for p in projections) == absorbed.attention_flops
    scores = theirs.flops["mla_attn.attn_qk"] + theirs.flops["mla_attn.attn_av"]
    assert scores == expanded.score_flops
    assert theirs.flops["ffn.routed_ffn"] == absorbed.expert_flops
    assert theirs.flops["ffn.shared_ffn"] == absorbed.shared_flops
    assert theirs.flops["ffn.dense_ffn"] == absorbed.dense_flops
    latent = (2 * 512 + 64) / (192 + 128)
    assert absorbed.score_flops == pytest.approx(scores * (latent if point[1] == 1 else 1))

    latent_norms = 2 * 27 * 512
    assert theirs.weights("mla_attn") == pytest.approx(absorbed.attention_bytes, abs=latent_norms)
    assert theirs.weights("ffn") == (
        absorbed.expert_bytes + absorbed.shared_bytes + absorbed.dense_bytes
    )
    assert theirs.written["mla_attn.kv_cache"] == absorbed.kv_write_bytes
    if point[1] == 1:
        queries = point[0] * 16 * 192 * 2 * 27
        assert theirs.read["mla_attn.attn_input"] - queries == absorbed.kv_read_bytes


def test_vllms_model_does_not_see_the_shared_expert_of_qwen2_moe(
    metrics: Callable[[str], Any],
) -> None:
    """It looks for a number of shared experts; this family gives a width instead."""
    a = catalogued("qwen1.5-moe-a2.7b")
    theirs = Theirs(metrics("qwen1.5-moe-a2.7b"), *VLLM_DECODE)
    total = ours(a, *VLLM_DECODE, causal=False)
    assert "ffn.shared_ffn" not in theirs.flops
    assert sum(theirs.flops.values()) == total.flops - total.router_flops - total.shared_flops
    assert total.shared_flops > 0.3 * total.flops
