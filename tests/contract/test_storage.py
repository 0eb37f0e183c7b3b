"""Bytes of quantised checkpoints as counted, against what vLLM's own classes create for them.

Every method that published MoE checkpoints use, on tiny models of families whose modules differ:
a dense layer before the sparse one, shared experts with and without a gate, latent attention.
Compared is each module, so that a name taken for another shows. `allocated.py` says how that goes
without a GPU.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workers.contract.model import Model
from workers.moe.accounting import weight_bytes
from workers.moe.architecture import resolve
from workers.moe.precision import Precision, precision
from workers.moe.storage.found import quantization
from workers.moe.storage.modules import Module, Unreadable, module, packed, root
from workers.moe.structure import Architecture, Weight

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "head_dim": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "qwen2": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "shared_expert_intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "head_dim": 64,
    },
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "rope_theta": 10000,
        "attention_bias": False,
    },
}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
EVERY = ("model.layers.0.", "model.layers.1.")


def modelopt(algo: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"], **more}


def group(
    weights: Mapping[str, Any], inputs: Any = None, *, form: str, ignore: Any = (), **more: Any
) -> dict[str, Any]:
    both = {"symmetric": True, "dynamic": False}
    own = {"targets": ["Linear"], "weights": both | dict(weights), "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": own},
        **more,
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
TOKEN8 = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True}


def quark(weight: Any, inputs: Any, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
        "exclude": ["lm_head", "re:.*self_attn.*"],
        "global_quant_config": {"weight": weight, "input_tensors": inputs},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        **more,
    }


E4M3 = {"dtype": "fp8_e4m3", "is_dynamic": False, "symmetric": True}
MX = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 per tensor": ("qwen3", {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8 per tensor, static": ("qwen2", {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 blocks": ("qwen3", BLOCKS),
    "fp8 blocks, shared experts": ("qwen2", BLOCKS),
    "fp8 blocks, latent attention": ("deepseek", BLOCKS),
    "fp8 blocks, gate is no path": (
        "qwen3",
        BLOCKS | {"modules_to_not_convert": ["gate", "lm_head", "mlp", "self_attn"]},
    ),
    "fp8 blocks, whole paths": (
        "deepseek",
        BLOCKS
        | {
            "ignored_layers": [
                "model.layers.1.self_attn.q_a_proj",
                "model.layers.1.self_attn.kv_a_proj_with_mqa",
                "model.layers.0.mlp.down_proj",
                "model.layers.1.mlp.shared_experts.down_proj",
            ]
        },
    ),
    "fp8 blocks, experts by one of them": (
        "qwen3",
        BLOCKS | {"ignored_layers": ["model.layers.1.mlp.experts.0.up_proj"]},
    ),
    "mxfp4": ("mixtral", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1"]}),
    "modelopt fp8": ("qwen3", modelopt("FP8")),
    "modelopt fp8 with the head": ("qwen2", modelopt("FP8") | {"ignore": []}),
    "modelopt fp8 by channel": ("qwen3", modelopt("FP8_PER_CHANNEL_PER_TOKEN")),
    "modelopt fp8 by blocks": ("deepseek", modelopt("FP8_PB_WO")),
    "modelopt nvfp4": ("qwen3", modelopt("NVFP4", group_size=16)),
    "modelopt nvfp4, latent attention": ("deepseek", modelopt("NVFP4", group_size=16)),
    "modelopt nvfp4, exclusions": (
        "qwen2",
        modelopt("NVFP4", group_size=16)
        | {"ignore": ["lm_head", "*self_attn*", "model.layers.0.mlp.shared_expert*"]},
    ),
    "modelopt nvfp4, cache": (
        "qwen3",
        modelopt("NVFP4", kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}),
    ),
    "modelopt nvfp4 of weights": ("qwen3", modelopt("W4A16_NVFP4", group_size=16)),
    "modelopt mxfp8": ("qwen3", modelopt("MXFP8")),
    "modelopt mixed": (
        "qwen3",
        modelopt("MIXED_PRECISION")
        | {
            "quantized_layers": {
                "model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
                **{
                    f"model.layers.{i}.self_attn.{name}_proj": {"quant_algo": "FP8"}
                    for i in range(2)
                    for name in "qkvo"
                },
            }
        },
    ),
    "mxfp8 of minimax": (
        "qwen3",
        {"quant_method": "mxfp8", "ignored_layers": ["lm_head", "model.layers.0.self_attn.o_proj"]},
    ),
    "int4": ("qwen3", group(INT4, form="pack-quantized")),
    "int4 of experts": (
        "qwen2",
        group(INT4, form="pack-quantized", ignore=["re:.*self_attn.*", "re:.*shared_expert.*"]),
    ),
    "int4, zero points": ("qwen3", group(INT4 | {"symmetric": False}, form="pack-quantized")),
    "int4, Kimi's exclusions": (
        "deepseek",
        group(
            INT4,
            form="pack-quantized",
            ignore=[
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
            ],
        ),
    ),
    "int8": (
        "qwen3",
        group(
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            TOKEN8 | {"type": "int"},
            form="int-quantized",
        ),
    ),
    "compressed fp8": (
        "qwen2",
        group(
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            TOKEN8 | {"type": "float"},
            form="float-quantized",
            kv_cache_scheme={
                "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True,
                "dynamic": False,
            },
        ),
    ),
    "compressed fp8, static": (
        "qwen3",
        group(
            {"num_bits": 8, "type": "float", "strategy": "tensor"},
            {
                "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True,
                "dynamic": False,
            },
            form="float-quantized",
        ),
    ),
    "compressed fp8 by blocks": (
        "deepseek",
        group(
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128,
             "symmetric": True, "dynamic": True},
            form="float-quantized",
        ),
    ),
    "compressed nvfp4": (
        "qwen3", group(FP4, FP4 | {"dynamic": "local"}, form="nvfp4-pack-quantized"),
    ),
    "compressed nvfp4 of weights": ("qwen3", group(FP4, form="nvfp4-pack-quantized")),
    "compressed mxfp4": (
        "qwen3",
        group(
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
            form="mxfp4-pack-quantized",
        ),
    ),
    "awq, gate is a part of gate_proj": (
        "mixtral", AWQ | {"modules_to_not_convert": ["gate", "o_proj"]}
    ),
    "awq": ("qwen2", AWQ | {"modules_to_not_convert": ["shared_expert", ".gate."]}),
    "awq, gate in a dense layer": ("qwen3", AWQ | {"modules_to_not_convert": ["gate"]}),
    "awq of everything": ("qwen3", AWQ | {"lm_head": True, "zero_point": False}),
    "gptq": ("mixtral", GPTQ),
    "gptq, rules": (
        "qwen2",
        GPTQ | {"dynamic": {r"-:.*\.layers\.0\..*": {}, r"+:.*self_attn.*": {"bits": 8}}},
    ),
    "gptq, some modules": (
        "qwen3", GPTQ | {"modules_in_block_to_quantize": [["mlp.experts", "self_attn"]]},
    ),
    "quark fp8": (
        "qwen3",
        quark(E4M3 | {"qscheme": "per_tensor"}, E4M3 | {"qscheme": "per_tensor"}, exclude=[]),
    ),
    "quark fp8 by channel": (
        "qwen2",
        quark(
            E4M3 | {"qscheme": "per_channel"},
            E4M3 | {"qscheme": "per_channel", "is_dynamic": True},
        ),
    ),
    "quark mxfp4": ("qwen3", quark(MX, MX | {"is_dynamic": True})),
    "quark mxfp4, other layers": (
        "qwen2",
        quark(
            MX,
            MX | {"is_dynamic": True},
            exclude=["lm_head", "model.layers.0.mlp.experts.3.up_proj"],
            layer_quant_config={
                "*self_attn*": {
                    "weight": E4M3 | {"qscheme": "per_tensor"},
                    "input_tensors": E4M3 | {"qscheme": "per_tensor"},
                }
            },
        ),
    ),
    "auto-round": ("qwen3", ROUND | {"packing_format": "auto_round:auto_gptq"}),
    "auto-round as awq": (
        "qwen2",
        ROUND
        | {
            "packing_format": "auto_round:auto_awq",
            "extra_config": {"model.layers.1.self_attn.o_proj": {"bits": 16}},
        },
    ),
    "auto-round, some of it": (
        "qwen3",
        ROUND
        | {
            "block_name_to_quantize": "model.layers.1",
            "extra_config": {
                f"model.layers.1.self_attn.{name}_proj": {"bits": 8} for name in "qkv"
            },
        },
    ),
    "beside config.json: nvfp4": (
        "qwen3",
        {
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quantization": {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": "FP8",
                "group_size": 16,
                "exclude_modules": ["lm_head", "model.layers.1.mlp.gate", "model.layers.0*"],
            },
        },
    ),
    "beside config.json: fp8": (
        "qwen2",
        {
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quantization": {
                "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"],
            },
        },
    ),
    "compression_config": ("qwen3", group(INT4, form="pack-quantized")),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "bitsandbytes": (  # counted as transformers stores it
        "qwen3", {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "Unknown quantization method", None,
    ),
    "fbgemm_fp8": (
        "qwen3", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1.0}, "deprecated", None,
    ),
    "torchao": ("qwen3", {"quant_method": "torchao", "quant_type": {}}, "", "'torchao'"),
    "some of a fused module": (
        "qwen3", AWQ | {"modules_to_not_convert": ["q_proj"]},
        "some but not all shards", "only some of q_proj",
    ),
}  # fmt: skip
"""What vLLM 0.32 says of it, and what we say where it is not counted."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM allocates in each case, all in one process of its own."""
    folder = tmp_path_factory.mktemp("checkpoints")
    places = {}
    for number, (name, (family, stored, *_)) in enumerate({**CASES, **REFUSED}.items()):
        places[name] = place = folder / str(number)
        place.mkdir()
        config = SHAPE | FAMILIES[family]
        if name.startswith("beside"):
            (place / "hf_quant_config.json").write_text(json.dumps(stored))
        elif name == "compression_config":
            config |= {name: stored}
        else:
            config |= {"quantization_config": stored}
        (place / "config.json").write_text(json.dumps(config))
    program = Path(__file__).with_name("allocated.py")
    run = subprocess.run(
        [sys.executable, str(program), *map(str, places.values())],
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == len(places), run.stderr[-3000:]
    answers = map(json.loads, lines)
    return {
        name: {**answer, "folder": str(places[name])}
        for name, answer in zip(places, answers, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_every_module_takes_the_bytes_that_the_engine_creates(
    name: str, engine: dict[str, Any]
) -> None:
    found = engine[name]
    assert "error" not in found, found["error"]
    model = Model(name=found["folder"], dtype="auto")
    a = resolve(model)
    assert a is not None and a.exact
    stored = precision(a, model)
    ours = dict(_counted(a, stored))
    theirs = {path: size for path, size in found["modules"].items() if path in ours}
    assert theirs == ours
    assert stored.kv_dtype == _CACHES[found["cache"]]


_CACHES = {"auto": "bfloat16", "fp8": "fp8", "fp8_e4m3": "fp8"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_refuses_is_known(name: str, engine: dict[str, Any]) -> None:
    _, _, theirs, ours = REFUSED[name]
    assert theirs in engine[name]["error"]
    model = Model(name=engine[name]["folder"], dtype="auto")
    a = resolve(model)
    assert a is not None
    if ours is None:
        assert weight_bytes(a, precision(a, model)) < 2 * a.params_total
    else:
        with pytest.raises(Unreadable, match=ours):
            precision(a, model)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": AWQ, "text_config": {"quantization_config": GPTQ}},
        {"compression_config": AWQ, "text_config": {"quantization_config": GPTQ}},
        {"text_config": {"quantization_config": GPTQ}},
        {"text_config": {"compression_config": GPTQ}},
        {"text_config": {}},
        {"quantization_config": modelopt("FP8") | {"quant_method": "MODELOPT"}},
        {"quantization_config": {"quant_method": "compressed_tensors"}},
    ],
)
def test_it_is_looked_for_in_the_engine_s_order(config: dict[str, Any]) -> None:
    import vllm.config  # noqa: F401  first: the next one needs it whole
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    def namespace(tree: dict[str, Any]) -> SimpleNamespace:
        nested = {"text_config": namespace(tree["text_config"])} if "text_config" in tree else {}
        return SimpleNamespace(**copy.deepcopy(tree) | nested)

    converter = object.__new__(ModelArchConfigConvertorBase)
    converter.hf_config = namespace(config)
    theirs, ours = converter.get_quantization_config(), quantization(config)
    assert (theirs and theirs["quant_method"]) == (ours and ours["quant_method"])
    assert (theirs or {}).get("bits") == (ours or {}).get("bits")


def _counted(a: Architecture, stored: Precision) -> Iterator[tuple[str, int]]:
    """Bytes of each module that could be quantised."""
    sizes: Counter[str] = Counter()
    for index, layer in enumerate(a.layers):
        for weight in layer.always():
            if m := _module(a, weight, index):
                sizes[m.path] += stored.bytes(weight, index)
        for weight in layer.expert():
            m = _module(a, weight, index)
            assert m is not None and layer.experts is not None
            sizes[m.path] += layer.experts.num * stored.bytes(weight, index)
    head = _module(a, a.head, None)
    assert head is not None
    sizes[head.path] += stored.bytes(a.head)
    yield from sizes.items()


def _module(a: Architecture, weight: Weight, layer: int | None) -> Module | None:
    return module(weight, layer, packed(a), root(a))
