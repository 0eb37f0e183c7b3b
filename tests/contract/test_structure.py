"""The structure read from a configuration, against the model that transformers builds.

Models are built on the meta device, so a build costs no memory. One thing is counted that
transformers does not: the bias that corrects the choice of experts is a parameter in
checkpoints and in vLLM, and a buffer in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from workers.contract.errors import Infeasible
from workers.contract.model import Model
from workers.moe.architecture import bend, catalogue
from workers.moe.families import read
from workers.moe.structure import Architecture

pytestmark = pytest.mark.engine

Draw = Callable[[st.SearchStrategy[Any]], Any]

WITHOUT_CLASS = {
    "arctic",
    "deepseek-vl2",
    "deepseek-vl2-small",
    "deepseek-vl2-tiny",
    "grok-1",
    "molmoe-1b",
}
CONDITIONAL = {
    "aria": "AriaForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
}
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block)\.(\d+)\.")
APART = re.compile(r"(?:^|\.)(?:encoder|visual|vision_model|vision_tower)\.")


def build(config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of `config` without memory behind it."""
    known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        if name := CONDITIONAL.get(config["model_type"]):
            return getattr(transformers, name)._from_config(known)
        return AutoModelForCausalLM.from_config(known)


def parameters(model: torch.nn.Module) -> int:
    corrections = (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    return sum(t.numel() for t in model.parameters()) + sum(t.numel() for t in corrections)


def counted(a: Architecture) -> int:
    return a.params_total + a.params_vision + a.params_projector


def either() -> st.SearchStrategy[bool]:
    return st.booleans()


def of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def some(draw: Draw, strategies: Mapping[str, Any]) -> dict[str, Any]:
    """One value of each strategy; what is no strategy is taken as it is."""
    return {
        key: draw(value) if isinstance(value, st.SearchStrategy) else value
        for key, value in strategies.items()
    }


def sizes(draw: Draw) -> dict[str, Any]:
    heads, dim = draw(of(2, 4, 6)), draw(of(4, 8))
    return {
        "hidden_size": heads * dim,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(of(1, 2, heads)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "vocab_size": draw(of(32, 50)),
        "intermediate_size": draw(of(12, 20)),
        "tie_word_embeddings": draw(either()),
        "pad_token_id": 0,
    }


ROUTED = {"num_experts_per_tok": of(1, 2)}
MOE_WIDTH = {"moe_intermediate_size": of(6, 10)}
BIASED = {"attention_bias": either()}
HEAD_DIM = {"head_dim": of(4, 16)}
GROUPED = {"n_group": 1, "topk_group": 1}
STEPPED = {"decoder_sparse_step": of(1, 2), "mlp_only_layers": of([], [0], [1, 2])}
SLIDING = {"use_sliding_window": either(), "sliding_window": 16, "max_window_layers": of(0, 2)}
LATENT = {
    "q_lora_rank": of(None, 8),
    "kv_lora_rank": of(4, 12),
    "qk_nope_head_dim": of(4, 8),
    "qk_rope_head_dim": of(2, 4),
    "v_head_dim": of(4, 6),
}
DEEPSEEK = (
    ROUTED
    | MOE_WIDTH
    | BIASED
    | LATENT
    | GROUPED
    | {
        "n_routed_experts": of(2, 4),
        "n_shared_experts": of(1, 2),
        "first_k_dense_replace": of(0, 1, 2),
    }
)
LOCAL = ROUTED | {"num_local_experts": of(2, 3)}
NUMBERED = ROUTED | {"num_experts": of(2, 3)}

DENSE = set("gemma gemma2 gemma3_text granite llama mistral olmo2 olmo3 phi3 qwen2 qwen3".split())

PARTLY_DENSE = {"ernie4_5_moe", "llama4", "llama4_text", "switch_transformers"} | {
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "glm4_moe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe",
}
"""Families in which few layers may be left without experts."""

FLAT: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL | HEAD_DIM | {"sliding_window": of(None, 8)},
    "qwen2_moe": NUMBERED
    | MOE_WIDTH
    | STEPPED
    | SLIDING
    | {"shared_expert_intermediate_size": of(8, 14), "qkv_bias": either()},
    "qwen3_moe": NUMBERED | MOE_WIDTH | STEPPED | SLIDING | HEAD_DIM | BIASED,
    "deepseek_v2": DEEPSEEK | {"mlp_bias": either()},
    "deepseek_v3": DEEPSEEK,
    "olmoe": NUMBERED | BIASED,
    "phimoe": LOCAL | BIASED | {"lm_head_bias": either(), "sliding_window": of(None, 8)},
    "gpt_oss": LOCAL | HEAD_DIM | BIASED | {"sliding_window": 8},
    "granitemoe": LOCAL | BIASED,
    "granitemoeshared": LOCAL | BIASED | {"shared_intermediate_size": of(0, 6)},
    "glm4_moe": ROUTED
    | MOE_WIDTH
    | HEAD_DIM
    | BIASED
    | GROUPED
    | {
        "n_routed_experts": of(2, 4),
        "n_shared_experts": of(1, 2),
        "first_k_dense_replace": of(0, 1),
        "use_qk_norm": either(),
    },
    "ernie4_5_moe": MOE_WIDTH
    | {
        "use_bias": either(),
        "moe_num_experts": of(2, 3),
        "moe_k": 1,
        "moe_num_shared_experts": of(0, 2),
        "moe_layer_start_index": of(0, 1),
        "moe_layer_end_index": of(-1, 0, 2),
        "moe_layer_interval": of(1, 2),
    },
    "hunyuan_v1_moe": HEAD_DIM | BIASED | {"num_experts": of(1, 3), "moe_topk": 1},
    "dots1": ROUTED
    | MOE_WIDTH
    | BIASED
    | GROUPED
    | {
        "n_routed_experts": of(2, 4),
        "n_shared_experts": of(1, 2),
        "first_k_dense_replace": of(0, 1),
    },
    "minimax_m2": LOCAL | HEAD_DIM,
    "flex_olmo": NUMBERED | BIASED,
    "aria_text": BIASED
    | HEAD_DIM
    | {
        "moe_num_experts": of(2, 3),
        "moe_topk": 1,
        "moe_num_shared_experts": of(1, 2),
        "mlp_bias": either(),
    },
    "llama4_text": LOCAL
    | HEAD_DIM
    | BIASED
    | {
        "intermediate_size_mlp": of(8, 14),
        "interleave_moe_layer_step": of(1, 2),
        "attention_chunk_size": 16,
    },
    "llama": BIASED | HEAD_DIM | {"mlp_bias": either()},
    "mistral": HEAD_DIM,
    "qwen2": SLIDING,
    "qwen3": SLIDING | HEAD_DIM | BIASED,
    "gemma": HEAD_DIM | BIASED,
    "gemma2": HEAD_DIM | BIASED,
    "gemma3_text": HEAD_DIM | BIASED,
    "olmo2": BIASED,
    "olmo3": BIASED,
    "phi3": {},
    "granite": BIASED | {"mlp_bias": either()},
}


def flat(draw: Draw, family: str) -> dict[str, Any]:
    return {"model_type": family} | sizes(draw) | some(draw, FLAT[family])


def dbrx(draw: Draw) -> dict[str, Any]:
    heads = draw(of(2, 4))
    return {
        "model_type": "dbrx",
        "d_model": heads * draw(of(4, 8)),
        "n_heads": heads,
        "n_layers": draw(st.integers(1, 3)),
        "vocab_size": 40,
        "attn_config": {"kv_n_heads": draw(of(1, 2)), "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": draw(of(6, 10)),
            "moe_num_experts": draw(of(2, 3)),
            "moe_top_k": 1,
        },
    }


def switch(draw: Draw) -> dict[str, Any]:
    return {"model_type": "switch_transformers"} | some(
        draw,
        {
            "d_model": of(8, 12),
            "d_kv": of(2, 4),
            "d_ff": of(10, 14),
            "num_heads": of(2, 3),
            "num_layers": of(1, 2, 4),
            "num_decoder_layers": of(2, 3, 4),
            "num_sparse_encoder_layers": of(0, 1),
            "num_sparse_decoder_layers": of(1, 2),
            "num_experts": of(2, 3),
            "vocab_size": 30,
            "router_bias": either(),
            "relative_attention_num_buckets": of(4, 6),
        },
    )


def llama4(draw: Draw) -> dict[str, Any]:
    vision = {
        "hidden_size": 16,
        "intermediate_size": of(20, 24),
        "num_hidden_layers": of(1, 2),
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": of(7, 14),
        "projector_input_dim": 12,
        "projector_output_dim": 12,
        "vision_output_dim": of(10, 12),
    }
    return {
        "model_type": "llama4",
        "text_config": flat(draw, "llama4_text"),
        "vision_config": some(draw, vision),
        "tie_word_embeddings": False,
    }


def qwen3_vl(draw: Draw) -> dict[str, Any]:
    text = flat(draw, "qwen3_moe") | {"model_type": "qwen3_vl_moe_text"}
    vision = {
        "depth": of(1, 3),
        "hidden_size": 16,
        "intermediate_size": of(12, 20),
        "num_heads": 2,
        "patch_size": of(2, 4),
        "temporal_patch_size": of(1, 2),
        "spatial_merge_size": of(1, 2),
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": of(4, 9),
        "deepstack_visual_indexes": of([0], [0, 1]),
    }
    return {
        "model_type": "qwen3_vl_moe",
        "text_config": text,
        "vision_config": some(draw, vision),
        "tie_word_embeddings": draw(either()),
    }


def aria(draw: Draw) -> dict[str, Any]:
    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": 16,
        "intermediate_size": of(12, 20),
        "num_hidden_layers": of(1, 2),
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": of(4, 8),
    }
    return {
        "model_type": "aria",
        "text_config": flat(draw, "aria_text"),
        "vision_config": some(draw, vision),
        "projector_patch_to_query_dict": draw(of({4: 3}, {4: 3, 16: 5})),
        "tie_word_embeddings": False,
    }


NESTED: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "aria": aria,
    "dbrx": dbrx,
    "llama4": llama4,
    "qwen3_vl_moe": qwen3_vl,
    "switch_transformers": switch,
}


def configuration(draw: Draw, family: str) -> dict[str, Any]:
    return NESTED[family](draw) if family in NESTED else flat(draw, family)


BRIEF = settings(max_examples=10, deadline=None, phases=(Phase.generate, Phase.shrink))


@pytest.mark.parametrize("family", sorted(FLAT | NESTED))
@BRIEF
@given(data=st.data())
def test_every_parameter_is_counted(family: str, data: st.DataObject) -> None:
    config = configuration(data.draw, family)
    model = build(config)
    for known in (config, model.config.to_dict()):
        a = read(known)
        assert a.exact
        assert counted(a) == parameters(model)
    by_layer, routed = per_layer(model)
    assert [layer.params for layer in a.layers] == by_layer
    assert [
        layer.experts.num * sum(w.params for w in layer.experts.expert) if layer.experts else 0
        for layer in a.layers
    ] == routed


def per_layer(model: torch.nn.Module) -> tuple[list[int], list[int]]:
    """Parameters of each decoder layer, and those of its routed experts."""
    layers: dict[int, int] = {}
    experts: dict[int, int] = {}
    corrections = (n for n in model.named_buffers() if n[0].endswith("e_score_correction_bias"))
    for name, tensor in (*model.named_parameters(), *corrections):
        found = LAYER.search(name)
        if found is None or APART.search(name):
            continue
        number = int(found[1])
        layers[number] = layers.get(number, 0) + tensor.numel()
        mine = tensor.numel() if ".experts." in name else 0
        experts[number] = experts.get(number, 0) + mine
    return [layers[i] for i in sorted(layers)], [experts[i] for i in sorted(experts)]


@pytest.mark.parametrize("family", sorted(FLAT))
@BRIEF
@given(data=st.data())
def test_windows_are_those_of_the_masks(family: str, data: st.DataObject) -> None:
    config = configuration(data.draw, family)
    known = CONFIG_MAPPING[family].from_dict(config)
    window = getattr(known, "sliding_window", None) or None
    chunk = getattr(known, "attention_chunk_size", None)
    types = getattr(known, "layer_types", None)
    every = ["sliding_attention"] * known.num_hidden_layers
    expected = [
        {"sliding_attention": window, "chunked_attention": chunk, "full_attention": None}[kind]
        for kind in types or every
    ]
    layers = read(config).layers
    assert [layer.attention.window for layer in layers] == expected
    assert all(
        layer.attention.chunked == (family == "llama4_text")
        for layer in layers
        if (layer.attention.window)
    )


@pytest.mark.parametrize("family", sorted(f for f in FLAT | NESTED if f not in DENSE))
@BRIEF
@given(data=st.data())
def test_bent_configurations_load(family: str, data: st.DataObject) -> None:
    config, draw = configuration(data.draw, family), data.draw
    asked = {
        "ffn_dim": draw(of(None, 16)),
        "num_experts": draw(of(None, 6, 4)),
        "num_layers": draw(of(None, 3, 6)),
        "top_k": None if family == "switch_transformers" else draw(of(None, 3)),
    }
    if (a := read(config)).moe is None:
        return
    # What transformers writes of a DBRX configuration it does not read again.
    forms = [config] if family == "dbrx" else [config, build(config).config.to_dict()]
    for known in forms:
        try:
            bent = bend(known, Model(name=family, weights="dummy", **asked))
        except Infeasible:
            assert family in PARTLY_DENSE
            continue
        b = read(bent)
        for key, value in asked.items():
            assert getattr(b, key) == (getattr(a, key) if value is None else value)
        assert counted(b) == parameters(build(bent))


@pytest.mark.parametrize("name", sorted(set(catalogue()) - WITHOUT_CLASS))
def test_catalogue_is_what_transformers_builds(name: str) -> None:
    """Switch-C is built with 8 of its 2048 experts, each a module of its own: 60 thousand
    modules would take minutes. The experts left out are 2040 times those of one."""
    config = catalogue()[name]["config"]
    a = read(config)
    if a.family == "switch_transformers":
        fewer = read(bend(config, Model(name=name, weights="dummy", num_experts=8)))
        assert counted(fewer) == parameters(build(fewer.config))
        per_expert = a.expert_params + a.hidden_size  # and its row of the router
        layers = sum(layer.experts is not None for layer in a.layers) + 15
        assert a.params_total - fewer.params_total == layers * 2040 * per_expert
    else:
        assert counted(a) == parameters(build(config))


def test_catalogue_without_a_class_is_known() -> None:
    absent = {
        name for name, e in catalogue().items() if e["config"]["model_type"] not in CONFIG_MAPPING
    }
    assert absent == WITHOUT_CLASS


@pytest.mark.parametrize("name", sorted(n for n in catalogue() if n.startswith("deepseek-vl2")))
def test_deepseek_vl2_speaks_deepseek_v2(name: str) -> None:
    """The language part has a class; where it is not MLA, Llama's attention is the same."""
    config = catalogue()[name]["config"]
    text = config["language_config"]
    if text.get("use_mla", True):
        a = read(config)
        corrected = sum(len(layer.experts.router) > 1 for layer in a.layers if layer.experts)
        assert a.params_total == parameters(build(text)) + corrected * a.num_experts
        return
    a, hidden = read(config), text["hidden_size"]
    dense = {key: text[key] for key in ("hidden_size", "intermediate_size", "vocab_size")}
    heads = {key: text[key] for key in ("num_attention_heads", "num_key_value_heads")}
    one = build({"model_type": "llama", "num_hidden_layers": 1} | dense | heads)
    assert a.layers[0].params == sum(
        p.numel() for n, p in one.named_parameters() if ".layers.0." in n
    )
    assert a.attention_params == 4 * hidden**2


@pytest.mark.parametrize("name", sorted(set(catalogue()) - WITHOUT_CLASS - {"switch-c"}))
def test_catalogue_skeletons_load(name: str) -> None:
    bent = bend(
        catalogue()[name]["config"], Model(name=name, weights="dummy", scale=0.125, num_layers=4)
    )
    a = read(bent)
    assert a.num_layers == 4
    assert counted(a) == parameters(build(bent))
