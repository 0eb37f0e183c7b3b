"""The driver's shelf of activation sheets: on its disk, beside the datasets that it writes.

Engines may run on other nodes, so what a probe finds comes to the driver with the trial's
record, and what may fit a group goes out with the group. The folder lies in `--out`, so sweeps
that write there share it and it travels with them. Its name begins with an underscore, which no
sweep's does, and it holds neither records nor a manifest: nothing takes it for a dataset.

A shelf never ends a run. Files that are no sheets are named and passed over, and so is a disk
that takes no more: the record of the probe stands without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from orchestrator.plan import Group, Planned
from orchestrator.request import Request
from workers.contract.message import Finished
from workers.contract.trial import Trial
from workers.moe.sheets import FOLDER, Sheet, SheetError, Sheets, from_rows, to_rows

_NAMED = 4
"""Subjects without a sheet that are listed; the rest is counted."""


class Shelf:
    """Activation sheets of a folder, as a run uses them.

    Args:
        folder: made when the first sheet comes.
        say: shows a line to the user.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._sheets = Sheets(folder)
        self._say = say
        self._said: set[str] = set()

    def keep(self, finished: Iterable[Finished]) -> None:
        """Stores what probes found."""
        for one in finished:
            if one.sheet is None:
                continue
            try:
                for found in from_rows(one.sheet):
                    self._sheets.put(found)
            except (OSError, SheetError) as error:
                self._once(f"an activation sheet could not be kept: {error}")

    def rows(self, group: Group) -> pa.RecordBatch | None:
        """The sheets that may fit trials of a group; null where none asks for one."""
        asking = [one.trial for one in group.trials if asks(one.trial)]
        if not asking:
            return None
        return to_rows(self._about(asking))

    def missing(self, groups: Iterable[Group]) -> str | None:
        """Which trials will find no sheet, as far as can be told before they run."""
        asking, probing = _split(groups)
        if not asking:
            return None
        kept = _batches_of_sheets(self._about([one.trial for one in asking]))
        for one in probing:
            kept.setdefault(_matter(one.trial), set()).add(one.trial.workload.batch_size)
        without: dict[str, set[int]] = {}
        number = 0
        for one in asking:
            batch, there = one.trial.workload.batch_size, kept.get(_matter(one.trial), set())
            if batch not in there and not (there and min(there) < batch < max(there)):
                number += 1
                without.setdefault(_words(one.trial), set()).add(batch)
        if not number:
            return None
        listed = [
            f"{words}, batch {', '.join(map(str, sorted(batches)))}"
            for words, batches in without.items()
        ]
        more = f"; and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        return (
            f"{number} of {len(asking)} trials that ask for an activation sheet have none in "
            f"{self._sheets.folder}, and no trial of this sweep probes it: "
            f"{'; '.join(listed[:_NAMED])}{more}. Their s_mbu will be null"
        )

    def _about(self, trials: Iterable[Trial]) -> list[Sheet]:
        subjects = dict.fromkeys(
            (one.model.name, one.model.revision, one.workload.dataset) for one in trials
        )
        found: list[Sheet] = []
        for subject in subjects:
            sheets, problems = self._sheets.about(*subject)
            found += sheets
            for problem in problems:
                self._once(f"no activation sheet, passed over: {problem}")
        return found

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def shelf(request: Request, say: Callable[[str], None]) -> Shelf:
    """That of a request."""
    return Shelf(request.sheets or request.out / FOLDER, say)


def asks(trial: Trial) -> bool:
    """Whether it wants the experts of an earlier probe."""
    return trial.measure.activation == "sheet"


def _split(groups: Iterable[Group]) -> tuple[list[Planned], list[Planned]]:
    """Trials that ask for a sheet, and those that will make one."""
    trials = [one for group in groups for one in group.trials]
    asking = [one for one in trials if asks(one.trial)]
    return asking, [one for one in trials if asking and one.trial.measure.activation is True]


def _batches_of_sheets(sheets: Iterable[Sheet]) -> dict[tuple[object, ...], set[int]]:
    found: dict[tuple[object, ...], set[int]] = {}
    for one in sheets:
        key = one.key
        matter = (
            *(key.model, key.revision, key.weights, key.engine, key.quantization),
            *(key.dataset, key.routing, key.temperature, key.input_tokens, key.output_tokens),
        )
        found.setdefault(matter, set()).add(key.batch_size)
    return found


def _matter(trial: Trial) -> tuple[object, ...]:
    """What a sheet's key takes from the trial as it stands, without the batch: the rest is known
    where the engine runs."""
    model, engine, workload = trial.model, trial.engine, trial.workload
    return (
        *(model.name, model.revision, model.weights, engine.kind, model.quantization),
        *(workload.dataset, engine.routing, float(workload.temperature)),
        *(workload.input_tokens, workload.output_tokens),
    )


def _words(trial: Trial) -> str:
    workload = trial.workload
    prompts = workload.dataset if workload.dataset is not None else "random ids"
    return f"{trial.model.name}, {prompts}, {workload.input_tokens}/{workload.output_tokens} tokens"
