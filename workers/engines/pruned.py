"""The pruned checkpoint that a trial asks for, as a folder that an engine can load."""

from __future__ import annotations

from pathlib import Path

from workers.contract.errors import Unsupported
from workers.contract.model import Model
from workers.moe.architecture import catalogue, catalogue_name
from workers.moe.content import pinned
from workers.moe.pruning.cache import cached
from workers.moe.pruning.errors import PruneError

_NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def pruned_folder(model: Model) -> Path:
    """The checkpoint of `model`, pruned as it asks; from the cache, or made now.

    Raises:
        Unsupported: its weights cannot be had, or cannot be pruned.
    """
    assert model.prune is not None, "asked of models that are to be pruned"
    try:
        return cached(_checkpoint(model), model.prune)
    except PruneError as error:
        raise Unsupported(f"model.prune: {error}") from error


def _checkpoint(model: Model) -> Path:
    """The folder with the whole checkpoint; of a hub id, its files are fetched if need be."""
    folder = Path(model.name).expanduser()
    known = catalogue_name(model.name)
    if known is None and folder.is_dir():
        return folder
    name = catalogue()[known]["hub_id"] if known else model.name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=pinned(model), allow_patterns=[*_NEEDED]))
    except Exception as error:  # of several libraries: network, disk, access
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Unsupported(f"model.prune needs the weights of {name}: {reason[:300]}") from error
