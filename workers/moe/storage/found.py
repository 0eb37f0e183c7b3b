"""Where a checkpoint says how it is stored.

In vLLM's order: `quantization_config` of `config.json`; where that is missing, the file
`hf_quant_config.json` beside it (ModelOpt); then `compression_config`, and both again in the
configuration of the language model (`transformers_utils/config.py`,
`model_arch_config_convertor.py`, `weight_utils.get_quant_config`). Which method reads it follows
from what it says (`ModelConfig._verify_quantization`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.moe.fields import NESTED, UnknownModel
from workers.moe.storage.modules import Unreadable

BESIDE = "hf_quant_config.json"
_KEY, _OTHER = "quantization_config", "compression_config"
_MODELOPT = {"FP8": "modelopt", "FP8_PER_CHANNEL_PER_TOKEN": "modelopt", "FP8_PB_WO": "modelopt",
             "NVFP4": "modelopt_fp4"}  # fmt: skip
"""Algorithms that vLLM takes from a file of ModelOpt which names no method."""


def with_file_beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with the quantisation that a file beside it describes, if it has none itself.

    Raises:
        UnknownModel: that file cannot be read.
    """
    file, own = folder / BESIDE, config.get(_KEY)
    if not file.is_file() or (own is not None and not _lacks_layers(own)):
        return config
    try:
        beside = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownModel(f"{file} cannot be read: {error}") from error
    if not isinstance(beside, dict):
        raise UnknownModel(f"{file} holds no quantisation")
    if own is not None:  # older mixed checkpoints have only there what each layer is
        layers = inner(beside)
        beside = {**own, **layers, "ignore": layers.get("exclude_modules", [])}
    return {**config, _KEY: beside}


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `config` says of its quantisation, with the method that reads it as `quant_method`;
    null for a model in full precision.

    Raises:
        Unreadable: it is no mapping, or names no method.
    """
    found = carried(config)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise Unreadable(f"the quantisation of the checkpoint is {found!r}, not a mapping")
    return _resolved(found, config)


def carried(config: Mapping[str, Any]) -> Any:
    """The same as it stands there, unread; null for a model in full precision."""
    for place in (config, *(config[key] for key in NESTED if isinstance(config.get(key), Mapping))):
        for key in (_KEY, _OTHER):
            if place.get(key):
                return place[key]
    return None


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of the same model in full precision."""
    kept = {key: value for key, value in config.items() if key not in (_KEY, _OTHER)}
    for key in NESTED:
        if isinstance(kept.get(key), Mapping):
            kept[key] = {k: v for k, v in kept[key].items() if k not in (_KEY, _OTHER)}
    return kept


def inner(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ModelOpt description that says what is quantised."""
    within = found.get("quantization")
    return within if isinstance(within, Mapping) else found


def _resolved(found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    method = str(found.get("quant_method") or "").lower()
    method = method.replace("compressed_tensors", "compressed-tensors")
    algo = str(inner(found).get("quant_algo") or "").upper()
    producer = found.get("producer")
    if (
        algo
        and isinstance(producer, Mapping)
        and producer.get("name") == "modelopt"
        and inner(found) is not found
    ):
        if algo not in _MODELOPT:
            raise Unreadable(
                f"ModelOpt's quant_algo {algo} is not one that the engine takes from {BESIDE}: "
                f"it takes {', '.join(_MODELOPT)}"
            )
        method = _MODELOPT[algo]
    if method.startswith("modelopt"):
        method = _modelopt(algo, method)
    if method == "fp8" and config.get("model_type") == "deepseek_v4":
        return {**found, "quant_method": "deepseek_v4_fp8",
                "expert_dtype": config.get("expert_dtype", "fp4")}  # fmt: skip
    if not method:
        raise Unreadable("the quantisation names no quant_method")
    return {**found, "quant_method": method}


def _lacks_layers(own: Any) -> bool:
    if not isinstance(own, Mapping):
        return False
    mixed = str(own.get("quant_algo") or "").upper() == "MIXED_PRECISION"
    return mixed and "quantized_layers" not in own


def _modelopt(algo: str, method: str) -> str:
    """`override_quantization_method` of ModelOpt's configurations."""
    if algo == "FP8":
        return "modelopt"
    if algo == "MIXED_PRECISION":
        return "modelopt_mixed"
    if "MXFP8" in algo:
        return "modelopt_mxfp8"
    return "modelopt_fp4" if "FP4" in algo else method
