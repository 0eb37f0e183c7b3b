"""From a checkpoint to the pruned one, file by file.

What is kept is decided first, from headers, weights or calibration text; then tensors go
from files to files one at a time. Nothing but one tensor (and for calibration one layer) is in
memory, so a checkpoint larger than the machine's memory is pruned all the same.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from workers.contract.model import Model, Prune
from workers.moe.architecture import bend, configuration
from workers.moe.families import read
from workers.moe.fields import UnknownModel
from workers.moe.pruning import selection, shards
from workers.moe.pruning.errors import PruneError
from workers.moe.pruning.places import Place, Places, locate, tensors
from workers.moe.pruning.selection import Indices, Kept
from workers.moe.pruning.shape import groups, remaining
from workers.moe.pruning.shards import Written
from workers.moe.storage.found import carried
from workers.moe.structure import Architecture, Experts

PROVENANCE = "pruning.json"
"""What a checkpoint was cut from, and how: its name in the folder."""
_MTP = "num_nextn_predict_layers"
_NOT_BESIDE = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth",
    "*.gguf", "config.json", PROVENANCE,
)  # fmt: skip
"""Files of a folder that are its weights or are written anew; the rest goes along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What is to be removed, and how it is chosen."""

    prune: Prune
    seed: int = 0
    """Of criterion random, and of the stretches of calibration text."""
    sheet: Path | None = None
    """Counts of criterion frequency: a dataset with activations, or one such file. Null counts
    on the calibration text."""
    trial: str | None = None
    """Which trial of it, by its first digits."""
    text: str = "builtin"
    """Calibration text, as `workload.dataset` names one (`workers.texts`)."""
    samples: int = 16
    """Stretches of it."""
    tokens: int = 128
    """Tokens of each."""

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("samples", 1), ("tokens", 1)):
            if getattr(self, name) < least:
                raise PruneError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.sheet is not None and self.prune.criterion != "frequency":
            raise PruneError(f"criterion {self.prune.criterion} reads no sheet of activations")

    @property
    def calibrated(self) -> bool:
        """Whether text has to go through the model."""
        return self.prune.criterion == "reconstruction" or (
            self.prune.criterion == "frequency" and self.sheet is None
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint with experts, open for reading."""

    folder: Path
    config: Mapping[str, Any]
    structure: Architecture
    files: tuple[Path, ...]
    places: Places = field(repr=False)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads configuration and headers; no weight is read.

    Raises:
        PruneError: it is no checkpoint of a known family, is quantised, torn or not whole.
    """
    if not folder.is_dir():
        raise PruneError(f"{folder} is no folder with a checkpoint")
    try:
        config = configuration(str(folder.absolute())) or {}
        structure = read(config)
    except UnknownModel as error:
        raise PruneError(f"config.json of {folder}: {error}") from None
    if structure.moe is None:
        raise PruneError(f"{folder} has no experts (model_type {structure.family!r})")
    if carried(config):
        raise PruneError(f"{folder} is quantised; pruning needs plain weights")
    files = shards.files_of(folder)
    try:
        places = locate(structure, shards.tensors_of(files))
    except PruneError as error:
        raise PruneError(f"{folder}: {error}") from None
    return Checkpoint(folder=folder, config=config, structure=structure, files=files, places=places)


def prune(source: Path, target: Path, cut: Cut) -> Architecture:
    """Writes what `cut` leaves of the checkpoint `source` into the new folder `target`.

    The folder appears when it is complete: it is written beside its place and renamed.

    Returns:
        The structure of what was written.

    Raises:
        PruneError: `target` exists, or `source` is nothing that can be pruned.
        Infeasible: the arithmetic of the ratio does not come out.
        OSError: the folder cannot be written.
    """
    if os.path.lexists(target):
        raise PruneError(f"{target} exists already; name a folder that does not")
    given = open_checkpoint(source)
    config = bend(given.config, Model(name=str(source), prune=cut.prune))
    if given.places.dropped and config.get(_MTP):
        config[_MTP] = 0
    structure = read(config)
    kept = choose(given, cut)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        largest = max(file.stat().st_size for file in given.files)
        shards.write(list(_tensors(given, structure, kept)), partial, limit=largest)
        shards.write_json(partial / "config.json", config)
        _copy_beside(source, partial)
        shards.write_json(partial / PROVENANCE, _provenance(given, structure, cut, kept))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return structure


def choose(given: Checkpoint, cut: Cut) -> Kept:
    """What stays of a checkpoint.

    Raises:
        PruneError: calibration text or counts cannot be had.
        Infeasible: the arithmetic of the ratio does not come out.
    """
    keep, many = remaining(given.structure, cut.prune), groups(given.structure)
    places, seed = given.places, cut.seed
    whole = cut.prune.kind == "inter"
    if cut.calibrated:
        from workers.moe.pruning import calibration

        return calibration.choose(given, cut, keep, many)
    if cut.sheet is not None:
        counts = selection.counted(cut.sheet, cut.trial, places)
        return selection.by_layer(places, lambda layer, _: counts[layer], keep, many)
    if cut.prune.criterion == "norm":
        if whole:
            return selection.by_layer(
                places, lambda _, place: selection.norms_of_experts(place), keep, many
            )
        return selection.by_expert(
            places, lambda _, expert, place: selection.norms_of_channels(place, expert), keep
        )
    if whole:
        return selection.by_layer(
            places,
            lambda layer, place: selection.random_scores(place.experts.num, seed, layer),
            keep,
            many,
        )
    return selection.by_expert(
        places,
        lambda layer, expert, place: selection.random_scores(
            place.experts.width, seed, layer, expert
        ),
        keep,
    )


def _tensors(given: Checkpoint, after: Architecture, kept: Kept) -> Iterator[Written]:
    """What is written, layer by layer behind what goes along as it is."""
    for name, one in given.places.others:
        yield Written(name=name, source=one)
    for number, place in given.places.layers.items():
        if kept.experts is not None:
            yield from _fewer(place, kept.experts[number])
        elif kept.channels is not None:
            yield from _narrower(place, kept.channels[number])
        yield from _shared(place, after.layers[number].experts)


def _fewer(place: Place, experts: Indices) -> Iterator[Written]:
    for name, one in place.router:
        yield Written(name=name, source=one, rows=experts)
    for number, expert in enumerate(experts):
        for name, one in place.expert[expert]:
            yield Written(name=name.replace("*", str(number)), source=one)


def _narrower(place: Place, channels: tuple[Indices, ...]) -> Iterator[Written]:
    for name, one in place.router:
        yield Written(name=name, source=one)
    for number, (matrices, kept) in enumerate(zip(place.expert, channels, strict=True)):
        for name, one in matrices[:2]:
            yield Written(name=name.replace("*", str(number)), source=one, rows=kept)
        name, one = matrices[2]
        yield Written(name=name.replace("*", str(number)), source=one, columns=kept)


def _shared(place: Place, after: Experts | None) -> Iterator[Written]:
    """Shared experts as they are, with channels of zeros where the configuration cannot say
    their width otherwise: a channel of zeros adds nothing."""
    assert after is not None, "a layer with experts has some left"
    wide = [weight for weight in after.shared_weights if weight.cut != "none"]
    shapes = [shape for weight in wide for _, shape in tensors(weight)]
    for (name, one), shape in zip(place.shared, shapes, strict=True):
        yield Written(name=name, source=one, padded=None if one.shape == shape else shape)


def _copy_beside(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _NOT_BESIDE):
            shutil.copyfile(file, target / file.name)


def _provenance(given: Checkpoint, after: Architecture, cut: Cut, kept: Kept) -> dict[str, Any]:
    asked = asdict(cut.prune)
    if cut.prune.criterion == "random" or cut.calibrated:
        asked |= {"seed": cut.seed}
    if cut.calibrated:
        asked |= {"text": cut.text, "samples": cut.samples, "tokens": cut.tokens}
    if cut.sheet is not None:
        asked |= {"sheet": str(cut.sheet), "trial": cut.trial}
    told: dict[str, Any] = {
        "method": "pruning of experts",
        "source": str(given.folder),
        "source_sha256": {file.name: _sha256(file) for file in given.files},
        "model_type": after.family,
        "arguments": asked,
        "params_before": given.structure.params_total,
        "params_total": after.params_total,
        "versions": {package: _version(package) for package in ("torch", "transformers", "numpy")},
    }
    if given.places.dropped:
        told["dropped"] = list(given.places.dropped)
    if kept.experts is not None:
        told["kept_experts"] = {str(n): experts.tolist() for n, experts in kept.experts.items()}
    if kept.channels is not None:
        told["kept_channels"] = {
            str(n): [_bits(one, given.structure.ffn_dim) for one in row]
            for n, row in kept.channels.items()
        }
        was, now = given.structure.moe, after.moe
        assert was is not None and now is not None, "there are experts to prune"
        if was.shared != now.shared:
            told["shared_experts"] = {"before": was.shared, "written_as": now.shared}
    return told


def _bits(kept: Indices, width: int) -> str:
    """A bit per channel, 1 where it stays, the first in the highest bit of the first byte."""
    flags = np.zeros(width, np.uint8)
    flags[kept] = 1
    return np.packbits(flags).tobytes().hex()


def _sha256(file: Path) -> str:
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
