"""The structure of an MoE model, read from its Hugging Face configuration.

Everything that costs something follows from a handful of dimensions: how many layers,
how wide, how many experts and how many of them a token uses. They come from the model's
own configuration (a catalogue entry, a folder, or what a loaded engine reports), never
from the model's name, and a skeleton is the same configuration with some of them bent.
So the numbers in a plan, in a record and in the engine are one and the same.

Parameter counts are given only for structures that are spelled out here (the Mixtral
family: grouped-query attention, every layer an MoE layer, three matrices per expert, no
biases); for others they are null rather than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from workers.contract.errors import Infeasible
from workers.contract.layout import Layout
from workers.contract.model import Model

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")
_FFN = ("moe_intermediate_size", "intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk")


class UnknownModel(ValueError):
    """No catalogue entry, no folder with a configuration, and not the form of a hub id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Dimensions of one model, and what they imply."""

    family: str
    """`model_type` of the configuration."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    """Width of one routed expert (of the dense FFN where there are no experts)."""
    num_experts: int
    """Routed experts per MoE layer; 1 is a dense model."""
    top_k: int
    shared_experts: int
    vocab_size: int
    tied: bool
    """Input and output embeddings are one matrix."""
    config: Mapping[str, Any]
    """The configuration behind it, with every override applied."""

    @property
    def spelled_out(self) -> bool:
        """Whether parameters are counted exactly for this structure."""
        return self.family == "mixtral"

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down projections."""
        return 3 * self.hidden_size * self.ffn_dim

    @property
    def attention_params(self) -> int:
        """Parameters of the attention projections of one layer."""
        queries = self.num_heads * self.head_dim
        keys = self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys)

    @property
    def params_total(self) -> int | None:
        """All parameters; null where the structure is not spelled out."""
        return self._params(self.num_experts)

    @property
    def params_active(self) -> int | None:
        """Parameters that one token uses, input embedding included."""
        return self._params(self.top_k)

    def _params(self, experts: int) -> int | None:
        if not self.spelled_out:
            return None
        router = self.hidden_size * self.num_experts
        norms = 2 * self.hidden_size
        layer = self.attention_params + router + norms + experts * self.expert_params
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * layer + self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


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


def read(config: Mapping[str, Any]) -> Architecture:
    """The structure in a Hugging Face configuration (the language part of a nested one)."""
    config = config.get("text_config") or config
    experts = _first(config, _EXPERTS)
    return Architecture(
        family=str(config.get("model_type", "")),
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=_kv_heads(config),
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        ffn_dim=_first(config, _FFN) or 0,
        num_experts=experts or 1,
        top_k=(_first(config, _TOP_K) or 1) if experts else 1,
        shared_experts=config.get("n_shared_experts") or 0,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        config=config,
    )


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


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _scaled(value: int, scale: float, *, multiple: int) -> int:
    return max(multiple, round(value * scale / multiple) * multiple)
