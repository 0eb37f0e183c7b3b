"""Files of a model that is named by hub id, in the hub's cache of this machine.

An engine that is given a hub id asks the hub itself, many times over: on a machine that cannot
reach it every question waits, some of them without an end, and what comes out is the traceback
of a library. So the folder in the cache is what an engine is given. Where that has all that is
needed nobody is asked, which also means that what the plan looked at is what runs, even if the
hub has a newer commit by now. Where something is missing the hub is asked once, with a limit on
the time, and what cannot be had is said in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from workers.contract.errors import Crashed, TrialError
from workers.moe import hub

ANSWER_S = 10.0
"""Longest wait for the hub's first answer, seconds."""

Need = Literal["config", "tokenizer", "weights"]
"""Each of the last two with the configuration."""

_TOKENIZER = re.compile(r"tokeniz|^vocab|^merges\.txt$|special_tokens_map|\.tiktoken$|\.jinja$")
_SENTENCEPIECE = re.compile(r"\.model$")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
"""Forms of weights, the first that there is."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")


def folder(
    hub_id: str, revision: str | None = None, need: Need = "weights", *, code: bool = False
) -> Path:
    """The folder in the cache with what is needed of a model; fetched where it is not there.

    Args:
        hub_id: `owner/model`.
        revision: branch, tag or commit; null means `main`.
        need: the files without which there is no use.
        code: the checkpoint's own Python code as well.

    Raises:
        Crashed: it cannot be had, in one line that says what to do.
    """
    found = hub.snapshot(hub_id, revision)
    if found is not None and _has(found, need, code):
        return found
    if hub.offline():
        raise Crashed(f"{_lacking(hub_id, revision, found, need)} (HF_HUB_OFFLINE is set)")
    return _fetch(hub_id, revision, need, code, _lacking(hub_id, revision, found, need))


def file(hub_id: str, revision: str | None, name: str) -> Path | None:
    """A file beside the tokenizer; null where it cannot be had."""
    found = hub.snapshot(hub_id, revision)
    if found is None or not (found / name).is_file():
        try:
            found = folder(hub_id, revision, "tokenizer")
        except TrialError:
            return None  # whoever loads the model will say what is wrong
    path = found / name
    return path if path.is_file() else None


def _fetch(hub_id: str, revision: str | None, need: Need, code: bool, lacking: str) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    what = hub.named(hub_id, revision).removesuffix(",")
    try:
        listed = HfApi().model_info(hub_id, revision=revision, timeout=ANSWER_S).siblings or ()
        names = _chosen((one.rfilename for one in listed), need, code)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=names))
    except errors.GatedRepoError:
        reason = f"{what} is gated: accept its terms on the hub, and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the hub has no revision {revision} of {hub_id}: correct model.revision"
    except errors.RepositoryNotFoundError:
        reason = f"the hub has no {hub_id}, or it is private: correct model.name, or set HF_TOKEN"
    except Exception as error:  # noqa: BLE001  of network, disk and several libraries
        reason = f"the hub could not be asked ({_short(error)}), and {lacking}"
    raise Crashed(reason)


def _has(found: Path, need: Need, code: bool) -> bool:
    """Whether a snapshot holds what is needed; it may be of a download by name, or a torn one."""
    names = {one.name for one in found.iterdir() if one.is_file()}
    if "config.json" not in names or (code and not _code(found) <= names):
        return False
    if need == "tokenizer":
        return any(_TOKENIZER.search(name) or _SENTENCEPIECE.search(name) for name in names)
    return need == "config" or _whole(found, names)


def _whole(found: Path, names: set[str]) -> bool:
    """Whether all weights that an index lists, or that the names of shards count, are there."""
    for form in _WEIGHTS:
        there = {name for name in names if name.endswith(form)}
        for index in (name for name in names if name.endswith(f"{form}.index.json")):
            try:
                listed = set(json.loads((found / index).read_text())["weight_map"].values())
            except (OSError, ValueError, LookupError, AttributeError, TypeError):
                return False
            return listed <= there
        if there:
            counts = [match for name in there if (match := _SHARD.search(name))]
            return all(sum(one[2] == each[2] for one in counts) >= int(each[2]) for each in counts)
    return False


def _chosen(listed: Iterable[str], need: Need, code: bool) -> list[str]:
    """Which of a model's files are fetched: of weights one form, and none that stand in folders."""
    names = [name for name in listed if "/" not in name]
    forms = (form for form in _WEIGHTS if any(name.endswith(form) for name in names))
    form = next(forms, None) if need == "weights" else None
    weights = [name for name in names if form is not None and name.endswith(form)]
    if any(not name.startswith("consolidated") for name in weights):  # the same ones again
        weights = [name for name in weights if not name.startswith("consolidated")]
    return [
        name
        for name in names
        if name in weights
        or name.endswith(".json")
        or (code and name.endswith(".py"))
        or (need != "config" and (_TOKENIZER.search(name) or _SENTENCEPIECE.search(name)))
    ]


def _code(found: Path) -> set[str]:
    """Modules beside a configuration that it names; those of other models are not among them."""
    try:
        named = json.loads((found / "config.json").read_text()).get("auto_map") or {}
        modules = {str(one).split(".")[0] for one in named.values()}
    except (OSError, ValueError, AttributeError):
        return set()
    return {f"{module}.py" for module in modules if "--" not in module}


def _lacking(hub_id: str, revision: str | None, found: Path | None, need: Need) -> str:
    if found is None or not (found / "config.json").is_file():
        return hub.absent(hub_id, revision)
    which = f" --revision {revision}" if revision else ""
    return (
        f"{found}, where the hub's cache has {hub_id}, does not hold all of its {need}: fetch the "
        f"rest with 'hf download {hub_id}{which}'"
    )


def _short(error: Exception) -> str:
    line = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
