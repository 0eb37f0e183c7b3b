"""The draft of speculative decoding: which model it is, and whether it speaks the same tokens.

A target accepts or rejects a draft token by token, so token 317 must be the same text to both
(MoE-Inference-Bench §6.3: "must share an identical vocabulary"). An engine checks no more than
the two sizes, after it has begun to build; two tokenizers of one size would run, and merely
never agree. So vocabularies are compared here, before anything is loaded: the sizes that the
configurations give and, of checkpoints that lie on this machine, every token of the two
`tokenizer.json`. A skeleton has random weights and no words, so there the sizes decide.

The draft of a skeleton is a skeleton too, shrunk by the same factor: engines load both in one
way, and a vocabulary that was shrunk for the one would not fit the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from workers.contract.engine import DRAFT_MODEL, DRAFTLESS
from workers.contract.errors import Infeasible
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.moe import hub
from workers.moe.architecture import catalogue, catalogue_name, resolve
from workers.moe.fields import UnknownModel
from workers.moe.structure import Architecture

MIXED = "use_heterogeneous_vocab"
"""vLLM's setting that allows two vocabularies."""
TOKENIZER = "tokenizer.json"

Files = Callable[[Model, str], Path | None]
"""Where a file of a model lies on this machine; null where it does not."""


def draft(trial: Trial) -> Model | None:
    """The second model that `trial` loads; null without one.

    `revision` and `quantization` are those of `engine.speculative.args`.
    """
    speculative = trial.engine.speculative
    if speculative is None or speculative.model in DRAFTLESS:
        return None
    given = speculative.args
    return Model(
        name=speculative.model,
        revision=_text(given.get("revision")),
        weights=trial.model.weights,
        scale=trial.model.scale,
        dtype=trial.model.dtype,
        quantization=_text(given.get("quantization")),
        trust_remote_code=trial.model.trust_remote_code,
    )


def structure(trial: Trial) -> Architecture | None:
    """What that model is made of; null where there is none, or only the engine can find out.

    Raises:
        UnknownModel: its name is neither in the catalogue, nor a folder, nor a hub id.
    """
    model = draft(trial)
    return resolve(model) if model is not None else None


def check(trial: Trial, files: Files | None = None) -> None:
    """Whether target and draft have one vocabulary.

    Only of a draft model: heads that were trained for a target (EAGLE, Medusa) may know fewer
    tokens, and map them.

    Args:
        trial: what is asked for.
        files: finds files of models; null looks into folders and the hub's cache alone.

    Raises:
        Infeasible: with the difference.
        UnknownModel: as `structure`.
    """
    speculative, second = trial.engine.speculative, draft(trial)
    if speculative is None or second is None or speculative.way != DRAFT_MODEL:
        return
    if speculative.args.get(MIXED):
        return
    first = trial.model
    what = f"the draft {second.name} does not share the vocabulary of {first.name}: "
    sizes = [a.vocab_size for one in (first, second) if (a := resolve(one)) is not None]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise Infeasible(f"{what}{sizes[1]:,} tokens in its configuration, not {sizes[0]:,}")
    if first.weights == "dummy":
        return
    find = files or in_folder
    found = [find(one, TOKENIZER) for one in (first, second)]
    if None in found:
        return
    mine, other = (_read(path, path.stat().st_mtime_ns) for path in found if path is not None)
    if mine and other and (difference := _difference(mine, other)):
        raise Infeasible(what + difference)


def in_folder(model: Model, file: str) -> Path | None:
    """That file of a model which is a folder, or is in the hub's cache."""
    name = hub_id(model)
    folder = Path(model.name).expanduser() if name is None else hub.snapshot(name, model.revision)
    if folder is None or not (folder / file).is_file():
        return None
    return folder / file


def hub_id(model: Model) -> str | None:
    """The name of a model on the hub; null where it is a folder."""
    if known := catalogue_name(model.name):
        return str(catalogue()[known]["hub_id"])
    return None if Path(model.name).expanduser().is_dir() else model.name


def _difference(mine: Mapping[int, str], other: Mapping[int, str]) -> str | None:
    """The first token that differs, in words; null where none does."""
    for number in range(max(*mine, *other) + 1):
        ours, theirs = mine.get(number), other.get(number)
        if ours == theirs:
            continue
        sizes = "" if len(mine) == len(other) else f" ({len(other):,} tokens, not {len(mine):,})"
        if theirs is None:
            return f"it lacks token {number}, {ours!r}{sizes}"
        if ours is None:
            return f"its token {number}, {theirs!r}, is unknown to the target{sizes}"
        return f"its token {number} is {theirs!r}, not {ours!r}{sizes}"
    return None


@lru_cache(maxsize=16)
def _read(path: Path, changed: int) -> Mapping[int, str] | None:
    """Number → token of a `tokenizer.json`; null for a kind that lists none.

    Raises:
        UnknownModel: it cannot be read.
    """
    try:
        whole: Any = json.loads(path.read_text("utf-8"))
        listed = whole["model"].get("vocab")
        if isinstance(listed, dict):
            found = {int(number): str(token) for token, number in listed.items()}
        elif isinstance(listed, list):  # unigram: tokens with their scores
            found = {number: str(one[0]) for number, one in enumerate(listed)}
        else:
            return None
        for one in whole.get("added_tokens") or ():
            found[int(one["id"])] = str(one["content"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnknownModel(f"{path} cannot be read: {error!r}") from error
    return found


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
