"""Which experts, or which of their channels, stay.

Every criterion gives each candidate a score, and the highest stay; ties go to the lower
number. `reconstruction` of whole experts is the one exception: what a set of experts is worth
is no sum over them, so it chooses sets (`workers.moe.pruning.calibration`).

    random           a number drawn for it (seed, layer, expert): what a criterion must beat
    frequency        inter: tokens that the router sent to it
    norm             inter: Frobenius norm of its three matrices together
                     intra: of the channel's two rows and its column
    reconstruction   inter: error of the layer's output without the others (Lu et al., 2024)
                     intra: squared norm of what the channel adds to the layer's output

With groups of experts (DeepSeek) each group keeps equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from workers.contract.record import ACTIVATIONS
from workers.moe.pruning.errors import PruneError
from workers.moe.pruning.places import Place, Places

Scores = NDArray[np.float64]
Indices = NDArray[np.int64]
Experts = Mapping[int, Indices]
"""By layer: numbers of the experts that stay, ascending."""
Channels = Mapping[int, tuple[Indices, ...]]
"""By layer, of every expert: the channels that stay, ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What stays; one of the two, by kind."""

    experts: Experts | None = None
    channels: Channels | None = None


def best(scores: Scores, keep: int, *, groups: int = 1) -> Indices:
    """The `keep` highest of `scores`, ascending, equally many of each of `groups` parts."""
    size, each = len(scores) // groups, keep // groups
    found = [
        start + np.argsort(-scores[start : start + size], kind="stable")[:each]
        for start in range(0, len(scores), size)
    ]
    return np.sort(np.concatenate(found)).astype(np.int64)


def by_layer(places: Places, score: Callable[[int, Place], Scores], keep: int, groups: int) -> Kept:
    """Experts of each layer by the scores that `score` gives them."""
    chosen = {
        layer: best(score(layer, place), keep, groups=groups)
        for layer, place in places.layers.items()
    }
    return Kept(experts=chosen)


def by_expert(places: Places, score: Callable[[int, int, Place], Scores], keep: int) -> Kept:
    """Channels of each expert by the scores that `score` gives them."""
    return Kept(
        channels={
            layer: tuple(
                best(score(layer, expert, place), keep) for expert in range(place.experts.num)
            )
            for layer, place in places.layers.items()
        }
    )


def random_scores(size: int, *numbers: int) -> Scores:
    """One number for each of `size`, drawn for `numbers` and nothing else."""
    return np.random.default_rng(numbers).random(size)


def norms_of_experts(place: Place) -> Scores:
    """Squared Frobenius norm of each expert's matrices."""
    return np.array(
        [sum(float(np.sum(_squares(one.values(), 1))) for _, one in row) for row in place.expert]
    )


def norms_of_channels(place: Place, expert: int) -> Scores:
    """Squared norm of the rows and the column of each channel of one expert."""
    (_, gate), (_, up), (_, down) = place.expert[expert]
    return _squares(gate.values(), 1) + _squares(up.values(), 1) + _squares(down.values(), 0)


def _squares(matrix: NDArray[np.float32], axis: int) -> Scores:
    """Sums of squares along `axis`, in double precision a block of rows at a time."""
    blocks = [np.square(block, dtype=np.float64).sum(axis=axis) for block in _blocks(matrix, 2**20)]
    total: Scores = np.concatenate(blocks) if axis == 1 else np.sum(blocks, axis=0)
    return total


def _blocks(matrix: NDArray[np.float32], values: int) -> Iterator[NDArray[np.float32]]:
    step = max(1, values // matrix.shape[1])
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step]


def counted(source: Path, trial: str | None, places: Places) -> Mapping[int, Scores]:
    """Tokens that each expert of each layer got, from what a probe counted.

    Args:
        source: a dataset of a sweep with `measure.activation`, or one file of its
            `activations`.
        trial: first digits of the trial to take; null where there is only one.

    Raises:
        PruneError: it cannot be read, has no such trial or several, or is of another structure.
    """
    rows = _rows(source)
    trials = sorted({row["trial_id"] for row in rows})
    taken = [one for one in trials if one.startswith(trial or "")]
    if len(taken) != 1:
        raise PruneError(
            f"{source} has {len(taken)} trials{f' {trial}…' if trial else ''}, not one: "
            f"{', '.join(taken or trials)}; choose with --trial"
        )
    counts = {
        layer: np.zeros(place.experts.num, np.float64) for layer, place in places.layers.items()
    }
    seen: set[int] = set()
    for row in rows:
        if row["trial_id"] != taken[0]:
            continue
        layer, expert = row["layer"], row["expert"]
        if layer not in counts or not 0 <= expert < len(counts[layer]):
            raise PruneError(
                f"{source} counts expert {expert} of layer {layer}, which is not in this model"
            )
        counts[layer][expert] += row["tokens"]
        seen.add(layer)
    if unseen := sorted(counts.keys() - seen):
        raise PruneError(f"{source} has no counts of layer {unseen[0]}")
    return counts


def _rows(source: Path) -> list[dict[str, Any]]:
    files: Sequence[Path] = [source]
    if source.is_dir():
        files = sorted((source / "activations").glob("*.arrow"))
        if not files:
            raise PruneError(f"{source} has no activations: no trial of it was probed")
    columns = ["trial_id", "layer", "expert", "tokens"]
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            with pa.memory_map(str(file)) as held:
                table = pa.ipc.open_file(held).read_all().select(columns)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise PruneError(f"{file} cannot be read as counts of experts: {error}") from None
        if any(table.schema.field(name).type != ACTIVATIONS.field(name).type for name in columns):
            raise PruneError(f"{file} has columns of other types than counts of experts")
        rows += table.drop_null().to_pylist()
    return rows
