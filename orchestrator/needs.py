"""What a sweep names and a machine must have: models, drafts, tokenizers, files of text.

A folder that was not made, or a file under another path, would be found out by every engine for
itself, a minute after the start and once per group. Here it is found before anything starts, with
the place where it is named and the command that makes it.

A name with one slash may be a folder or a hub id. It is a folder if it is one here, a model of
the hub if the hub's cache has it, and a folder that is missing if it begins with `models/`, which
is kept for checkpoints made on this machine (`workers.moe.small`). Of any other name nobody can
tell without asking the hub: it is taken for a hub id, and the note says both.

What counts is the machine that runs the engines. Where that may be another one than the driver's
(a cluster that was there before, a plan for another class of device), nothing is refused, and
what is missing here is a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Place
from orchestrator.grid import Point
from orchestrator.sweep import Sweep
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.moe import drafts, hub
from workers.moe.architecture import catalogue, catalogue_name
from workers.moe.small import COMMAND, RESERVED, SMALL
from workers.texts import absent as no_text

_PATHS = ("tokenizer", "hf_config_path")
"""Arguments of the engine that may name a folder."""
_LOCAL = (RESERVED, "/", "./", "../", "~")
"""How the name of a folder begins that is no hub id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Absent:
    """Something that a sweep names and this machine has not."""

    place: Place
    """Where it is named."""
    reason: str
    """What is missing, and what makes it."""
    certain: bool
    """No engine of this machine can do without. Otherwise it may be had from the hub."""


def absent(sweep: Sweep, points: Iterable[Point]) -> tuple[Absent, ...]:
    """What the trials of `sweep` name and this machine has not, each once."""
    seen: set[tuple[int, ...]] = set()
    found: dict[tuple[str, str], Absent] = {}
    for trial in (point.trial for point in points):
        blocks = (id(trial.model), id(trial.engine), id(trial.workload))
        if blocks in seen:  # points share their blocks
            continue
        seen.add(blocks)
        for key, value, reason, certain in _needs(trial):
            if (key, reason) not in found:
                place = _place(sweep, key, value)
                found[key, reason] = Absent(place=place, reason=reason, certain=certain)
    return tuple(found.values())


def refuse(missing: Iterable[Absent]) -> None:
    """Raises SweepError for what no engine of this machine can do without."""
    certain = [one for one in missing if one.certain]
    if certain:
        raise certain[0].place.error("; ".join(one.reason for one in certain))


def notes(missing: Iterable[Absent], *, here: bool) -> list[str]:
    """A line for each that is not refused.

    Args:
        here: engines run on this machine, so what is certainly missing is refused.
    """
    where = "" if here else "on this machine, which need not be the one that runs it: "
    return [
        f"{where}{one.place.error(one.reason)}" for one in missing if not (here and one.certain)
    ]


def _needs(trial: Trial) -> Iterator[tuple[str, object, str, bool]]:
    """Key, value, reason and certainty of what is not there."""
    simulated = trial.engine.kind == "roofline"
    if (why := _model(trial.model, simulated)) is not None:
        yield "model.name", trial.model.name, *why
    second, speculative = drafts.draft(trial), trial.engine.speculative
    if second is not None and speculative is not None:
        why = _model(second, simulated)
        if why is not None:
            yield "engine.speculative.model", speculative.model, *why
    if simulated:
        return
    for name in _PATHS:
        value = trial.engine.args.get(name)
        if isinstance(value, str) and value.startswith(_LOCAL) and not _exists(value):
            yield f"engine.args.{name}", value, _folder(value), True
    if trial.workload.dataset is not None:
        reason = no_text(trial.workload.dataset)
        if reason is not None:
            yield "workload.dataset", trial.workload.dataset, reason, True


def _model(model: Model, simulated: bool) -> tuple[str, bool] | None:
    """What of a model is not there, and whether that is certain; null where all may be."""
    name = model.name
    if (known := catalogue_name(name)) is not None:
        hub_id = str(catalogue()[known]["hub_id"])
        if simulated or model.weights == "dummy" or not hub.offline():
            return None
        return None if hub.snapshot(hub_id, model.revision) else (_offline(hub_id, model), True)
    if _exists(name):
        return None
    if name.startswith(_LOCAL):
        return _folder(name), True
    if hub.snapshot(name, model.revision) is not None or name.count("/") != 1:
        return None  # one with more slashes is refused as no model at all
    if hub.offline():
        return _offline(name, model), True
    which = hub.named(name, model.revision)
    return (
        f"{which} is no folder here and not in the hub cache: it is taken for a hub id and will "
        "be downloaded; if a folder is meant, it is missing",
        False,
    )


def _offline(hub_id: str, model: Model) -> str:
    named = "" if hub_id == model.name else f"{model.name}: "
    return f"{named}{hub.absent(hub_id, model.revision)} (this machine was told to be offline)"


def _folder(name: str) -> str:
    if name.rstrip("/") in SMALL:
        return f"there is no folder {name} here: {COMMAND} makes it"
    if name.startswith(RESERVED):
        return (
            f"there is no folder {name} here, and what begins with {RESERVED} is no hub id: "
            "python -m workers.moe.upcycle makes a small MoE (workers/README.md)"
        )
    return f"there is no {name} on this machine"


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, not for us to read; nobody's home
        return False


def _place(sweep: Sweep, key: str, value: object) -> Place:
    """Where `value` is written: under its key, or in the block that holds it."""
    block = key.rpartition(".")[0]
    places = [sweep.place(key, value)]
    if key.startswith("engine.") and places[0].line is None:
        rows = (cell for factor in sweep.factors for row in factor for cell in row)
        places += [cell.place for cell in rows if cell.key == block and _holds(cell.value, value)]
        places.append(sweep.place(block, None))
    return next((one for one in places if one.line is not None), places[0])


def _holds(block: object, value: object) -> bool:
    if isinstance(block, dict):
        return value in block.values()
    return getattr(block, "model", None) == value
