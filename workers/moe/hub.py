"""Where a model of the hub lies on this machine.

Most models are named by hub id, and what such a name stands for is settled by the hub's cache: a
revision (branch or tag) names a commit in `refs/`, and `snapshots/` has one folder per commit.
A plan, a prediction and an engine that all ask here mean the same files.

The layout is read here instead of through `huggingface_hub`, because a dry run should not wait
for it: importing it takes several times as long as all that a dry run imports. The places and
their order are those of the library (`huggingface_hub.constants`, `try_to_load_from_cache`);
`tests/unit/test_hub.py` holds the two against each other. Nothing here asks the network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MAIN = "main"
"""The revision that is meant where none is named."""
_ID = re.compile(r"\w[\w.-]*\w|\w", re.ASCII)
_LONGEST_ID = 96
_TRUE = {"1", "ON", "YES", "TRUE"}


def is_id(name: str) -> bool:
    """Whether `name` can be that of a model on the hub, `owner/model`."""
    parts = name.split("/")
    return (
        len(parts) == 2
        and len(name) <= _LONGEST_ID
        and all(_ID.fullmatch(part) for part in parts)
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def cache_folder() -> Path:
    """The hub's cache of this machine, which need not be there."""
    caches = os.getenv("XDG_CACHE_HOME", "~/.cache")
    home = _expanded(os.getenv("HF_HOME", f"{caches}/huggingface"))
    older = os.getenv("HUGGINGFACE_HUB_CACHE", f"{home}/hub")
    return Path(_expanded(os.getenv("HF_HUB_CACHE", older)))


def offline() -> bool:
    """Whether this machine was told not to ask the hub."""
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in _TRUE


def commit(hub_id: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a model stands for in the cache; null where it has none.

    Args:
        hub_id: `owner/model`.
        revision: branch, tag or commit; null means `main`.
    """
    kept, revision = _kept(hub_id), revision or MAIN
    if kept is None or not _stays_inside(revision):
        return None
    try:
        named = (kept / "refs" / revision).read_text("utf-8").strip()
    except (OSError, ValueError):  # no such revision, or no text
        named = revision
    return named if _stays_inside(named) and (kept / "snapshots" / named).is_dir() else None


def snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder with the files of that revision; null where the cache has none.

    It may hold some of the files only: what was downloaded by name, or before an interruption.
    """
    kept, found = _kept(hub_id), commit(hub_id, revision)
    return kept / "snapshots" / found if kept is not None and found is not None else None


def revisions(hub_id: str) -> tuple[str, ...]:
    """Branches, tags and commits of a model that the cache has, branches and tags first."""
    kept = _kept(hub_id)
    if kept is None:
        return ()
    refs = kept / "refs"
    try:
        named = [str(one.relative_to(refs)) for one in sorted(refs.rglob("*")) if one.is_file()]
        commits = sorted(one.name for one in (kept / "snapshots").iterdir())
    except OSError:
        return ()
    return tuple(one for one in (*named, *commits) if commit(hub_id, one) is not None)


def absent(hub_id: str, revision: str | None = None) -> str:
    """What is said where the cache lacks a model: one line with what to do."""
    which = f" --revision {revision}" if revision else ""
    has = revisions(hub_id)
    there = f", which has of it {', '.join(has)}" if has else ""
    return (
        f"{named(hub_id, revision)} is not in the hub cache {cache_folder()}{there}: fetch it with "
        f"'hf download {hub_id}{which}', set HF_HOME to the folder of another cache, or name the "
        "folder that holds its config.json"
    )


def named(hub_id: str, revision: str | None) -> str:
    """A model for people."""
    return f"{hub_id}, revision {revision}," if revision else hub_id


def _kept(hub_id: str) -> Path | None:
    """All that the cache has of a model; null where it has nothing, or may not be read."""
    if not is_id(hub_id):
        return None
    folder = cache_folder() / f"models--{hub_id.replace('/', '--')}"
    try:
        return folder if folder.is_dir() else None
    except OSError:
        return None


def _stays_inside(revision: str) -> bool:
    """Whether a revision, as part of a path, leads nowhere else."""
    parts = revision.split("/")
    return "\0" not in revision and not any(part in ("", ".", "..") for part in parts)


def _expanded(path: str) -> str:
    """As the library does it, which leaves the home of nobody as it stands."""
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111
