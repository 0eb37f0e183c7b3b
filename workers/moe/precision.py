"""How many bytes a weight takes as it is stored.

Bytes per parameter is not one number. A quantised checkpoint keeps its embeddings, router,
norms and head in 16 bits, and beside each group of quantised values stand a scale, perhaps
a zero point, perhaps the order of the inputs. A checkpoint's configuration says which, so
the bytes follow from it, weight by weight, with nothing assumed for the whole model.

Formats are those that vLLM's layers and transformers' quantisers allocate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

from workers.contract.model import Model
from workers.moe.architecture import DTYPE_BYTES, run_dtype
from workers.moe.structure import Architecture, Part, Weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How the values of one matrix are stored."""

    bits: int
    """Per value."""
    scale_bytes: float = 0.0
    """Per block; a mean where scales have scales of their own."""
    block: tuple[int, int] = (0, 0)
    """Outputs × inputs that share a scale; 0 stands for all of them."""
    zero_bits: int = 0
    """Zero point, per block."""
    index_bytes: int = 0
    """Group that an input belongs to (`g_idx` of GPTQ), per input."""
    compute: str | None = None
    """Type of the product, as `Device.tflops` names it; null where the values are unpacked
    to the type of the activations first."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of (outputs, inputs) with all that belongs to it."""
        outputs, inputs = shape
        rows, columns = self.block
        blocks = ceil(outputs / (rows or outputs)) * ceil(inputs / (columns or inputs))
        beside = blocks * (self.scale_bytes + self.zero_bits / 8) + inputs * self.index_bytes
        return ceil(outputs * inputs * self.bits / 8 + beside)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What is done with the weights that it is about."""

    format: Format | None
    """Null: they stay in the type of the activations."""
    parts: tuple[Part, ...]
    pattern: str = ""
    """Regular expression found somewhere in a module's path; empty for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A quantisation: the first rule that is about a weight decides, none leaves it alone."""

    method: str
    """Its name in the configuration, or as it was asked for."""
    rules: tuple[Rule, ...]

    def format(self, weight: Weight, layer: int | None) -> Format | None:
        """How `weight` is stored; null for the type of the activations.

        Vectors, and gates with a single output, are never quantised. All routed experts of
        a layer are taken to be stored as its first one.
        """
        if len(weight.shape) != 2 or weight.shape[0] == 1:
            return None
        name = weight.name if layer is None else f"model.layers.{layer}.{weight.name}"
        name = name.replace("*", "0")
        for rule in self.rules:
            if weight.part in rule.parts and _found(rule.pattern, name):
                return rule.format
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Types of weights and cache of a model as it runs."""

    dtype: str
    """Of activations and of all weights that are not quantised."""
    kv_dtype: str
    """Of the KV cache."""
    scheme: Scheme | None = None
    """Quantisation of weights."""

    def bytes(self, weight: Weight, layer: int | None = None) -> int:
        """Bytes of one copy of `weight`, of decoder layer `layer` unless it is outside them.

        Scales, zero points and bias included.
        """
        size = DTYPE_BYTES[self.dtype]
        stored = self.scheme.format(weight, layer) if self.scheme else None
        if stored is None:
            return weight.params * size
        return stored.bytes(weight.shape) + (weight.params - weight.values) * size

    @property
    def kv_bytes(self) -> float:
        """Bytes of one cached value."""
        return _CACHE_BYTES[self.kv_dtype]

    @property
    def compute(self) -> str:
        """Peak that matrix products run at: `bf16`, `fp16`, `fp32`, `fp8` or `int8`.

        With a quantisation of weights and activations, that of the quantised products.
        """
        for rule in self.scheme.rules if self.scheme else ():
            if rule.format and rule.format.compute:
                return rule.format.compute
        return _COMPUTE[self.dtype]


def precision(a: Architecture, model: Model, *, kv_cache_dtype: str | None = None) -> Precision:
    """Types that `a` runs in: its checkpoint's quantisation, else the one asked for.

    `kv_cache_dtype` is the engine's setting; `auto` and null follow the checkpoint, else the
    type of the activations.

    Raises:
        ValueError: a type or a quantisation whose storage is not known here; it is named.
    """
    dtype = run_dtype(a, model)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPE_BYTES)}")
    stored = a.config.get("quantization_config") or skeleton(model) or {}
    cache = kv_cache_dtype or "auto"
    if cache == "auto":
        cache = "fp8" if _cache_bits(stored) == 8 else dtype
    if cache not in _CACHE_BYTES:
        raise ValueError(f"unknown kv_cache_dtype {cache!r}: known are {', '.join(_CACHE_BYTES)}")
    return Precision(dtype=dtype, kv_dtype=cache, scheme=_scheme(stored, model.quantization))


_COMPUTE: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_CACHE_BYTES: Mapping[str, float] = {
    **{dtype: float(size) for dtype, size in DTYPE_BYTES.items()},
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "int8": 1.0,
}
_LAYER: tuple[Part, ...] = ("attention", "expert", "shared", "dense")
"""Parts whose matrices engines quantise; the router stays, for it decides."""

_FP8_TENSOR = Format(bits=8, scale_bytes=4, compute="fp8")
_FP8_CHANNEL = Format(bits=8, scale_bytes=4, block=(1, 0), compute="fp8")
_FP8_BLOCK = Format(bits=8, scale_bytes=4, block=(128, 128), compute="fp8")
_INT8_CHANNEL = Format(bits=8, scale_bytes=4, block=(1, 0), compute="int8")
_MXFP8 = Format(bits=8, scale_bytes=1, block=(1, 32), compute="fp8")
_MXFP4 = Format(bits=4, scale_bytes=1, block=(1, 32))

_ONLINE: Mapping[str, tuple[Format, tuple[Part, ...]]] = {
    "fp8": (_FP8_TENSOR, _LAYER),
    "fp8_per_tensor": (_FP8_TENSOR, _LAYER),
    "fp8_per_channel": (_FP8_CHANNEL, _LAYER),
    "ptpc_fp8": (_FP8_CHANNEL, _LAYER),
    "fp8_per_block": (_FP8_BLOCK, _LAYER),
    "mxfp8": (_MXFP8, _LAYER),
    "mxfp4": (_MXFP4, _LAYER),
    "int8": (_INT8_CHANNEL, _LAYER),
    "experts_int8": (_INT8_CHANNEL, ("expert",)),
    "int8_per_channel_weight_only": (_INT8_CHANNEL, ("expert",)),
}
"""Quantisations that an engine applies to 16-bit weights as it loads them."""


_WITHOUT_ROUTER = ["lm_head", "re:.*gate$"]
_SKELETONS: Mapping[str, Mapping[str, Any]] = {
    "awq": {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": ["gate"],
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "dynamic": {r"-:.*gate$": {}},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": _WITHOUT_ROUTER,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    },
}  # fmt: skip
"""How the published checkpoints of a Mixtral are stored: in 4 bits by groups of 128 inputs, or
with weights and activations in INT8."""


def skeleton(model: Model) -> Mapping[str, Any] | None:
    """The `quantization_config` of a skeleton for which a quantisation is asked that engines know
    of checkpoints alone; null for any other model."""
    return _SKELETONS.get(model.quantization or "") if model.weights == "dummy" else None


def _scheme(stored: Mapping[str, Any], asked: str | None) -> Scheme | None:
    """The checkpoint's own quantisation goes before the one asked for, as in the engine."""
    if stored:
        method = str(stored.get("quant_method") or "")
        if method not in _STORED:
            raise ValueError(f"unknown quantisation {method!r}: known are {', '.join(_STORED)}")
        return Scheme(method=method, rules=tuple(_STORED[method](stored)))
    if asked is None:
        return None
    if asked == "bitsandbytes":
        rules = tuple(_bitsandbytes({"load_in_4bit": True}))
        return Scheme(method=asked, rules=rules)
    if asked in _STORED and asked not in _ONLINE:
        raise ValueError(f"quantisation {asked!r} needs a checkpoint that says how it is stored")
    if asked not in _ONLINE:
        raise ValueError(f"unknown quantisation {asked!r}: known are {', '.join(_ONLINE)}")
    form, parts = _ONLINE[asked]
    return Scheme(method=asked, rules=(Rule(format=form, parts=parts),))


def _fp8(stored: Mapping[str, Any]) -> Iterable[Rule]:
    yield _kept(stored.get("ignored_layers") or stored.get("modules_to_not_convert"))
    block = stored.get("weight_block_size")
    # Static activation scales stand beside the scale of the weight.
    scales = 8 if stored.get("activation_scheme") == "static" else 4
    form = Format(
        bits=8, scale_bytes=scales, block=(block[0], block[1]) if block else (0, 0), compute="fp8"
    )
    yield Rule(format=form, parts=_LAYER)


def _fbgemm_fp8(stored: Mapping[str, Any]) -> Iterable[Rule]:
    yield _kept(stored.get("modules_to_not_convert"))
    yield Rule(format=_FP8_CHANNEL, parts=_LAYER)


def _gptq(stored: Mapping[str, Any]) -> Iterable[Rule]:
    parts: tuple[Part, ...] = (*_LAYER, "head") if stored.get("lm_head") else _LAYER

    def form(own: Mapping[str, Any]) -> Format:
        bits = int(own.get("bits", stored["bits"]))
        group = int(own.get("group_size", stored["group_size"]))
        return _grouped(bits, group, zero_bits=bits, index_bytes=4)

    for pattern, own in (stored.get("dynamic") or {}).items():
        kept = pattern.startswith("-:")
        yield Rule(
            format=None if kept else form(own),
            parts=parts,
            pattern=f"^(?:{pattern.removeprefix('-:').removeprefix('+:')})",
        )
    named = _flat(stored.get("modules_in_block_to_quantize") or ())
    yield Rule(format=form({}), parts=parts, pattern=_any(map(_path, named)))


def _awq(stored: Mapping[str, Any]) -> Iterable[Rule]:
    bits = int(stored.get("w_bit") or stored["bits"])
    group = int(stored.get("q_group_size") or stored["group_size"])
    names = stored.get("modules_to_not_convert") or ()
    if names:
        yield Rule(format=None, parts=_LAYER, pattern=_any(map(re.escape, names)))
    yield Rule(
        format=_grouped(bits, group, zero_bits=bits if stored.get("zero_point", True) else 0),
        parts=(*_LAYER, "head") if stored.get("lm_head") else _LAYER,
    )


def _compressed_tensors(stored: Mapping[str, Any]) -> Iterable[Rule]:
    parts: tuple[Part, ...] = (*_LAYER, "head")
    if ignored := stored.get("ignore"):
        yield Rule(format=None, parts=parts, pattern=_any(map(_target, ignored)))
    by_class = []
    for group in (stored.get("config_groups") or {}).values():
        form = _compressed(group)
        for target in group["targets"]:
            if target in _CLASSES:
                by_class.append(Rule(format=form, parts=_CLASSES[target]))
            elif not target.endswith("Attention"):  # about the cache, not about weights
                yield Rule(format=form, parts=parts, pattern=_target(target))
    yield from by_class


_CLASSES: Mapping[str, tuple[Part, ...]] = {
    "Linear": (*_LAYER, "head"),
    "RoutedExperts": ("expert",),
    "FusedMoE": ("expert",),
}


def _compressed(group: Mapping[str, Any]) -> Format:
    """One `config_groups` entry of compressed-tensors."""
    weights, inputs = group["weights"], group.get("input_activations") or {}
    bits, strategy = int(weights["num_bits"]), str(weights["strategy"])
    whole = weights["type"] == "int"
    block = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, int(weights.get("group_size") or 0)),
        "block": tuple(weights.get("block_structure") or (128, 128)),
    }.get(strategy)
    if block is None:
        raise ValueError(f"unknown compressed-tensors strategy {strategy!r} of {bits}-bit weights")
    exponents = not whole and strategy == "group"  # MX formats: one byte per block
    scale = 1 if exponents else 2 if whole and not inputs else 4
    eight = inputs and int(inputs["num_bits"]) == 8
    return Format(
        bits=bits,
        scale_bytes=scale,
        block=(block[0], block[1]),
        zero_bits=0 if weights.get("symmetric", True) else bits,
        index_bytes=4 if weights.get("actorder") in ("group", "dynamic") else 0,
        compute=("int8" if inputs["type"] == "int" else "fp8") if eight else None,
    )


def _mxfp4(stored: Mapping[str, Any]) -> Iterable[Rule]:
    yield _kept(stored.get("modules_to_not_convert"))
    yield Rule(format=_MXFP4, parts=("expert",))


def _bitsandbytes(stored: Mapping[str, Any]) -> Iterable[Rule]:
    yield _kept(stored.get("llm_int8_skip_modules"))
    if stored.get("load_in_8bit"):
        yield Rule(format=_INT8_CHANNEL, parts=_LAYER)
        return
    # The largest value of each 64; with double quantisation 8 bits of it, and one float per
    # 256 of those.
    double = stored.get("bnb_4bit_use_double_quant")
    form = Format(bits=4, scale_bytes=1 + 4 / 256 if double else 4, block=(1, 64))
    yield Rule(format=form, parts=_LAYER)


_STORED: Mapping[str, Callable[[Mapping[str, Any]], Iterable[Rule]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
    "experts_int8": lambda _: [Rule(format=_INT8_CHANNEL, parts=("expert",))],
    "bitsandbytes": _bitsandbytes,
}
"""Readers of a checkpoint's `quantization_config`, by its `quant_method`."""


def _cache_bits(stored: Mapping[str, Any]) -> int | None:
    """Bits of a cached value that a compressed-tensors checkpoint asks for."""
    scheme = stored.get("kv_cache_scheme")
    return int(scheme["num_bits"]) if isinstance(scheme, Mapping) else None


def _grouped(bits: int, group: int, *, zero_bits: int = 0, index_bytes: int = 0) -> Format:
    """Groups of `group` inputs with a 16-bit scale; -1 for one group per output."""
    return Format(
        bits=bits,
        scale_bytes=2,
        block=(1, max(group, 0)),
        zero_bits=zero_bits,
        index_bytes=index_bytes,
    )


def _kept(names: Iterable[str] | None) -> Rule:
    """Modules that are not quantised; a rule about nothing where none are named."""
    named = tuple(names or ())
    return Rule(format=None, parts=_LAYER if named else (), pattern=_any(map(_path, named)))


def _any(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


def _path(name: str) -> str:
    """Pattern of a module path or a part of one, whole components, `*` for anything.

    A language model inside another model has a prefix that ours has not.
    """
    bare = name.replace("language_model.", "").strip(".")
    return rf"(?:^|\.){re.escape(bare).replace(re.escape('*'), '.*')}(?:\.|$)"


def _target(name: str) -> str:
    """Pattern of a compressed-tensors target: `re:` and an expression, or a module path."""
    return f"^(?:{name[3:]})" if name.startswith("re:") else _path(name)


def _flat(names: Iterable[Any]) -> Iterable[str]:
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from _flat(name)


@lru_cache(maxsize=65536)
def _found(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None
