"""Where a model's parameters are: by kind of layer and by part, all of them and those in use.

MoE-Inference-Bench §2 draws this for three models (its Figure 1). It follows from the
structure alone, so it holds for every model whose configuration is known, and the parts
add up to the model's totals exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

import polars as pl

from workers.moe.structure import Architecture, Layer, Part, Weight

PARTS: dict[str, tuple[Part, ...]] = {
    "routed experts": ("expert",),
    "shared experts": ("shared",),
    "router": ("router",),
    "attention": ("attention",),
    "dense FFN": ("dense",),
    "norms": ("norm",),
    "embeddings": ("embedding", "head"),
    "encoder": ("encoder",),
}
"""Parts as they are shown, and the parts of the structure that each holds."""

_NAMES = {part: name for name, parts in PARTS.items() for part in parts}

OUTSIDE = "outside the layers"
"""Row of what belongs to no layer: embeddings, head, last norm, encoder."""


def breakdown(name: str, a: Architecture) -> pl.DataFrame:
    """Parameters of one layer of each kind, and of what stands outside the layers.

    Returns:
        One row per kind of layer and part that it has: `model`, `layers` (which, in
        words), `count` (how many such layers), `part`, `params_total` and `params_active`
        (of one such layer; active is what one token uses, input embedding included). The
        sums of `count` × these are the model's `params_total` and `params_active`.
    """
    kinds: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for index, layer in enumerate(a.layers):
        kinds.setdefault(tuple(_layer_parts(layer)), []).append(index)
    rows = [
        (name, words, len(indices), *parts)
        for (kind, indices), words in zip(kinds.items(), _words(a, [*kinds.values()]), strict=True)
        for parts in kind
    ]
    rows += [(name, OUTSIDE, 1, *parts) for parts in _outside_parts(a)]
    columns = ["model", "layers", "count", "part", "params_total", "params_active"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def _layer_parts(layer: Layer) -> Iterator[tuple[str, int, int]]:
    """(part, total, active) of one layer, in the order of `PARTS`."""
    total = _counted(layer.always())
    active = Counter(total)
    if layer.experts:
        expert = _counted(layer.expert())
        for part, params in expert.items():
            total[part] += layer.experts.num * params
            active[part] += layer.experts.top_k * params
    for part in PARTS:
        if total[part]:
            yield part, total[part], active[part]


def _outside_parts(a: Architecture) -> Iterator[tuple[str, int, int]]:
    used = _counted([*a.embedding, *a.final, *([] if a.tied else [a.head])])
    for part in PARTS:
        if used[part]:
            yield part, used[part], used[part]
    if a.params_encoder:
        yield "encoder", a.params_encoder, 0


def _counted(weights: Iterable[Weight]) -> Counter[str]:
    found: Counter[str] = Counter()
    for weight in weights:
        found[_NAMES[weight.part]] += weight.params
    return found


def _words(a: Architecture, groups: list[list[int]]) -> list[str]:
    """What each kind of layer is called: `26 MoE layers`, or with indices if need be."""
    names = ["MoE" if a.layers[indices[0]].experts else "dense" for indices in groups]
    words = []
    for kind, indices in zip(names, groups, strict=True):
        of_kind = f"{len(indices)} {kind} layer{'' if len(indices) == 1 else 's'}"
        words.append(of_kind if names.count(kind) == 1 else f"{of_kind} ({_ranges(indices)})")
    return words


def _ranges(indices: list[int]) -> str:
    """`0–2, 5`; of many ranges only the first three."""
    runs = [
        [index for _, index in run]
        for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    ]
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return ", ".join(words if len(words) <= 3 else [*words[:3], "…"])
