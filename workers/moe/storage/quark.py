"""Checkpoints of AMD's Quark: a scheme for the model, others for layers by wildcard.

Follows vLLM's `quark.py`: `exclude` has paths and `re:` expressions; `layer_quant_config` goes
before `global_quant_config`. The head and embeddings are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from workers.moe.storage import formats
from workers.moe.storage.formats import Format, grouped, nvfp4
from workers.moe.storage.modules import Module, Unreadable, first, listed, mapped


def quark(stored: Mapping[str, Any], before: str) -> Callable[[Module], Format | None]:
    excluded = mapped(stored.get("exclude"), before)
    whole = stored.get("global_quant_config") or {}
    layers = {
        mapped([name], before)[0]: own
        for name, own in (stored.get("layer_quant_config") or {}).items()
    }

    def of(path: str) -> Mapping[str, Any]:
        for pattern, own in layers.items():
            if fnmatch(path, pattern) if "*" in pattern else path in pattern:
                return dict(own)
        return dict(whole)

    def read(m: Module) -> Format | None:
        if m.kind == "head" or _excluded(m, excluded):
            return None
        found = [of(shard) for shard in m.shards] or [of(m.path)]
        if any(own != found[0] for own in found):
            raise Unreadable(f"the matrices of {m.path} are stored differently")
        return _scheme(found[0], m)

    return read


def _excluded(m: Module, patterns: tuple[str, ...]) -> bool:
    if m.kind == "experts":  # one of them is all of them
        plain = (one for one in patterns if not one.startswith("re:"))
        below = any(one == m.path or one.startswith(f"{m.path}.") for one in plain)
        return below or first(m.path, patterns) is not None
    return listed(m, patterns)


def _scheme(own: Mapping[str, Any], m: Module) -> Format:
    weights, inputs = own.get("weight"), own.get("input_tensors")
    if isinstance(weights, list) and len(weights) == 2:
        if weights[0].get("dtype") == "fp4" and weights[0].get("group_size") == 16:
            return nvfp4(compute="fp4" if inputs else None)
        raise Unreadable("two levels of scales other than NVFP4 are not counted")
    weights = weights[0] if isinstance(weights, list) else weights
    inputs = inputs[0] if isinstance(inputs, list) else inputs
    if not isinstance(weights, Mapping):
        raise Unreadable(f"{m.path} has no scheme of its weights")
    kind, scheme = str(weights.get("dtype")), str(weights.get("qscheme"))
    group = weights.get("group_size")
    compute = _compute(inputs)
    static = inputs is not None and not inputs.get("is_dynamic")
    if kind == "fp8_e4m3" and scheme in ("per_tensor", "per_channel"):
        beside = 4 if static and (m.kind != "experts" or m.lead) else 0
        block = (1, 0) if scheme == "per_channel" else (0, 0)
        return Format(bits=8, scale_bytes=4, block=block, matrix_bytes=beside, compute=compute)
    if kind == "fp8_e4m3" and scheme == "per_block" and weights.get("block_size") == [128, 128]:
        return replace(formats.FP8_BLOCK, compute=compute)
    if kind == "fp4" and scheme == "per_group" and group == 32:
        beside = 4 if static and (m.kind != "experts" or m.lead) else 0
        return replace(formats.MXFP4, matrix_bytes=beside, compute=compute)
    if kind in ("int4", "uint4") and inputs is None and isinstance(group, int):
        return grouped(4, group, zero_bits=4)
    if kind == "int8" and scheme == "per_channel" and not static and m.kind != "experts":
        return replace(formats.INT8_CHANNEL, compute=compute)
    raise Unreadable(f"{kind} weights {scheme} of {m.kind} are not counted")


def _compute(inputs: Mapping[str, Any] | None) -> str | None:
    kind = str((inputs or {}).get("dtype"))
    return {"fp8_e4m3": "fp8", "int8": "int8", "fp4": "fp4"}.get(kind)
