"""`engine.args.hf_overrides`: what a sweep changes in a model's configuration itself.

A sweep bends a model by its own fields (`model.top_k`, `model.ffn_dim`, …), which become entries
of a configuration, and may override other entries by vLLM's `hf_overrides`. Both reach the engine:
the user's entries are laid over those that bending wrote, block by block, and an entry that both
set to different values is a contradiction, because whichever won, the other would stand in the
sweep and not in the model. Overrides come last and as they are: `model.scale` does not shrink them.

What an override does is what vLLM does with it (vllm/config/model.py, `_apply_dict_overrides`): a
block of another configuration (`text_config`) is changed entry by entry, any other block is
replaced, and a name that the family's class in transformers maps to another (`ALIASES`) sets that
one. So plan, prediction and record read the structure that runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workers.contract.engine import EngineSettings
from workers.contract.errors import Contradiction

HF_OVERRIDES = "hf_overrides"
KEY = f"engine.args.{HF_OVERRIDES}"
_PLAIN = ("quantization_config", "compression_config")
"""Blocks that are no configuration of their own, whatever their name says."""
_LOCAL, _ROUTED, _PLAIN_EXPERTS = "num_local_experts", "n_routed_experts", "num_experts"
ALIASES: Mapping[str, Mapping[str, str]] = {
    "dbrx": {
        "hidden_size": "d_model",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
    "deepseek_v2": {_PLAIN_EXPERTS: _ROUTED},
    "deepseek_v3": {_LOCAL: _ROUTED},
    "dots1": {_LOCAL: _ROUTED},
    "ernie4_5_moe": {_PLAIN_EXPERTS: "moe_num_experts", "num_experts_per_tok": "moe_k"},
    "flex_olmo": {_LOCAL: _PLAIN_EXPERTS},
    "glm4_moe": {_LOCAL: _ROUTED},
    "gpt_oss": {_PLAIN_EXPERTS: _LOCAL},
    "hunyuan_v1_moe": {"num_experts_per_tok": "moe_topk", _LOCAL: _PLAIN_EXPERTS},
    "kimi_k2": {_LOCAL: _ROUTED},
    "minimax_m2": {_PLAIN_EXPERTS: _LOCAL},
    "mixtral": {_PLAIN_EXPERTS: _LOCAL},
    "olmoe": {_LOCAL: _PLAIN_EXPERTS},
    "qwen3_moe": {_PLAIN_EXPERTS: _LOCAL},
    "qwen3_vl_moe_text": {_PLAIN_EXPERTS: _LOCAL},
    "switch_transformers": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    },
}
"""By `model_type`: a name → the one that it stands for, of entries that a structure is read from
(`attribute_map` of the classes in transformers 5)."""
_ROTARY = ("rope_scaling", "rope_parameters")
"""Two names of one block, of every family; a file that has both means the first."""

Tree = dict[str, Any]


def of(engine: EngineSettings) -> Mapping[str, Any]:
    """The overrides of a sweep; empty where it has none, or something that is no block."""
    found = engine.args.get(HF_OVERRIDES)
    return found if isinstance(found, Mapping) else {}


def applied(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Tree:
    """`config` with `overrides` as vLLM lays them over it."""
    changed = dict(config)
    for name, value in overrides.items():
        key = _spelt(config, name)
        below = config.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and _configuration(key):
            changed[key] = _merged(below, value)
        else:
            changed[key] = value
    return changed


def over(
    config: Mapping[str, Any], bent: Mapping[str, Any], overrides: Mapping[str, Any], fields: str
) -> Tree:
    """`overrides` over what bending made of `config`.

    Args:
        config: as the model has it.
        bent: as the trial's own fields make it.
        overrides: the sweep's.
        fields: the fields that bent it, for a message.

    Raises:
        Contradiction: both set one entry, and differently.
    """
    ours = dict(_leaves(changes(config, bent)))
    for path, value in _leaves(overrides):
        spelt = _path(config, path)
        for known, set_to in ours.items():
            if known[: len(spelt)] != spelt and spelt[: len(known)] != known:
                continue
            if known != spelt or set_to != value:
                told = ".".join(path)
                raise Contradiction(
                    f"{KEY}.{told} is {value!r}, but {fields} sets {'.'.join(known)} to "
                    f"{set_to!r}: keep one of them",
                    key=f"{KEY}.{told}",
                )
    return applied(bent, overrides)


def changes(config: Mapping[str, Any], bent: Mapping[str, Any]) -> Tree:
    """Entries of `bent` that differ from those of `config`."""
    changed: Tree = {}
    for key, value in bent.items():
        known = config.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            if inner := changes(known, value):
                changed[key] = inner
        elif known != value:
            changed[key] = value
    return changed


def _spelt(config: Mapping[str, Any], name: str) -> str:
    """Where `name` stands in `config`: under itself, or as the class in transformers has it."""
    if name in _ROTARY:
        return next((one for one in _ROTARY if config.get(one)), name)
    family = str(config.get("model_type") or "")
    aliases = ALIASES.get(family, {})
    real = aliases.get(name, name)
    if real in config:
        return real
    others = (alias for alias, stands_for in aliases.items() if stands_for == real)
    return next((alias for alias in others if alias in config), real)


def _path(config: Mapping[str, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """A path of an override as `config` spells it."""
    name, *deeper = path
    key = _spelt(config, name)
    below = config.get(key)
    if not deeper or not isinstance(below, Mapping):
        return (key, *deeper)
    return (key, *_path(below, tuple(deeper)))


def _merged(below: Mapping[str, Any], value: Mapping[str, Any]) -> Tree:
    changed = dict(below)
    for name, inner in value.items():
        key = _spelt(below, name)
        known = below.get(key)
        if isinstance(inner, Mapping) and isinstance(known, Mapping):
            inner = _merged(known, inner)
        changed[key] = inner
    return changed


def _configuration(key: str) -> bool:
    """Whether a block of that name is a configuration of its own in transformers."""
    return key.endswith("_config") and key not in _PLAIN


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from (((key, *path), inner) for path, inner in _leaves(value))
        else:
            yield (key,), value
