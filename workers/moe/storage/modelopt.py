"""Checkpoints of NVIDIA's ModelOpt: FP8, NVFP4, MXFP8, or another one for each layer.

Follows vLLM's `modelopt.py`. Unlike FP8 checkpoints of others these quantise the head as well,
unless it is excluded, and every exclusion may be a path, a part of one, or a wildcard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workers.moe.storage import formats
from workers.moe.storage.formats import Format, nvfp4
from workers.moe.storage.found import inner
from workers.moe.storage.modules import Module, Unreadable, mapped, wildcard

ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8")
_BLOCKS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")


def modelopt(stored: Mapping[str, Any], before: str) -> Callable[[Module], Format | None]:
    """One algorithm for the whole model."""
    said = inner(stored)
    algo = str(said.get("quant_algo") or "").upper()
    group = int(said.get("group_size") or 16)
    if stored["quant_method"] in ("mxfp8", "modelopt_mxfp8") and not algo:
        algo, excluded = "MXFP8", stored.get("ignored_layers")
    else:
        excluded = said.get("exclude_modules" if said is not stored else "ignore")
    if algo == "NVFP4" and _weights_alone(stored):
        algo = "W4A16_NVFP4"
    if algo not in ALGOS:
        raise Unreadable(f"quant_algo {algo or None} is not counted: known are {', '.join(ALGOS)}")
    patterns = _patterns(excluded, before)

    def read(m: Module) -> Format | None:
        return None if wildcard(m, patterns) else _format(algo, group, m, mixed=False)

    return read


def mixed(stored: Mapping[str, Any], before: str) -> Callable[[Module], Format | None]:
    """An algorithm for each module that `quantized_layers` names; the others are left alone."""
    said = inner(stored)
    listed: Mapping[str, Mapping[str, Any]] = said.get("quantized_layers") or {}
    if not listed:
        raise Unreadable("MIXED_PRECISION without quantized_layers")
    layers = {mapped([name], before)[0]: own for name, own in listed.items()}
    groups = (own.get("group_size") for own in layers.values() if "NVFP4" in _algo(own))
    group = int(said.get("group_size") or next(groups, None) or 16)
    patterns = _patterns(said.get("exclude_modules" if said is not stored else "ignore"), before)

    def read(m: Module) -> Format | None:
        if wildcard(m, patterns) or (algo := _of(m, layers)) is None:
            return None
        if algo not in (*ALGOS, *_BLOCKS):
            raise Unreadable(f"quant_algo {algo} of {m.path} is not counted")
        return _format(algo, group, m, mixed=True)

    return read


def _format(algo: str, group: int, m: Module, *, mixed: bool) -> Format | None:
    if algo == "MXFP8":
        return formats.MXFP8
    if algo in ("NVFP4", "W4A16_NVFP4"):
        inputs = algo == "NVFP4"  # whose scale experts have in any case
        scales = 2 if inputs or m.kind == "experts" else 1
        return nvfp4(group, scales=scales, compute="fp4" if inputs else None)
    if algo in _BLOCKS and (m.kind != "experts" or mixed):
        return formats.FP8_BLOCK
    if algo == "FP8_PER_CHANNEL_PER_TOKEN" and m.kind != "experts":
        return formats.FP8_CHANNEL
    # Scales of inputs: one per matrix, but one for gate and up of experts.
    return replace(formats.FP8_TENSOR, matrix_bytes=4 if m.kind != "experts" or m.lead else 0)


def _of(m: Module, layers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The algorithm of a module (`_resolve_quant_algo`)."""
    for path in _spellings(m.path):
        if path in layers:
            return _algo(layers[path])
    if m.shards:
        found = {
            _algo(layers[one]) for shard in m.shards for one in _spellings(shard) if one in layers
        }
        if len(found) > 1:
            raise Unreadable(f"the matrices of {m.path} are stored differently")
        return next(iter(found), None)
    above = m.path.removesuffix(".experts") if m.kind == "experts" else m.path
    for prefix in dict.fromkeys((f"{m.path}.", f"{above}.")):
        for name, own in layers.items():
            if name.startswith(prefix):
                return _algo(own)
    return None


def _spellings(path: str) -> tuple[str, ...]:
    return (path, "lm_head") if path.endswith(".lm_head") else (path,)


def _algo(own: Mapping[str, Any]) -> str:
    return str(own.get("quant_algo") or "").upper()


def _patterns(excluded: Sequence[str] | None, before: str) -> tuple[str, ...]:
    """Exclusions as the engine has them: `path*` becomes the path and all below it."""
    found: list[str] = []
    for one in excluded or ():
        if len(one) > 1 and one.endswith("*") and one[-2] != ".":
            found += (one[:-1], f"{one[:-1]}.*")
        else:
            found.append(one)
    return mapped(found, before)


def _weights_alone(stored: Mapping[str, Any]) -> bool:
    """Whether groups are described and none of them quantises its inputs."""
    groups = stored.get("config_groups")
    return isinstance(groups, Mapping) and bool(groups) and all(
        isinstance(group, Mapping) and group.get("input_activations") is None
        for group in groups.values()
    )  # fmt: skip
