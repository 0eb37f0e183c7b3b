"""How many bytes a weight takes as it is stored.

A quantised checkpoint keeps its embeddings, router, norms and head in 16 bits, and how it stores
the rest may differ from module to module. Its configuration says so (`workers.moe.storage`), and
from that the bytes follow, weight by weight, with nothing assumed for the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from workers.contract.errors import Infeasible
from workers.contract.model import Model
from workers.moe.architecture import DTYPE_BYTES, run_dtype
from workers.moe.storage import formats
from workers.moe.storage.formats import Format, nvfp4
from workers.moe.storage.found import quantization
from workers.moe.storage.methods import METHODS, cache_type, reader
from workers.moe.storage.modules import Kind, Packed, Unreadable, module, packed, root
from workers.moe.structure import Architecture, Weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A quantisation of weights."""

    method: str
    """Its name in the configuration, or as it was asked for."""
    stored: str = ""
    """The checkpoint's own description, as JSON; empty where it is applied on loading."""
    packed: Packed = ()
    """Matrices that the engine fuses."""
    root: str = ""
    """What stands before `model.` in the engine's paths."""
    compute: str | None = None
    """Type that products of the routed experts are computed in (of the first quantised matrix
    where there are no experts); null for that of the activations."""

    def format(self, weight: Weight, layer: int | None) -> Format | None:
        """How `weight` is stored; null for the type of the activations.

        Vectors, routers, and gates with a single output are never quantised, nor is what stands
        outside the language model: published checkpoints leave vision towers alone. All routed
        experts of a layer are taken to be stored as its first one.

        Raises:
            Unreadable: it is stored in a way that is not known here.
        """
        m = module(weight, layer, self.packed, self.root)
        if m is None:
            return None
        if self.stored:
            return reader(self.stored, self.root)(m)
        form, kinds = _ONLINE[self.method]
        return form if m.kind in kinds else None


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
        """Peak that matrix products run at: `bf16`, `fp16`, `fp32`, `fp8`, `int8` or `fp4`.

        With a quantisation of weights and activations, that of the products of most weights.
        """
        of_scheme = self.scheme.compute if self.scheme else None
        return of_scheme or _COMPUTE[self.dtype]


def precision(a: Architecture, model: Model, *, kv_cache_dtype: str | None = None) -> Precision:
    """Types that `a` runs in: its checkpoint's quantisation, else the one asked for.

    `kv_cache_dtype` is the engine's setting; `auto` and null follow the checkpoint, else the type
    of the activations.

    Raises:
        ValueError: a type or a quantisation whose storage is not known here; it is named.
    """
    dtype = run_dtype(a, model)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPE_BYTES)}")
    own = quantization(a.config)
    stored = own or skeleton(model)
    cache = kv_cache_dtype or "auto"
    if cache == "auto":
        outside = isinstance(a.config.get("quantization_config"), Mapping)
        cache = cache_type(own, outside=outside) or dtype
    if cache not in _CACHE_BYTES:
        raise ValueError(f"unknown kv_cache_dtype {cache!r}: known are {', '.join(_CACHE_BYTES)}")
    return Precision(dtype=dtype, kv_dtype=cache, scheme=_scheme(a, stored, model.quantization))


def unreadable(a: Architecture, model: Model, kv_cache_dtype: str | None = None) -> str | None:
    """Why the bytes of this model cannot be counted, in one line; null where they can."""
    try:
        precision(a, model, kv_cache_dtype=kv_cache_dtype)
    except (ValueError, Infeasible) as error:
        return str(error)
    return None


_COMPUTE: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_CACHE_BYTES: Mapping[str, float] = {
    **{dtype: float(size) for dtype, size in DTYPE_BYTES.items()},
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "int8": 1.0,
    "nvfp4": 0.5 + 1 / 16,  # and an FP8 scale per 16 values
}
_LAYERS: tuple[Kind, ...] = ("linear", "experts")
_EXPERTS: tuple[Kind, ...] = ("experts",)

_ONLINE: Mapping[str, tuple[Format, tuple[Kind, ...]]] = {
    "fp8": (formats.FP8_TENSOR, _LAYERS),
    "fp8_per_tensor": (formats.FP8_TENSOR, _LAYERS),
    "fp8_per_channel": (formats.FP8_CHANNEL, _LAYERS),
    "ptpc_fp8": (formats.FP8_CHANNEL, _LAYERS),
    "fp8_per_block": (formats.FP8_BLOCK, _LAYERS),
    "mxfp8": (formats.MXFP8, _LAYERS),
    "mxfp4": (formats.MXFP4, _LAYERS),
    "int8": (formats.INT8_CHANNEL, _LAYERS),
    "experts_int8": (formats.INT8_WEIGHT_ONLY, _EXPERTS),
    "int8_per_channel_weight_only": (formats.INT8_WEIGHT_ONLY, _EXPERTS),
    "nvfp4_per_token": (nvfp4(), _EXPERTS),
}
"""Quantisations that an engine applies to 16-bit weights as it loads them, and to what."""


_WITHOUT_ROUTER = ["lm_head", "re:.*gate$"]
_SKELETONS: Mapping[str, Mapping[str, Any]] = {
    "awq": {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
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
with weights and activations in INT8.
"""


def skeleton(model: Model) -> Mapping[str, Any] | None:
    """The `quantization_config` of a skeleton for which a quantisation is asked that engines know
    of checkpoints alone; null for any other model.
    """
    return _SKELETONS.get(model.quantization or "") if model.weights == "dummy" else None


def _scheme(a: Architecture, stored: Mapping[str, Any] | None, asked: str | None) -> Scheme | None:
    """The checkpoint's own quantisation goes before the one asked for, as in the engine."""
    if stored is None and asked is None:
        return None
    if stored is None and asked == "bitsandbytes":
        stored = {"quant_method": asked, "load_in_4bit": True}
    if stored is None:
        return _on_loading(a, str(asked))
    try:
        text = json.dumps(stored)
    except (TypeError, ValueError) as error:
        raise Unreadable(f"the quantisation cannot be read: {error}") from error
    scheme = Scheme(method=str(stored["quant_method"]), stored=text, packed=packed(a), root=root(a))
    found = [scheme.format(weight, layer) for weight, layer in _matrices(a)]
    experts = sum(len(layer.expert()) for layer in a.layers)
    deciding = found[:experts] if experts else found
    return replace(scheme, compute=next((form.compute for form in deciding if form), None))


def _on_loading(a: Architecture, asked: str) -> Scheme:
    """What the engine makes of 16-bit weights."""
    if asked in METHODS and asked not in _ONLINE:
        raise Unreadable(f"quantisation {asked!r} needs a checkpoint that says how it is stored")
    if asked not in _ONLINE:
        raise Unreadable(f"unknown quantisation {asked!r}: known are {', '.join(_ONLINE)}")
    form, kinds = _ONLINE[asked]
    decides: Kind = "experts" if a.moe else "linear"
    return Scheme(
        method=asked,
        packed=packed(a),
        root=root(a),
        compute=form.compute if decides in kinds else None,
    )


def _matrices(a: Architecture) -> Iterator[tuple[Weight, int | None]]:
    """All matrices, routed experts first; what cannot be read shows before it is counted."""
    layers = list(enumerate(a.layers))
    for index, layer in layers:
        for weight in layer.expert():
            yield weight, index
    for index, layer in layers:
        for weight in layer.always():
            yield weight, index
    yield a.head, None
