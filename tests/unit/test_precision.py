"""Bytes of weights, against sizes worked out by hand from the formats' own layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from workers.contract.model import Model
from workers.moe.accounting import weight_bytes
from workers.moe.architecture import resolve
from workers.moe.precision import Precision, precision
from workers.moe.structure import Architecture, Weight

HIDDEN, WIDTH, LAYERS, EXPERTS = 4096, 14336, 32, 8
EXPERT_VALUES = 3 * HIDDEN * WIDTH
ATTENTION_VALUES = HIDDEN * (4096 + 1024 + 1024 + 4096)


def mixtral(stored: Mapping[str, Any] | None = None, **asked: Any) -> tuple[Architecture, Model]:
    model = Model(name="mixtral-8x7b", **asked)
    a = resolve(model)
    assert a is not None
    if stored is not None:
        a = replace(a, config={**a.config, "quantization_config": stored})
    return a, model


def stored(config: Mapping[str, Any]) -> Precision:
    return precision(*mixtral(config))


UP = Weight(name="block_sparse_moe.experts.*.w1", part="expert", shape=(WIDTH, HIDDEN), cut="out")
QUERY = Weight(name="self_attn.q_proj", part="attention", shape=(HIDDEN, HIDDEN), cut="out")
ROUTER = Weight(name="block_sparse_moe.gate", part="router", shape=(EXPERTS, HIDDEN))
NORM = Weight(name="input_layernorm", part="norm", shape=(HIDDEN,))
HEAD = Weight(name="lm_head", part="head", shape=(32000, HIDDEN), cut="vocab")
GATE = Weight(name="mlp.shared_expert_gate", part="shared", shape=(1, HIDDEN))


def test_without_quantisation_every_parameter_takes_its_type() -> None:
    for dtype, size in (("bfloat16", 2), ("float16", 2), ("float32", 4)):
        own = precision(*mixtral(dtype=dtype))
        assert own.bytes(replace(UP, bias=True), 0) == (WIDTH * HIDDEN + WIDTH) * size
        assert own.kv_bytes == size
    assert precision(*mixtral()).compute == "bf16"
    assert precision(*mixtral(dtype="float32")).compute == "fp32"


def test_the_dtype_of_the_configuration_is_taken_with_auto() -> None:
    a, model = mixtral(dtype="auto")
    assert precision(replace(a, config={**a.config, "dtype": "float16"}), model).dtype == "float16"


def test_block_fp8_has_a_float_per_block_and_leaves_the_rest_alone() -> None:
    own = stored({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert own.bytes(UP, 0) == WIDTH * HIDDEN + (WIDTH // 128) * (HIDDEN // 128) * 4
    latent = Weight(name="self_attn.kv_a_proj", part="attention", shape=(576, 7168))
    assert own.bytes(latent, 0) == 576 * 7168 + 5 * 56 * 4  # the last block is half empty
    for weight in (ROUTER, NORM, HEAD, GATE):
        assert own.bytes(weight, 0) == weight.params * 2
    assert own.compute == "fp8"


def test_fp8_per_tensor_has_one_scale_and_static_activations_another() -> None:
    assert stored({"quant_method": "fp8"}).bytes(UP, 0) == WIDTH * HIDDEN + 4
    static = stored({"quant_method": "fp8", "activation_scheme": "static"})
    assert static.bytes(UP, 0) == WIDTH * HIDDEN + 8


def test_a_bias_stays_in_the_type_of_the_activations() -> None:
    own = stored({"quant_method": "fp8"})
    assert own.bytes(replace(QUERY, bias=True), 0) == HIDDEN * HIDDEN + 4 + 2 * HIDDEN


def test_gptq_stores_scales_and_zeros_and_gives_experts_biases() -> None:
    own = stored({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False})
    groups = HIDDEN // 128
    assert own.bytes(UP, 0) == (
        WIDTH * HIDDEN // 2 + groups * WIDTH * 2 + groups * WIDTH // 2 + WIDTH * 2
    )
    assert own.bytes(QUERY, 0) == HIDDEN * HIDDEN // 2 + groups * HIDDEN * 5 // 2
    assert own.compute == "bf16"  # weights are unpacked before the product
    assert own.bytes(HEAD) == HEAD.params * 2
    whole = stored({"quant_method": "gptq", "bits": 8, "group_size": -1, "lm_head": True})
    assert whole.bytes(HEAD) == 32000 * HIDDEN + 32000 * (2 + 1)


def test_gptq_rules_for_single_modules() -> None:
    own = stored(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {r"-:.*\.layers\.0\..*": {}, r"+:.*self_attn.*": {"bits": 8}},
        }
    )
    assert own.bytes(QUERY, 0) == QUERY.params * 2
    assert own.bytes(QUERY, 1) == HIDDEN * HIDDEN + 32 * HIDDEN * 3
    only = stored(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "modules_in_block_to_quantize": [["block_sparse_moe.experts.0.w1"]],
        }
    )
    assert only.bytes(QUERY, 0) == QUERY.params * 2
    assert only.bytes(UP, 0) < UP.params


def test_awq_has_no_group_indices_and_names_what_it_leaves() -> None:
    own = stored(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "modules_to_not_convert": ["self_attn"],
        }
    )
    groups = HIDDEN // 128
    assert own.bytes(UP, 0) == WIDTH * HIDDEN // 2 + groups * WIDTH * 2 + groups * WIDTH // 2
    assert own.bytes(QUERY, 0) == QUERY.params * 2


def test_compressed_tensors_strategies_and_ignored_modules() -> None:
    def group(targets: list[str], inputs: Any = None, **weights: Any) -> dict[str, Any]:
        return {"targets": targets, "weights": weights, "input_activations": inputs}

    own = stored(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": [
                "lm_head",
                "re:.*gate$",
                *(f"model.layers.3.self_attn.{name}_proj" for name in "qkv"),
            ],
            "config_groups": {
                "group_0": group(
                    ["Linear"], num_bits=4, type="int", strategy="group", group_size=64
                ),
                "group_1": group(
                    ["re:.*self_attn.*"],
                    {"num_bits": 8, "type": "float", "dynamic": True},
                    num_bits=8,
                    type="float",
                    strategy="channel",
                ),
            },
            "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        }
    )
    # Gate and up of an expert lie in one tensor, whose shape is two numbers in 16 bits.
    assert own.bytes(UP, 0) == WIDTH * HIDDEN // 2 + WIDTH * (HIDDEN // 64) * 2 + 4
    assert own.bytes(QUERY, 0) == HIDDEN * HIDDEN + HIDDEN * 4  # a name goes before a class
    assert own.bytes(QUERY, 3) == QUERY.params * 2
    assert own.bytes(HEAD) == HEAD.params * 2
    assert own.kv_bytes == 1
    assert own.compute == "bf16"  # as the experts, which are most of the model


def test_int8_of_weights_and_activations() -> None:
    own = stored(
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "type": "int", "dynamic": True},
                }
            },
        }
    )
    assert own.bytes(UP, 0) == WIDTH * HIDDEN + WIDTH * 4
    assert own.compute == "int8"


def test_mxfp4_is_for_all_experts_and_one_byte_scales_32() -> None:
    own = stored(
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.1.block*"],
        }
    )
    assert own.bytes(UP, 0) == WIDTH * HIDDEN // 2 + WIDTH * HIDDEN // 32
    assert own.bytes(UP, 1) == own.bytes(UP, 0)  # vLLM reads no names for it
    assert own.bytes(QUERY, 0) == QUERY.params * 2
    assert own.compute == "bf16"


def test_bitsandbytes() -> None:
    values = WIDTH * HIDDEN
    four = stored({"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert four.bytes(UP, 0) == values // 2 + values // 64 * 4
    double = stored(
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": ["q_proj"],
        }
    )
    assert double.bytes(UP, 0) == values // 2 + ceil(values / 64 * (1 + 4 / 256))
    assert double.bytes(QUERY, 0) == QUERY.params * 2
    eight = stored({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert eight.bytes(UP, 0) == values + WIDTH * 4


def test_quantisation_while_loading() -> None:
    assert precision(*mixtral(quantization="fp8")).bytes(UP, 0) == WIDTH * HIDDEN + 4
    assert precision(*mixtral(quantization="int8")).bytes(UP, 0) == WIDTH * HIDDEN + WIDTH * 4
    experts = precision(*mixtral(quantization="experts_int8"))
    assert experts.bytes(QUERY, 0) == QUERY.params * 2
    assert experts.bytes(UP, 0) < UP.params * 2


def test_a_whole_model_in_int4_is_more_than_half_a_byte_per_parameter() -> None:
    """Defect: one number of bytes per parameter, so scales and 16-bit modules vanish."""
    a, model = mixtral({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})
    quantised = LAYERS * (EXPERTS * EXPERT_VALUES + ATTENTION_VALUES)
    kept = a.params_total - quantised
    expected = quantised // 2 + quantised // 128 * 2 + quantised // 128 // 2 + kept * 2
    assert weight_bytes(a, precision(a, model)) == expected
    assert expected > 1.04 * a.params_total / 2


@pytest.mark.parametrize(
    ("cache", "size"),
    [("auto", 2), ("fp8", 1), ("fp8_e5m2", 1), ("int8", 1), ("float32", 4), ("nvfp4", 0.5625)],
)
def test_types_of_the_cache(cache: str, size: float) -> None:
    assert precision(*mixtral(), kv_cache_dtype=cache).kv_bytes == size


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match="unknown quantisation 'hqq'"):
        stored({"quant_method": "hqq"})
    with pytest.raises(ValueError, match="unknown quantisation 'fp3'"):
        precision(*mixtral(quantization="fp3"))
    with pytest.raises(ValueError, match="'awq' needs a checkpoint"):
        precision(*mixtral(quantization="awq"))
    with pytest.raises(ValueError, match="unknown kv_cache_dtype 'turboquant_4bit_nc'"):
        precision(*mixtral(), kv_cache_dtype="turboquant_4bit_nc")
    with pytest.raises(ValueError, match="float weights of 4 bits by tensor"):
        stored(
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor"},
                    }
                },
            }
        )


@pytest.mark.parametrize(
    ("asked", "bits", "beside"),
    [
        ("awq", 4, 2 + 0.5),  # a scale in 16 bits and a zero point in 4, per group
        ("gptq", 4, 2 + 0.5),
        ("compressed-tensors", 8, 0),
    ],
)
def test_a_skeleton_can_be_that_of_a_quantised_checkpoint(
    asked: str, bits: int, beside: float
) -> None:
    own = precision(*mixtral(weights="dummy", quantization=asked))
    groups = WIDTH * HIDDEN // 128
    bias = WIDTH * 2 if asked == "gptq" else 0
    scales = WIDTH * 4 if asked == "compressed-tensors" else 0
    expected = WIDTH * HIDDEN * bits // 8 + groups * beside + bias + scales
    assert own.bytes(UP, 0) == expected
    for kept in (ROUTER, NORM):
        assert own.bytes(kept, 0) == kept.values * 2
    assert own.bytes(HEAD) == HEAD.values * 2
    assert own.compute == ("int8" if asked == "compressed-tensors" else "bf16")
    with pytest.raises(ValueError, match=asked):  # a checkpoint says itself how it is stored
        precision(*mixtral(quantization=asked))
