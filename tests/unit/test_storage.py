"""Which modules a checkpoint means by its names, and what that comes to in bytes.

The names are compared as vLLM 0.32 does it; `tests/contract/test_storage.py` holds the same against
vLLM's own classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workers.contract.model import Model
from workers.moe.accounting import weight_bytes
from workers.moe.architecture import UnknownModel, bend, configuration, resolve
from workers.moe.precision import Precision, precision, unreadable
from workers.moe.storage.found import quantization, without
from workers.moe.storage.methods import METHODS
from workers.moe.storage.modules import Unreadable
from workers.moe.structure import Architecture

QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
}
EXPERTS, ATTENTION, ENDS = 128 * 3 * 2048 * 768, 2048 * (4096 + 512 + 512 + 4096), 2 * 1024 * 2048
ROUTER, NORMS = 128 * 2048, 3 * 2048 + 2 * 128
NVFP4_FILE = {
    "producer": {"name": "modelopt", "version": "0.33.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.mlp.gate"],
    },
}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "dynamic": False,
            },
        }
    },
}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def model(folder: Path, beside: Any = None, **config: Any) -> tuple[Architecture, Model]:
    """QWEN with changes, in a folder, with a `hf_quant_config.json` or without."""
    (folder / "config.json").write_text(json.dumps(QWEN | config))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    found = Model(name=str(folder), dtype="auto")
    a = resolve(found)
    assert a is not None
    return a, found


def weights(folder: Path, stored: Mapping[str, Any], **config: Any) -> int:
    a, found = model(folder, quantization_config=stored, **config)
    return weight_bytes(a, precision(a, found))


def test_a_file_of_modelopt_beside_the_configuration_is_read(tmp_path: Path) -> None:
    a, found = model(tmp_path, NVFP4_FILE)
    own = precision(a, found)
    values = EXPERTS + ATTENTION
    scales = (3 * 128 + 4) * 8  # of weights and of inputs, per matrix
    plain = 2 * (ENDS + ROUTER + NORMS)
    assert weight_bytes(a, own) == values // 2 + values // 16 + scales + plain == 359_284_256
    assert own.kv_dtype == "fp8"
    assert own.compute == "fp4"


def test_the_configuration_s_own_word_goes_before_the_file(tmp_path: Path) -> None:
    a, found = model(tmp_path, NVFP4_FILE, quantization_config=FP8)
    own = precision(a, found)
    assert own.scheme is not None and own.scheme.method == "fp8"
    (tmp_path / "hf_quant_config.json").write_text("{")
    assert configuration(str(tmp_path)) is not None  # not looked at


def test_a_file_beside_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(UnknownModel, match=r"hf_quant_config\.json cannot be read"):
        configuration(str(tmp_path))
    a, found = model(tmp_path, NVFP4_FILE | {"quantization": {"quant_algo": "W4A8_AWQ"}})
    with pytest.raises(Unreadable, match="W4A8_AWQ is not one that the engine takes"):
        precision(a, found)


def test_awq_s_gate_is_no_gate_projection_of_an_expert(tmp_path: Path) -> None:
    stored = AWQ | {"modules_to_not_convert": ["gate"]}
    groups = (EXPERTS + ATTENTION) // 128
    expected = (EXPERTS + ATTENTION) // 2 + groups * 5 // 2 + 2 * (ENDS + ROUTER + NORMS)
    assert weights(tmp_path, stored) == expected == 332_517_888


def test_a_language_model_inside_another_has_its_own_quantisation(tmp_path: Path) -> None:
    text = QWEN | {
        "model_type": "qwen3_vl_moe_text",
        "num_hidden_layers": 48,
        "vocab_size": 151936,
        "quantization_config": INT4,
    }
    vision = {
        "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_size": 1152,
        "in_channels": 3, "intermediate_size": 4304, "num_position_embeddings": 2304,
        "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    outer = {"model_type": "qwen3_vl_moe", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    found = Model(name=str(tmp_path), dtype="auto")
    a = resolve(found)
    assert a is not None
    values, shapes = 48 * EXPERTS, 48 * 128 * 2 * 4
    plain = 2 * (a.params_total + a.params_vision + a.params_projector - values)
    expected = values // 2 + values // 32 * 2 + shapes + plain
    assert weight_bytes(a, precision(a, found)) == expected == 20_466_952_672
    bare = without(a.config)
    assert quantization(bare) is None and quantization(a.config) is not None
    scaled = bend(a.config, Model(name="x", weights="dummy", scale=0.5))
    assert quantization(scaled) is None  # a scaled model is not quantised


@pytest.mark.parametrize(
    ("stored", "attention", "experts"),
    [
        (FP8, True, True),
        (FP8 | {"ignored_layers": ["self_attn", "experts"]}, True, True),  # no whole paths
        (FP8 | {"ignored_layers": ["model.layers.0.self_attn.qkv_proj",
                                   "model.layers.0.self_attn.o_proj"]}, False, True),
        (FP8 | {"modules_to_not_convert": ["model.layers.0.mlp.experts.7.w"]}, True, False),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, False, True),
        (AWQ | {"modules_to_not_convert": ["mlp"]}, True, False),
        (INT4, False, True),
        (INT4 | {"ignore": ["re:self_attn"]}, True, True),  # from the path's beginning
        (INT4 | {"ignore": ["re:.*experts.*up_proj", "re:.*(gate|down)_proj"]}, True, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*self_attn*"]}, False, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["mlp"]}, True, False),
        ({"quant_method": "mxfp4"}, False, True),
    ],
)  # fmt: skip
def test_names_are_compared_as_each_method_does(
    stored: dict[str, Any], attention: bool, experts: bool, tmp_path: Path
) -> None:
    a, found = model(tmp_path, quantization_config=stored)
    own, layer = precision(a, found), a.layers[0]
    assert layer.experts is not None
    by_part = {
        "attention": [w for w in layer.attention.weights if len(w.shape) == 2],
        "experts": layer.expert(),
    }
    quantised = {
        part: {own.bytes(w, 0) < 2 * w.params for w in matrices}
        for part, matrices in by_part.items()
    }
    assert quantised == {"attention": {attention}, "experts": {experts}}
    assert all(own.bytes(w, 0) == 2 * w.params for w in layer.experts.router)


def test_matrices_that_the_engine_fuses_are_stored_alike(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"only some of q_proj, k_proj, v_proj of .*qkv_proj"):
        weights(tmp_path, FP8 | {"ignored_layers": ["model.layers.0.self_attn.q_proj"]})


def test_a_head_is_quantised_by_modelopt_alone(tmp_path: Path) -> None:
    def head(stored: dict[str, Any]) -> int:
        a, found = model(tmp_path, quantization_config=stored)
        return precision(a, found).bytes(a.head)

    plain = 2 * 1024 * 2048
    assert head(FP8) == head(INT4 | {"ignore": []}) == head(AWQ) == plain
    assert head({"quant_method": "modelopt", "quant_algo": "FP8"}) == 1024 * 2048 + 8
    assert head(AWQ | {"lm_head": True}) < plain


def test_deepseek_v4_says_fp8_and_has_experts_in_fp4(tmp_path: Path) -> None:
    def own(**more: Any) -> Precision:
        a, found = model(
            tmp_path, model_type="deepseek_v4", quantization_config=FP8 | {"scale_fmt": "ue8m0"},
            n_routed_experts=128, **more,
        )  # fmt: skip
        found_ = precision(a, found)
        expert, query = a.layers[0].expert()[0], a.layers[0].attention.weights[0]
        sizes.append((found_.bytes(expert, 0), found_.bytes(query, 0)))
        return found_

    sizes: list[tuple[int, int]] = []
    four = own(expert_dtype="fp4")
    assert four.scheme is not None and four.scheme.method == "deepseek_v4_fp8"
    own()  # as if it said so
    own(expert_dtype="fp8")
    expert, query = 2048 * 768, 2048 * 4096
    # Scales of one byte beside experts in 4 bits, of four beside experts in 8.
    assert sizes[0] == sizes[1] == (expert // 2 + expert // 32, query + query // 128**2)
    assert sizes[2] == (expert + expert // 128**2 * 4, query + query // 128**2 * 4)


@pytest.mark.parametrize(
    ("stored", "cache"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "bfloat16"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4",
          "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT3"},
         "bfloat16"),
        (INT4 | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8"),
        (INT4 | {"kv_cache_scheme": None}, "bfloat16"),
    ],
)  # fmt: skip
def test_the_cache_is_what_the_engine_makes_of_it(
    stored: dict[str, Any], cache: str, tmp_path: Path
) -> None:
    a, found = model(tmp_path, quantization_config=stored)
    assert precision(a, found).kv_dtype == cache
    assert precision(a, found, kv_cache_dtype="bfloat16").kv_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"quant_method": "hqq"}, "unknown quantisation 'hqq': weights of this method"),
        ({"bits": 4}, "names no quant_method"),
        (["awq"], "not a mapping"),
        ({"quant_method": "awq"}, "quantisation 'awq': bits is missing"),
        (AWQ | {"bits": 3}, "AWQ in 4 bits, not in 3"),
        (AWQ | {"group_size": "many"}, "quantisation 'awq' cannot be read"),
        ({"quant_method": "modelopt", "quant_algo": "INT2"}, "quant_algo INT2 is not counted"),
        (INT4 | {"ignore": ["re:("]}, "is no regular expression"),
        (
            INT4 | {"kv_cache_scheme": {"num_bits": 4, "type": "int"}},
            "no kv_cache_scheme of 4 bits",
        ),
    ],
)
def test_what_cannot_be_read_says_so_by_name(stored: Any, words: str, tmp_path: Path) -> None:
    a, found = model(tmp_path, quantization_config=stored)
    with pytest.raises(Unreadable, match=words):
        precision(a, found)
    assert words in str(unreadable(a, found)) or "(" in words


def test_rules_keep_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    rules = {r"-:.*self_attn.*": {}, r"+:.*": {"bits": 8}}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    a, found = model(tmp_path, quantization_config=gptq | {"dynamic": rules})
    query = a.layers[0].attention.weights[0]
    assert precision(a, found).bytes(query, 0) == 2 * query.params


def test_layers_of_a_mixed_checkpoint_may_stand_in_the_file_alone(tmp_path: Path) -> None:
    layers = {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}}
    said = {"quant_algo": "MIXED_PRECISION", "exclude_modules": ["lm_head"]}
    a, found = model(
        tmp_path,
        {"producer": {"name": "modelopt"}, "quantization": said | {"quantized_layers": layers}},
        quantization_config={"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
    )
    own = precision(a, found)
    assert own.scheme is not None and own.scheme.method == "modelopt_mixed"
    plain = 2 * (ENDS + ROUTER + NORMS + ATTENTION)
    assert weight_bytes(a, own) == EXPERTS // 2 + EXPERTS // 16 + 3 * 128 * 8 + plain


def test_products_run_as_those_of_the_routed_experts(tmp_path: Path) -> None:
    def compute(stored: dict[str, Any]) -> str:
        a, found = model(tmp_path, quantization_config=stored)
        return precision(a, found).compute

    modelopt = {"quant_method": "modelopt", "ignore": ["lm_head"]}
    assert compute(modelopt | {"quant_algo": "NVFP4"}) == "fp4"
    assert compute(modelopt | {"quant_algo": "W4A16_NVFP4"}) == "bf16"
    assert compute({"quant_method": "mxfp4"}) == compute(AWQ) == "bf16"
    assert compute(FP8) == "fp8"
    assert compute(FP8 | {"ignored_layers": ["model.layers.0.mlp.experts"]}) == "bf16"


@pytest.mark.parametrize("method", METHODS)
def test_a_description_may_hold_anything(method: str, tmp_path: Path) -> None:
    """Defect: a KeyError from the depths of a formula."""
    a, found = model(tmp_path)
    keys = (
        "bits", "group_size", "weight_block_size", "ignored_layers", "modules_to_not_convert",
        "ignore", "config_groups", "quantization", "quant_algo", "quantized_layers", "dynamic",
        "exclude", "global_quant_config", "layer_quant_config", "extra_config", "kv_cache_scheme",
        "llm_int8_skip_modules", "block_name_to_quantize",
    )  # fmt: skip
    junk: tuple[Any, ...] = (
        None, 0, -1, 1.5, "x", "re:(", [], [0], ["re:("], [None], {}, {"a": 1}, {"a": {}},
        {"weights": 1}, {"a": {"targets": ["Linear"]}}, {"x*": {"weight": []}}, {"re:(": {}},
    )  # fmt: skip
    for key in keys:
        for value in junk:
            stored = {"quant_method": method, "quant_algo": "FP8", key: value}
            config = a.config | {"quantization_config": stored}
            with suppress(Unreadable):
                own = precision(replace(a, config=config), found)
                assert weight_bytes(a, own) > ENDS
