"""From what a sweep asks for to the structure that runs.

A model is named (a catalogue entry, a folder, a hub id) and bent (other widths, other
numbers of experts); its configuration is the one source of its dimensions. What a loaded
engine reports is read by the same function, so the numbers in a plan, in a record and in
the engine are one and the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from workers.contract.errors import Infeasible
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.moe.families import read
from workers.moe.fields import UnknownModel as UnknownModel
from workers.moe.structure import Architecture

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")
_FFN = ("moe_intermediate_size", "intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk")


def resolve(model: Model) -> Architecture | None:
    """The structure that `model` asks for, or null where only the engine can find out.

    A hub id whose configuration is not on this machine resolves to null: the plan then
    has no prediction for it, and the record takes the dimensions from the loaded engine.

    Raises:
        UnknownModel: the name is neither in the catalogue, nor a folder, nor a hub id.
        Infeasible: an override that the configuration has no place for.
    """
    config = configuration(model.name)
    return None if config is None else read(bend(config, model))


def configuration(name: str) -> Mapping[str, Any] | None:
    """The Hugging Face configuration behind a name; null for a hub id.

    Raises:
        UnknownModel: see `resolve`.
    """
    if entry := catalogue().get(name):
        config: Mapping[str, Any] = entry["config"]
        return config
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        try:
            return dict(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError) as error:
            raise UnknownModel(f"{folder / 'config.json'} cannot be read: {error}") from error
    if folder.is_dir():
        raise UnknownModel(f"folder {name} has no config.json")
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        return None
    known = ", ".join(sorted(catalogue()))
    raise UnknownModel(
        f"unknown model {name!r}: not in the catalogue ({known}), not a folder, not a hub id"
    )


def bend(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """`config` with the shape overrides of `model`, then its scale, applied.

    The scale multiplies every width (hidden, FFN, vocabulary) and the numbers of heads,
    and keeps the head dimension, so that the shares of attention, experts and embeddings
    stay what they were. FFN widths asked for are scaled too: a grid keeps its ratios.
    """
    bent = dict(config)
    for wanted, keys in (
        (model.ffn_dim, _FFN),
        (model.num_experts, _EXPERTS),
        (model.top_k, _TOP_K),
        (model.num_layers, ("num_hidden_layers",)),
    ):
        if wanted is not None:
            bent[_key(config, keys, model.name)] = wanted
    if model.scale != 1.0:
        for key in _WIDTHS:
            if isinstance(bent.get(key), int):
                bent[key] = _scaled(bent[key], model.scale, multiple=32)
        heads = max(1, round(bent["num_attention_heads"] * model.scale))
        kv_heads = max(1, round(_kv_heads(config) * model.scale))
        bent.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        bent["num_key_value_heads"] = kv_heads
        bent["num_attention_heads"] = heads + -heads % kv_heads
    return bent


def check(architecture: Architecture, layout: Layout) -> None:
    """Whether this structure can run in this layout at all.

    Raises:
        Infeasible: with the arithmetic that does not come out.
    """
    a = architecture
    if a.top_k > a.num_experts:
        raise Infeasible(f"top_k {a.top_k} is above the {a.num_experts} experts of a layer")
    for what, count in (("attention heads", a.num_heads), ("FFN width", a.ffn_dim)):
        if count % layout.tensor and not (what == "FFN width" and layout.expert):
            raise Infeasible(
                f"{count} ({what}) is not divisible by the tensor degree {layout.tensor}"
            )
    if layout.tensor > a.num_kv_heads and layout.tensor % a.num_kv_heads:
        raise Infeasible(
            f"{a.num_kv_heads} KV heads cannot be shared by a tensor degree of {layout.tensor}"
        )
    if a.num_kv_heads >= layout.tensor and a.num_kv_heads % layout.tensor:
        raise Infeasible(
            f"{a.num_kv_heads} KV heads are not divisible by the tensor degree {layout.tensor}"
        )
    if layout.pipeline > a.num_layers:
        raise Infeasible(f"{a.num_layers} layers cannot fill {layout.pipeline} pipeline stages")


@cache
def catalogue() -> Mapping[str, Mapping[str, Any]]:
    """Catalogue name → `{hub_id, source, config}`."""
    folder = resources.files("workers.moe") / "catalog"
    return {
        entry.name.removesuffix(".json"): json.loads(entry.read_text())
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


def run_dtype(architecture: Architecture, model: Model) -> str:
    """The data type that runs: the one asked for, or with `auto` the configuration's own."""
    if model.dtype != "auto":
        return model.dtype
    config = architecture.config
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def _key(config: Mapping[str, Any], keys: tuple[str, ...], name: str) -> str:
    for key in keys:
        if config.get(key) is not None:
            return key
    raise Infeasible(f"model {name} has none of {', '.join(keys)}: there is nothing to override")


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _scaled(value: int, scale: float, *, multiple: int) -> int:
    return max(multiple, round(value * scale / multiple) * multiple)
