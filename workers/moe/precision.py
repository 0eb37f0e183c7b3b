"""How many bytes a weight takes as it is stored.

Bytes per parameter is not one number. A quantised checkpoint keeps its embeddings, router,
norms and head in 16 bits, and beside each group of quantised values stand a scale, perhaps
a zero point, perhaps the order of the inputs. A checkpoint's configuration says which, so
the bytes follow from it, weight by weight, with nothing assumed for the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

    bits: float
    """Per value."""
    scale_bytes: int = 0
    """Per block."""
    block: tuple[int, int] = (0, 0)
    """Outputs × inputs that share a scale; 0 stands for all of them."""
    zero_bits: int = 0
    """Zero point, per block."""
    index_bytes: int = 0
    """Order of the inputs (`g_idx` of GPTQ), per input."""
    compute: str | None = None
    """Type that the product runs in; null for the type of the activations."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of (outputs, inputs), all that belongs to it included."""
        outputs, inputs = shape
        rows, columns = self.block
        blocks = ceil(outputs / (rows or outputs)) * ceil(inputs / (columns or inputs))
        values = ceil(outputs * inputs * self.bits / 8)
        return (
            values
            + blocks * self.scale_bytes
            + ceil(blocks * self.zero_bits / 8)
            + inputs * self.index_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What is done with the weights that it is about."""

    format: Format | None
    """Null: they stay in the model's own type."""
    pattern: str = ""
    """Regular expression found somewhere in a module's path."""
    parts: tuple[Part, ...] = ()
    """Only these parts; empty for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A quantisation: the first rule that is about a weight decides."""

    method: str
    """Its name in the configuration or on the command line."""
    rules: tuple[Rule, ...]

    def format(self, weight: Weight, layer: int | None) -> Format | None:
        """How `weight` is stored; null for the model's own type.

        Vectors and gates with a single output are never quantised.
        """
        if len(weight.shape) != 2 or weight.shape[0] == 1:
            return None
        name = weight.name if layer is None else f"model.layers.{layer}.{weight.name}"
        name = name.replace("*", "0")
        for rule in self.rules:
            if (not rule.parts or weight.part in rule.parts) and _found(rule.pattern, name):
                return rule.format
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Types of weights and cache of a model as it runs."""

    dtype: str
    """Of activations and of all that is not quantised."""
    kv_dtype: str
    """Of the KV cache."""
    scheme: Scheme | None = None
    """Quantisation of weights."""

    def bytes(self, weight: Weight, layer: int | None = None) -> int:
        """Bytes of one copy of `weight` as stored: scales, zero points and bias included."""
        size = DTYPE_BYTES[self.dtype]
        format = self.scheme.format(weight, layer) if self.scheme else None
        if format is None:
            return weight.params * size
        return format.bytes(weight.shape) + (weight.params - weight.values) * size

    @property
    def kv_bytes(self) -> float:
        """Bytes of one cached value."""
        return float(_KV_BYTES.get(self.kv_dtype) or DTYPE_BYTES[self.kv_dtype])

    @property
    def compute(self) -> str:
        """Peak that its matrix products run at: `bf16`, `fp32`, `fp8` or `int8`."""
        formats = [rule.format for rule in self.scheme.rules] if self.scheme else []
        quantised = next((one.compute for one in formats if one and one.compute), None)
        return quantised or ("fp32" if self.dtype == "float32" else "bf16")


def precision(a: Architecture, model: Model, *, kv_cache_dtype: str | None = None) -> Precision:
    """Types that `a` runs in: its checkpoint's quantisation, or the one that `model` asks for.

    Raises:
        ValueError: a quantisation method whose storage is not known here; it is named.
    """
    dtype = run_dtype(a, model)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: one of {', '.join(DTYPE_BYTES)}")
    kv = kv_cache_dtype or "auto"
    if kv == "auto":
        kv = dtype
    elif kv not in _KV_BYTES and kv not in DTYPE_BYTES:
        raise ValueError(f"unknown kv_cache_dtype {kv!r}")
    return Precision(dtype=dtype, kv_dtype=kv, scheme=_scheme(a.config, model))


_KV_BYTES: Mapping[str, int] = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
_LINEAR: tuple[Part, ...] = ("attention", "expert", "shared", "dense")


def _scheme(config: Mapping[str, Any], model: Model) -> Scheme | None:
    stored = config.get("quantization_config")
    if stored is None and model.quantization is None:
        return None
    raise ValueError(f"unknown quantisation {model.quantization or stored!r}")


@lru_cache(maxsize=100_000)
def _found(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None
