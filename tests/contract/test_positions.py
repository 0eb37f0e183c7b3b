"""Lengths and generators as the installed vLLM works them out, without an engine.

Its own functions read the same configurations, from a folder as an engine would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from workers.contract.errors import Infeasible
from workers.moe import generators
from workers.moe.architecture import catalogue
from workers.moe.overrides import ALIASES, applied
from workers.moe.positions import ALLOW_LONG, KEYS, SILENT, UNSCALED, positions, served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

WITHOUT_CLASS = {"arctic", "grok-1", "molmoe-1b"}
"""Catalogue entries whose code lies beside their checkpoint only."""
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
STRUCTURED: dict[str, dict[str, Any]] = {
    "deepseek-v3.2": {
        "model_type": "deepseek_v32",
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1},
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
    },
    "gemma-4-26b": {
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": 1024,
        },
    },
    "gemma-3-12b": {
        "model_type": "gemma3_text",
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    },
    "kimi-k2.5": {
        "model_type": "kimi_k25",
        "text_config": {
            "model_type": "kimi_k2",
            "max_position_embeddings": 262144,
            "rope_theta": 50000.0,
            "rope_scaling": YARN | {"factor": 64.0},
        },
    },
    "minimax-m2.5": {
        "model_type": "minimax_m2",
        "max_position_embeddings": 196608,
        "rope_theta": 5000000,
    },
    "qwen3.5-35b": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "phi with longrope": {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 48,
            "short_factor": [1.0] * 48,
        },
    },
}
"""Position fields of published configurations, by model."""
LENGTHS = (None, -1, 1, 2048, 4096, 4097, 8192, 131072, 163840, 10**8)
ROTARY: tuple[dict[str, Any] | None, ...] = (
    None,
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 1.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"type": "su", "long_factor": [1.0] * 32, "short_factor": [1.0] * 32},
    {"type": "mrope", "mrope_section": [8, 12, 12]},
)


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_LONG, raising=False)


def vllm_s(
    folder: Path,
    config: Mapping[str, Any],
    length: int | None,
    *,
    window_only: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> int | None:
    """The length that vLLM serves; null where it refuses."""
    from vllm.config.model import ModelConfig, _get_and_verify_max_len
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    flat = {k: v for k, v in (overrides or {}).items() if not isinstance(v, dict)}
    blocks = {k: v for k, v in (overrides or {}).items() if isinstance(v, dict)}
    whole = get_config(folder, False, hf_overrides_kw=flat)
    laid = SimpleNamespace(_update_nested=None)
    laid._update_nested = lambda target, updates: ModelConfig._update_nested(laid, target, updates)
    ModelConfig._apply_dict_overrides(laid, whole, blocks)
    text = get_hf_text_config(whole)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(whole.model_type, ModelArchConfigConvertorBase)
    found = convertor(whole, text).derive_max_model_len_and_key()
    try:
        return _get_and_verify_max_len(
            hf_config=text,
            model_arch_config=SimpleNamespace(derived_max_model_len_and_key=found),
            tokenizer_config=None,
            max_model_len=length,
            disable_sliding_window=window_only,
            sliding_window=getattr(text, "sliding_window", None),
        )
    except ValueError as error:
        if "is greater than the derived max_model_len" not in str(error):
            raise
        return None


def ours(
    config: Mapping[str, Any],
    length: int | None,
    *,
    window_only: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> int | None:
    found = positions(applied(config, overrides or {}), window_only=window_only)
    assert found is not None
    try:
        return served(found, length)
    except Infeasible:
        return None


@pytest.mark.parametrize("name", sorted(set(catalogue()) - WITHOUT_CLASS - {"switch-c"}))
def test_lengths_of_the_catalogue(name: str, tmp_path: Path) -> None:
    config = catalogue()[name]["config"]
    for length in LENGTHS:
        assert ours(config, length) == vllm_s(tmp_path, config, length), length


@pytest.mark.parametrize("name", sorted(STRUCTURED))
@pytest.mark.parametrize("window_only", [False, True])
def test_lengths_of_published_configurations(name: str, window_only: bool, tmp_path: Path) -> None:
    config = STRUCTURED[name]
    for length in LENGTHS:
        expected = vllm_s(tmp_path, config, length, window_only=window_only)
        assert ours(config, length, window_only=window_only) == expected, length


@settings(
    max_examples=40,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_lengths_of_any_rotary_setting(data: st.DataObject, tmp_path: Path) -> None:
    of = st.sampled_from
    config: dict[str, Any] = {
        "model_type": data.draw(of(["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "llama"])),
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "head_dim": 64,
        "rope_theta": 10000.0,
    }
    for key in ("max_position_embeddings", "seq_length", "max_seq_len", "model_max_length"):
        if (value := data.draw(of([None, 1024, 4096, 131072]))) is not None:
            config[key] = value
    if (rotary := data.draw(of(ROTARY))) is not None:
        config["rope_scaling"] = dict(rotary)
    if "type" in (rotary or {}) and data.draw(st.booleans()):
        config["original_max_position_embeddings"] = 512
    config["sliding_window"] = data.draw(of([None, 128, 10**6]))
    overrides = data.draw(of([{}, {"max_position_embeddings": 3000}, {"model_max_length": 9000}]))
    asked = {"window_only": data.draw(st.booleans()), "overrides": overrides}
    length = data.draw(of(LENGTHS))
    assert ours(config, length, **asked) == vllm_s(tmp_path, config, length, **asked)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mixtral-8x7b", {"max_position_embeddings": 100}),
        ("mixtral-8x7b", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("mixtral-8x7b", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
        ("llama-4-scout", {"max_position_embeddings": 100}),
        ("llama-4-scout", {"text_config": {"max_position_embeddings": 100}}),
        ("llama-4-scout", {"text_config": {"rope_parameters": {"rope_type": "dynamic"}}}),
    ],
)
def test_lengths_under_overrides(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    config = catalogue()[name]["config"]
    for length in LENGTHS:
        expected = vllm_s(tmp_path, config, length, overrides=overrides)
        assert ours(config, length, overrides=overrides) == expected, length


def test_what_classes_say_where_configurations_are_silent() -> None:
    from transformers import CONFIG_MAPPING

    registered = {name for name in SILENT if name in CONFIG_MAPPING}
    assert SILENT.keys() - registered == {"kimi_k2"}, "vLLM reads it as deepseek_v3"
    assert SILENT["kimi_k2"] == SILENT["deepseek_v3"]
    for name in registered:
        text = CONFIG_MAPPING[name]().get_text_config()
        told = [getattr(text, key) for key in KEYS if getattr(text, key, None) is not None]
        assert min(told) == SILENT[name], name
        for one in (text.rope_parameters, *text.rope_parameters.values()):
            unscaled = not isinstance(one, dict) or one.get("rope_type", "default") in UNSCALED
            assert unscaled or "factor" not in one, name


def test_aliases_are_those_of_the_classes() -> None:
    from transformers import CONFIG_MAPPING

    read = {
        "hidden_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_local_experts",
    }
    for name in SILENT.keys() | ALIASES.keys():
        known = CONFIG_MAPPING["deepseek_v3" if name == "kimi_k2" else name].attribute_map
        wanted = {alias: real for alias, real in known.items() if alias in read}
        assert ALIASES.get(name, {}) == wanted, name


def test_endings_and_exceptions_are_those_of_the_registry() -> None:
    from vllm.config.model import _SUFFIX_TO_DEFAULTS
    from vllm.model_executor.models import registry

    theirs = ((ending, runner == "generate") for ending, (runner, _) in _SUFFIX_TO_DEFAULTS)
    assert tuple(theirs) == generators.ENDINGS
    generate = registry._TEXT_GENERATION_MODELS | registry._MULTIMODAL_MODELS
    wrong = {name for name in generate if generators.generates(name) is False}
    assert wrong == set()
    assert generate.keys() >= generators.GENERATE
    pooling = (
        registry._REWARD_MODELS
        | registry._SEQUENCE_CLASSIFICATION_MODELS
        | registry._TOKEN_CLASSIFICATION_MODELS
    )
    assert [name for name in pooling if generators.generates(name)] == []


def test_a_folder_without_architectures_is_no_generator_to_vllm(tmp_path: Path) -> None:
    from vllm.transformers_utils.config import get_config

    config = {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (named,) = get_config(tmp_path, False).architectures
    assert generators.generates(named) is False
    reason = generators.refusal(config)
    assert reason is not None and "names no architectures" in reason
