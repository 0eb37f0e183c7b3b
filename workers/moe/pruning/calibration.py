"""Text through the model, with one layer of it in memory at a time.

What an expert is worth depends on what is read, so two criteria need the states that reach it.
The model is built without memory behind it, by transformers, so that every family's attention
and routing are what they are; each layer gets its weights when the text arrives there and
gives them back when it has passed, and so does the heap, which else keeps most of what the
sums over a layer took. All of the text goes through a layer before the next.

The states of a layer are those of the unpruned model: layers are judged apart.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workers import memory
from workers.contract.workload import Workload
from workers.moe.pruning.errors import PruneError
from workers.moe.pruning.places import Place
from workers.moe.pruning.selection import Indices, Kept, Scores, best
from workers.moe.pruning.shards import Stored
from workers.texts import text_ids

if TYPE_CHECKING:
    from workers.moe.pruning.checkpoint import Checkpoint, Cut

MOST_SETS = 100
"""Sets of experts that are all tried (8 experts: 70 of 4); of more, the worst expert goes
first, then the worst of what is left."""
OUTPUT_BYTES = 2**29
"""Held for what every expert makes of every token; more tokens than that are not looked at."""

Visit = Callable[[int, Place, Any, Any], None]
"""Takes number and place of a layer, its MoE block and the states before it (tokens × hidden)."""


def choose(given: Checkpoint, cut: Cut, keep: int, groups: int) -> Kept:
    """What stays by a criterion that looks at text.

    Raises:
        PruneError: the text cannot be had, or the criterion does not go with groups.
    """
    experts: dict[int, Indices] = {}
    channels: dict[int, tuple[Indices, ...]] = {}
    whole, frequency = cut.prune.kind == "inter", cut.prune.criterion == "frequency"
    if whole and not frequency and groups > 1:
        raise PruneError(
            f"criterion reconstruction leaves out one expert after the other, which the "
            f"{groups} groups of this router do not allow: take frequency, norm or random"
        )

    def visit(layer: int, place: Place, block: Any, states: Any) -> None:
        if frequency:
            experts[layer] = best(_counts(block, states, place.experts.num), keep, groups=groups)
        elif whole:
            experts[layer] = _best_set(block, states, place.experts.num, keep)
        else:
            channels[layer] = tuple(best(row, keep) for row in _contributions(block, states))

    run(given, tokens(given.folder, cut), visit)
    return Kept(experts=experts) if whole else Kept(channels=channels)


def tokens(folder: Path, cut: Cut) -> list[list[int]]:
    """Stretches of the calibration text, by the checkpoint's own tokenizer.

    Raises:
        PruneError: there is no tokenizer, or too little text.
    """
    from transformers import AutoTokenizer

    workload = Workload(
        batch_size=cut.samples, input_tokens=cut.tokens, dataset=cut.text, seed=cut.seed
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PruneError(
            f"criterion {cut.prune.criterion} needs the tokenizer of {folder}: {reason[:200]}"
        ) from None
    try:
        return text_ids(workload, tokenizer, index=0)
    except ValueError as error:
        raise PruneError(str(error)) from None


def run(given: Checkpoint, ids: list[list[int]], visit: Visit) -> None:
    """Sends `ids` (texts × tokens) through the model and shows each MoE layer to `visit`."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    config = CONFIG_MAPPING[given.structure.family].from_dict(dict(given.config))
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    model.rotary_emb = type(model.rotary_emb)(config)
    model.norm = torch.nn.Identity()
    published = dict(given.places.others)
    for place in given.places.layers.values():
        published |= dict(place.shared) | dict(place.router)
    for number, layer in enumerate(model.layers):
        _lend(layer, number, given, published, visit)
    with torch.no_grad():
        states = _embedded(published[f"{given.structure.embedding[0].name}.weight"], ids)
        model(inputs_embeds=states, use_cache=False)


def _lend(
    layer: Any, number: int, given: Checkpoint, published: dict[str, Stored], visit: Visit
) -> None:
    """Makes `layer` take its weights when it is called, go through the texts one by one, show
    its experts to `visit` with the states that reached them, and give the weights back."""
    import torch

    place = given.places.layers.get(number)
    seen: list[Any] = []
    forward = layer.forward

    def one_by_one(states: Any, *rest: Any, **more: Any) -> Any:
        layer.load_state_dict(
            {
                name: _weight(f"model.layers.{number}.{name}", place, published)
                for name in layer.state_dict()
            },
            assign=True,
        )
        answer = torch.cat([forward(text, *rest, **more) for text in states.split(1)])
        if place is not None:
            visit(number, place, layer.mlp, torch.cat(seen))
            seen.clear()
        layer.to("meta")
        memory.trim()
        return answer

    def look(_: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].flatten(0, -2))

    layer.forward = one_by_one
    if place is not None:
        layer.mlp.register_forward_pre_hook(look)


def _weight(name: str, place: Place | None, published: dict[str, Stored]) -> Any:
    """A parameter of transformers by its name there, in float32."""

    if place is not None and name.endswith(".experts.gate_up_proj"):
        return _stacked([[one for _, one in expert[:2]] for expert in place.expert])
    if place is not None and name.endswith(".experts.down_proj"):
        return _stacked([[expert[2][1]] for expert in place.expert])
    other = name.replace(".mlp.", ".block_sparse_moe.")
    return _tensor(published.get(name) or published[other])


def _stacked(rows: list[list[Stored]]) -> Any:
    """Matrices of each expert below each other, experts behind each other; read into place,
    so that no more than one matrix is held twice.

    The pages are its own: what malloc gave for a layer it kept when the layer was gone, below
    something small that stayed, and the next layer took as much again."""
    import torch

    height = sum(one.shape[0] for one in rows[0])
    shape = (len(rows), height, rows[0][0].shape[1])
    room = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE)
    whole = torch.frombuffer(room, dtype=torch.float32).view(shape)
    for expert, row in zip(whole, rows, strict=True):
        start = 0
        for one in row:
            expert[start : start + one.shape[0]] = _tensor(one)
            start += one.shape[0]
    return whole


def _tensor(one: Stored) -> Any:
    import torch

    return torch.from_numpy(one.values())


def _embedded(embedding: Stored, ids: list[list[int]]) -> Any:
    """Rows of the embedding: of a large vocabulary only those that occur are read."""
    import torch

    known, places = np.unique(np.array(ids), return_inverse=True)
    rows = torch.stack([_tensor(embedding.item(int(one))) for one in known])
    return rows[torch.from_numpy(places.reshape(np.shape(ids)))]


def _counts(block: Any, states: Any, num: int) -> Scores:
    """Tokens that chose each expert."""
    chosen = block.gate(states)[2]
    return np.bincount(chosen.flatten().numpy(), minlength=num).astype(np.float64)


def _best_set(block: Any, states: Any, num: int, keep: int) -> Indices:
    """The experts whose output, chosen among themselves, is nearest to that of all."""
    import torch

    states = states[: max(1, OUTPUT_BYTES // (4 * num * states.shape[1]))]
    every = torch.stack([_down(block, i, _inner(block, i, states)) for i in range(num)])
    row = torch.arange(len(states))[:, None]

    def output(kept: tuple[int, ...]) -> Any:
        _, weights, chosen = _among(block.gate, kept)(states)
        return (every[torch.tensor(kept)[chosen], row] * weights[..., None].float()).sum(1)

    whole = output(tuple(range(num)))

    def error(kept: tuple[int, ...]) -> float:
        return float((output(kept) - whole).square().sum(dtype=torch.float64))

    if comb(num, keep) <= MOST_SETS:
        return np.array(min(combinations(range(num), keep), key=error), np.int64)
    kept = tuple(range(num))
    while len(kept) > keep:
        kept = min((tuple(i for i in kept if i != gone) for gone in kept), key=error)
    return np.array(kept, np.int64)


def _among(router: Any, kept: tuple[int, ...]) -> Any:
    """The router of a model that has these experts alone."""
    import torch

    small = copy.copy(router)
    rows = torch.tensor(kept)
    small._parameters = {
        name: torch.nn.Parameter(one[rows], requires_grad=False)
        for name, one in router._parameters.items()
    }
    small._buffers = {name: one[rows] for name, one in router._buffers.items()}
    small.num_experts = len(kept)
    return small


def _contributions(block: Any, states: Any) -> Iterator[Scores]:
    """Of each expert, per channel: squared norm of what it adds to the output, over tokens."""
    _, weights, chosen = block.gate(states)
    for expert in range(block.experts.num_experts):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        inner = _inner(block, expert, states[token]) * weights[token, place, None].float()
        column = block.experts.down_proj[expert].square().sum(0)
        yield (inner.double().square().sum(0) * column.double()).numpy()


def _inner(block: Any, expert: int, states: Any) -> Any:
    """What one expert's channels hold: tokens × width."""
    from torch.nn.functional import linear

    gate, up = linear(states, block.experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return block.experts.act_fn(gate) * up


def _down(block: Any, expert: int, inner: Any) -> Any:
    from torch.nn.functional import linear

    return linear(inner, block.experts.down_proj[expert])
