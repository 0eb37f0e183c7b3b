"""Where the experts of a checkpoint are: names by family, published or stacked.

Published checkpoints hold a matrix per expert (`mlp.experts.3.up_proj.weight`); since version 5
transformers can also save what it computes with, one tensor for all experts of a layer
(`mlp.experts.gate_up_proj`, experts × 2·width × hidden). Either is read, as stretches of
files; written is the published form, which transformers and vLLM both load.

Names and shapes are those of the project's own structure of the family, so that a checkpoint
and the accounting cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from workers.moe.pruning.errors import PruneError
from workers.moe.pruning.shards import Stored
from workers.moe.structure import Architecture, Experts, Weight

FAMILIES = ("deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Families that are known to be held in the same way by transformers and vLLM."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MIXTRAL, _STACKED = "block_sparse_moe.", "mlp."
"""Mixtral's FFN in published checkpoints, and as transformers 5 names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The experts of one layer."""

    prefix: str
    """`model.layers.N.`"""
    experts: Experts
    router: tuple[tuple[str, Stored], ...]
    """Tensors with a row per expert, under their published names."""
    expert: tuple[tuple[tuple[str, Stored], ...], ...]
    """Of each expert gate, up and down projection, under their published names for a number
    that is still `*`."""
    shared: tuple[tuple[str, Stored], ...]
    """Matrices of the shared experts, without their gate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """All tensors of a checkpoint, sorted by what pruning does with them."""

    layers: Mapping[int, Place]
    """By the number of the layer; dense layers are not in it."""
    others: tuple[tuple[str, Stored], ...]
    """What goes along as it is, under its published name."""
    dropped: tuple[str, ...]
    """Layers beyond the model (multi-token prediction), which have experts of their own."""


def locate(a: Architecture, stored: Mapping[str, Stored]) -> Places:
    """Finds every tensor of `a`.

    Raises:
        PruneError: the family is not known, a tensor is missing, or has another shape.
    """
    if a.family not in FAMILIES or not a.exact:
        known = ", ".join(FAMILIES)
        raise PruneError(f"model_type {a.family!r} cannot be pruned; known are {known}")
    left = dict(stored)
    outside = [*a.embedding, *a.final, *(() if a.tied else (a.head,))]
    others = [one for weight in outside for one in _take(left, "", weight)]
    layers: dict[int, Place] = {}
    for number, layer in enumerate(a.layers):
        prefix = f"model.layers.{number}."
        shared: list[tuple[str, Stored]] = []
        for weight in layer.always():
            if weight.part != "router":
                wide = weight.part == "shared" and weight.cut != "none"
                (shared if wide else others).extend(_take(left, prefix, weight))
        if layer.experts is not None:
            layers[number] = Place(
                prefix=prefix,
                experts=layer.experts,
                router=tuple(
                    one for weight in layer.experts.router for one in _take(left, prefix, weight)
                ),
                expert=_experts(left, prefix, layer.experts),
                shared=tuple(shared),
            )
    beyond = {name for name in left if _number(name) >= a.num_layers}
    others += [(name, one) for name, one in left.items() if name not in beyond]
    return Places(layers=layers, others=tuple(others), dropped=tuple(sorted(beyond)))


def _number(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def tensors(weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names below the prefix of the tensors of `weight`, with shapes."""
    if weight.name.endswith("e_score_correction_bias"):
        yield weight.name, weight.shape
        return
    yield f"{weight.name}.weight", weight.shape
    if weight.bias:
        yield f"{weight.name}.bias", weight.shape[:1]


def _take(left: dict[str, Stored], prefix: str, weight: Weight) -> list[tuple[str, Stored]]:
    """The tensors of `weight`, taken out of `left`."""
    found = []
    for name, shape in tensors(weight):
        whole = prefix + name
        other = whole.replace(_MIXTRAL, _STACKED)
        one = left.pop(whole, None) or left.pop(other, None)
        if one is None:
            raise PruneError(f"the checkpoint lacks the weight {whole}")
        _fits(one, shape)
        found.append((whole, one))
    return found


def _experts(
    left: dict[str, Stored], prefix: str, experts: Experts
) -> tuple[tuple[tuple[str, Stored], ...], ...]:
    """Gate, up and down projection of every expert, taken out of `left`."""
    gate, up, down = experts.expert
    names = [f"{prefix}{weight.name}.weight" for weight in (gate, up, down)]
    path = f"{prefix}{gate.name.partition('.*.')[0]}"
    for stacked in (path, path.replace(_MIXTRAL, _STACKED)):
        if f"{stacked}.gate_up_proj" not in left:
            continue
        both = left.pop(f"{stacked}.gate_up_proj")
        back = left.pop(f"{stacked}.down_proj", None)
        if back is None:
            raise PruneError(f"the checkpoint lacks the weight {stacked}.down_proj")
        _fits(both, (experts.num, 2 * gate.shape[0], gate.shape[1]))
        _fits(back, (experts.num, *down.shape))
        width = experts.width
        return tuple(
            (
                (names[0], both.item(i).part(0, width)),
                (names[1], both.item(i).part(width, 2 * width)),
                (names[2], back.item(i)),
            )
            for i in range(experts.num)
        )
    found = []
    for i in range(experts.num):
        of_one = []
        for name, weight in zip(names, (gate, up, down), strict=True):
            numbered = name.replace("*", str(i))
            one = left.pop(numbered, None)
            if one is None:
                raise PruneError(f"the checkpoint lacks the weight {numbered}")
            _fits(one, weight.shape)
            of_one.append((name, one))
        found.append(tuple(of_one))
    return tuple(found)


def _fits(one: Stored, shape: tuple[int, ...]) -> None:
    if one.shape != shape:
        raise PruneError(
            f"{one.name} is {list(one.shape)} where the configuration says {list(shape)}"
        )
