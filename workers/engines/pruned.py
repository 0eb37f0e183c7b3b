"""The pruned checkpoint that a trial asks for, as a folder that an engine can load."""

from __future__ import annotations

from pathlib import Path

from workers.contract.errors import Unsupported
from workers.contract.model import Model
from workers.engines import hub_files
from workers.moe import drafts
from workers.moe.pruning.cache import cached
from workers.moe.pruning.errors import PruneError


def pruned_folder(model: Model) -> Path:
    """The checkpoint of `model`, pruned as it asks; from the cache, or made now.

    Raises:
        Unsupported: it cannot be pruned.
        Crashed: its weights cannot be had.
    """
    assert model.prune is not None, "asked of models that are to be pruned"
    try:
        return cached(_checkpoint(model), model.prune)
    except PruneError as error:
        raise Unsupported(f"model.prune: {error}") from error


def _checkpoint(model: Model) -> Path:
    """The folder with the whole checkpoint; of a hub id, its files are fetched if need be."""
    hub_id = drafts.hub_id(model)
    if hub_id is None:
        return Path(model.name).expanduser()
    return hub_files.folder(hub_id, model.revision)
