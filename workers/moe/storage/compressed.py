"""Checkpoints of compressed-tensors (llm-compressor): groups of targets, each with its own
scheme.

Follows vLLM's `compressed_tensors.py`: a module that `ignore` means is left alone; else the first
target that is its path, an expression for it, the paths of all matrices fused in it, or a part of
the name of its class decides. The head's class is `ParallelLMHead`, so a target `Linear` does not
mean it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from workers.moe.storage import formats
from workers.moe.storage.formats import Format, grouped, nvfp4
from workers.moe.storage.modules import Kind, Module, Unreadable, first, listed, mapped

_CLASSES: Mapping[Kind, str] = {
    "linear": "columnparallellinear",
    "experts": "routedexperts",
    "head": "parallellmhead",
}
"""Names of the engine's classes in lower case; linear layers have several that end alike."""


def compressed_tensors(stored: Mapping[str, Any], before: str) -> Callable[[Module], Format | None]:
    ignored = mapped(stored.get("ignore"), before)
    whole = str(stored.get("format") or "")
    targets: dict[str, Mapping[str, Any]] = {}
    for group in (stored.get("config_groups") or {}).values():
        if len(group["targets"]) == 1 and group["targets"][0].endswith("Attention"):
            continue  # about the cache, not about weights
        own = {**group, "format": group.get("format") or whole}
        targets |= dict.fromkeys(mapped(group["targets"], before), own)
    for name in targets:
        if "embed" in name.lower():
            raise Unreadable(f"embeddings are quantised ({name}), which is not counted")
    if "Linear" in targets:
        targets.setdefault("RoutedExperts", targets["Linear"])

    def read(m: Module) -> Format | None:
        if listed(m, ignored):
            return None
        path = m.own if m.kind == "experts" else m.path
        found = first(path, targets) or _fused(m, targets) or _of_class(m, targets)
        return None if found is None else scheme(targets[found], m)

    return read


def _fused(m: Module, targets: Mapping[str, Any]) -> str | None:
    found = [first(shard, targets) for shard in m.shards]
    return found[0] if found and all(found) else None


def _of_class(m: Module, targets: Mapping[str, Any]) -> str | None:
    name = _CLASSES[m.kind]
    for target in targets:
        if not target.startswith("re:") and target.lower() in name:
            return target
    return None


def scheme(group: Mapping[str, Any], m: Module) -> Format:
    """How one `config_groups` entry stores the matrices of `m` (`_get_scheme_from_parts`).

    Raises:
        Unreadable: no scheme of the engine is like that.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    bits, strategy, kind = int(weights["num_bits"]), str(weights["strategy"]), weights["type"]
    size = int(weights.get("group_size") or 0)
    product = _compute(inputs)
    static = inputs is not None and not inputs.get("dynamic")
    if kind == "float" and bits == 4:
        if strategy == "tensor_group" and size == 16:
            scales = 1 if inputs is None and m.kind != "experts" else 2
            return nvfp4(scales=scales, compute=product)
        if strategy == "group" and size == 32:
            return replace(formats.MXFP4, compute=product)
    if kind == "float" and bits == 8:
        if strategy == "group" and size == 32:
            return replace(formats.MXFP8, compute=product)
        block = {
            "tensor": (0, 0),
            "channel": (1, 0),
            "block": tuple(weights.get("block_structure") or (128, 128)),
        }.get(strategy)
        if block is not None:
            beside = 4 if static and (m.kind != "experts" or m.lead) else 0
            return Format(
                bits=8,
                scale_bytes=4,
                block=(block[0], block[1]),
                matrix_bytes=beside,
                compute=product,
            )
    if kind == "int" and strategy in ("group", "channel", "tensor"):
        if bits == 8 and inputs is not None and strategy != "group":
            once = 4 if static and m.lead else 0
            zero = 1 if once and not inputs.get("symmetric", True) else 0
            return Format(
                bits=8,
                scale_bytes=4,
                block=(1, 0) if strategy == "channel" else (0, 0),
                matrix_bytes=once + zero,
                compute=product,
            )
        alone = inputs is None or m.kind != "experts"  # else the engine unpacks them to 8 bits
        if str(group.get("format")) == "pack-quantized" and strategy != "tensor" and alone:
            # Beside each tensor stands its shape before packing: two numbers.
            own = 4 if m.kind == "experts" else 16
            zero = 0 if weights.get("symmetric", True) else bits
            form = grouped(bits, size if strategy == "group" else -1, zero_bits=zero)
            return replace(form, matrix_bytes=own if m.lead else 0, compute=product)
    raise Unreadable(
        f"{kind} weights of {bits} bits by {strategy} in format {group.get('format')!r} "
        "are not counted"
    )


def _compute(inputs: Mapping[str, Any] | None) -> str | None:
    if inputs is None:
        return None
    bits, kind = int(inputs["num_bits"]), inputs["type"]
    if bits == 8:
        return "int8" if kind == "int" else "fp8"
    return "fp4" if bits == 4 and kind == "float" else None
