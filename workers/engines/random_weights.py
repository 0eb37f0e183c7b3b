"""Random values for weights that are stored quantised, as a checkpoint's would look.

vLLM's dummy loader fills every floating-point tensor with numbers between -0.001 and 0.001 and
leaves integer tensors as the allocator hands them over (`initialize_single_dummy_weight` in
`model_executor/model_loader/weight_utils.py`, vLLM 0.32). In FP8 (E4M3) 98 of 100 such numbers
round to zero, and fresh pages are zero, too. Multiplying zeros switches fewer transistors, so a
GPU draws less power and keeps a higher clock: a skeleton would be timed faster than a checkpoint
of the same shape. Memory that was used before is worse: it may hold codes of NaN.

Here codes are drawn as rounding a normal distribution would give them, scales are positive, and
their product is about as large as the weights of an unquantised skeleton. Only torch is needed.

A byte is drawn by looking up a uniform random number in a table of quantiles. Work is done in
pieces, so that a skeleton that fits a device also fits while it is filled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch

Role = Literal["codes", "zero", "scale", "factor", "divisor"]
"""What a tensor of a quantised layer is: codes of weights, the code that stands for zero, a
factor of a channel, group or block, one factor of a whole matrix on top of those, or a number
that such a factor is one over."""
LARGEST = 1e-3
"""Largest magnitude of a weight; vLLM's dummy loader has the same for unquantised ones."""
SIGMAS = 3.0
"""Standard deviations of the weights that the largest code stands for."""
PIECE = 2**22
"""Bytes that are drawn at a time; each takes five more meanwhile."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three lower bits of an FP4 code stand for; the fourth is the sign."""
_STORAGE = (torch.int32, torch.int8, torch.uint8, *FP8)
_LEVELS = 256
"""Quantiles that stand for the normal distribution."""
_E8M0_BIAS = 127
_NAMES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("divisor", re.compile(r"(?:^|_)(?:weight|input)_global_scale$")),
    ("factor", re.compile(r"(?:^|_)(?:weight_scale_2|input_scale|input_scale_2)$")),
    ("scale", re.compile(r"(?:^|_)(?:scales|weight_scale|weight_scale_inv)$")),
    ("zero", re.compile(r"(?:^|_)(?:qzeros|weight_zero_point|input_zero_point)$")),
    ("codes", re.compile(r"(?:^|_)(?:weight|qweight|weight_packed)$")),
)
"""How vLLM calls such tensors (`model_executor/layers/quantization/`), after `w13_` or `w2_`."""


def roles(tensors: Mapping[str, torch.Tensor]) -> dict[str, Role]:
    """What the tensors of one layer are; empty for a layer that is not stored quantised.

    Whatever has a name of its own (an order of inputs, a table of experts, a shape) is left out:
    numbers drawn for it could point outside of memory.
    """
    named = {name: role for name in tensors if (role := _role(name)) is not None}
    codes = [name for name, role in named.items() if role == "codes"]
    if not any(tensors[name].dtype in _STORAGE for name in codes):
        return {}
    return {
        name: role
        for name, role in named.items()
        if role not in ("codes", "zero") or tensors[name].dtype in _STORAGE
    }


def fill(tensors: Mapping[str, torch.Tensor], *, bits: int | None, seed: int) -> set[str]:
    """Draws all tensors of one layer that `roles` knows.

    Args:
        tensors: of the layer, by name; filled in place, on their device.
        bits: of a code, which may be fewer than those of an element; null where that is not known.
        seed: of the draw; equal seeds give equal layers on one kind of device.

    Returns:
        Names of what was filled.
    """
    found = roles(tensors)
    if not found:
        return set()
    first = next(name for name, role in found.items() if role == "codes")
    codes = _codes(tensors[first].dtype, bits, "qweight" in first)
    # NVFP4: a factor in FP8 for each block, which needs one of the whole matrix to be as small.
    double = any(role in ("factor", "divisor") and "weight" in name for name, role in found.items())
    block = torch.finfo(torch.float8_e4m3fn).max if double else 1.0
    factor = LARGEST / (codes.largest * block)
    for index, (name, role) in enumerate(found.items()):
        tensor = tensors[name].data
        generator = torch.Generator(device=tensor.device).manual_seed(seed + index)
        if role == "codes":
            _draw(tensor, codes.table.to(tensor.device), generator)
        elif role == "zero":
            _bytes(tensor).fill_(codes.zero if tensor.dtype != torch.int8 else 0)
        elif role == "scale":
            _scale(tensor, LARGEST / codes.largest, generator)
        else:
            tensor.fill_(1 / factor if role == "divisor" else factor)
    return set(found)


def _role(name: str) -> Role | None:
    return next((role for role, pattern in _NAMES if pattern.search(name)), None)


class _Codes(NamedTuple):
    """How the codes of weights lie in bytes."""

    table: torch.Tensor
    """256 or 65,536 bytes, each as likely as the others."""
    largest: float
    """What the largest code stands for before it is scaled."""
    zero: int
    """A byte of codes that stand for zero."""


@lru_cache
def _codes(storage: torch.dtype, bits: int | None, integers: bool) -> _Codes:
    """How weights of a type are stored.

    Args:
        storage: type of the tensor.
        bits: of a code; null for those that are usual.
        integers: whether bytes hold integers; else FP4 (E2M1).
    """
    normal = NormalDist(sigma=1 / SIGMAS)
    shares = [normal.inv_cdf((index + 0.5) / _LEVELS) for index in range(_LEVELS)]
    levels = torch.tensor(shares, dtype=torch.float32).clamp(-1, 1)
    if storage in FP8:
        largest = torch.finfo(storage).max
        return _Codes((levels * largest).to(storage).view(torch.uint8), largest, 0)
    if storage == torch.int8:
        largest = float(2 ** ((bits or 8) - 1) - 1)
        return _Codes((levels * largest).round().to(torch.int8).view(torch.uint8), largest, 0)
    if storage == torch.uint8 and not integers and bits in (4, None):
        steps = levels.abs()[:, None] * E2M1[-1] - torch.tensor(E2M1)
        halves = steps.abs().argmin(1) + 8 * (levels < 0)
        return _Codes(_pairs(halves), E2M1[-1], 0)
    if bits == 8:
        return _Codes((levels * 127).round().add(128).to(torch.uint8), 127.0, 0x80)
    if bits in (4, None):
        return _Codes(_pairs((levels * 7).round().long() + 8), 7.0, 0x88)
    # Codes that lie across bytes: any bits are as good.
    return _Codes(torch.arange(256, dtype=torch.uint8), float(2 ** (bits - 1)), 0)


def _pairs(halves: torch.Tensor) -> torch.Tensor:
    """Every pair of two codes of four bits, as a byte."""
    return (halves[:, None] * 16 + halves).flatten().to(torch.uint8)


def _draw(tensor: torch.Tensor, table: torch.Tensor, generator: torch.Generator) -> None:
    """Fills `tensor` with bytes of `table`."""
    out = tensor if tensor.is_contiguous() else torch.empty_like(tensor).contiguous()
    for piece in _bytes(out).split(PIECE):
        drawn = torch.randint(
            len(table), piece.shape, generator=generator, device=tensor.device, dtype=torch.int32
        )
        piece.copy_(table.index_select(0, drawn))
    if out is not tensor:
        tensor.copy_(out)


def _scale(tensor: torch.Tensor, step: float, generator: torch.Generator) -> None:
    """Fills `tensor` with factors around `step`."""
    if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):  # powers of two
        exponent = _E8M0_BIAS + math.floor(math.log2(step))
        _bytes(tensor).random_(exponent, exponent + 2, generator=generator)
    elif tensor.dtype in FP8:
        largest = torch.finfo(tensor.dtype).max
        levels = torch.linspace(largest / 2, largest, _LEVELS).to(tensor.dtype)
        _draw(tensor, levels.view(torch.uint8).to(tensor.device), generator)
    else:
        tensor.uniform_(0.75 * step, 1.25 * step, generator=generator)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8)
