"""The driver's shelf: keeps, hands out, names what is no sheet, and ends no run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from analysis.dataset import is_dataset
from orchestrator.plan import Group, Planned
from orchestrator.request import Request
from orchestrator.sheets import Shelf, shelf
from orchestrator.store import Dataset, StoreError
from tests.unit.test_reuse import ASKING, PROBED, kept, probe
from workers.contract.measure import Measure
from workers.contract.message import Finished
from workers.contract.record import RECORDS, rows
from workers.contract.trial import Trial
from workers.moe.sheets import FOLDER, from_rows, to_rows


def finished(sheet: pa.RecordBatch | None) -> Finished:
    return Finished(trial_id="t", outcome="ok", record=rows(RECORDS, [{}]), sheet=sheet)


def group(*trials: Trial) -> Group:
    planned = tuple(Planned(trial=one, trial_id=one.named_id, axes={}) for one in trials)
    return Group(group_id="g", devices=1, trials=planned, label="g")


def batch(trial: Trial, size: int) -> Trial:
    return replace(trial, workload=replace(trial.workload, batch_size=size))


def given(one: Shelf, *trials: Trial) -> Sequence[int] | None:
    """Batches of the sheets that a group gets."""
    found = one.rows(group(*trials))
    return None if found is None else [sheet.key.batch_size for sheet in from_rows(found)]


def test_what_is_kept_is_handed_to_those_who_ask(tmp_path: Path) -> None:
    said: list[str] = []
    one = shelf(Request(sweep=Path("s.yaml"), out=tmp_path), said.append)
    assert given(one, ASKING) == [] and not (tmp_path / FOLDER).exists()
    one.keep([finished(None), finished(to_rows([kept()]))])
    other = Shelf(tmp_path / FOLDER, said.append)  # a later sweep of the same --out
    assert given(other, ASKING, PROBED) == [2]
    assert given(other, PROBED) is None, "who does not ask gets none"
    assert given(other, replace(ASKING, model=replace(ASKING.model, name="olmoe-1b-7b"))) == []
    elsewhere = shelf(Request(sweep=Path("s.yaml"), sheets=tmp_path / "x"), said.append)
    assert given(elsewhere, ASKING) == []
    assert said == []


def test_sheets_travel_with_the_record_and_odd_ones_end_nothing(tmp_path: Path) -> None:
    came = copy.copy(finished(to_rows([kept()])))  # as pickle does it
    assert came.sheet is not None and from_rows(came.sheet) == [kept()]
    assert copy.copy(finished(None)).sheet is None
    said: list[str] = []
    odd = came.sheet.drop_columns(["temperature"])
    Shelf(tmp_path, said.append).keep([finished(odd)])
    assert len(said) == 1 and "of another version" in said[0]


def test_nothing_takes_the_folder_for_a_dataset(tmp_path: Path) -> None:
    Shelf(tmp_path / FOLDER, print).keep([finished(to_rows([kept()]))])
    assert not is_dataset(tmp_path / FOLDER)
    with pytest.raises(StoreError, match="cannot name files"):
        Dataset.open(tmp_path, FOLDER)


def test_files_that_are_no_sheets_are_named_once_and_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    one = Shelf(tmp_path, said.append)
    one.keep([finished(to_rows([kept(), kept(batch(PROBED, 4), probe(4))]))])
    torn = next(tmp_path.glob("*/*/4.arrow"))
    torn.write_bytes(torn.read_bytes()[:100])
    for _ in range(2):
        assert given(one, ASKING) == [2]
    assert len(said) == 1
    assert said[0].startswith("no activation sheet, passed over: ") and "4.arrow" in said[0]


def test_a_disk_that_takes_no_sheet_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("in the way")
    one = Shelf(tmp_path / "file", said.append)
    for _ in range(2):
        one.keep([finished(to_rows([kept()]))])
    assert len(said) == 1 and "could not be kept" in said[0]
    assert given(one, ASKING) == []


def test_what_will_have_no_sheet_is_told_before_it_runs(tmp_path: Path) -> None:
    one = Shelf(tmp_path, print)
    assert one.missing([group(PROBED, replace(PROBED, measure=Measure()))]) is None
    line = one.missing([group(ASKING, batch(ASKING, 8))])
    assert line is not None and line.startswith("2 of 2 trials that ask")
    assert "mixtral-8x7b, random ids, 10/4 tokens, batch 2, 8" in line
    one.keep([finished(to_rows([kept()]))])
    line = one.missing([group(ASKING, batch(ASKING, 4), batch(ASKING, 8))])
    assert line is not None and line.startswith("2 of 3") and line.count("batch 4, 8") == 1
    probing = group(batch(PROBED, 8))
    assert one.missing([probing, group(ASKING, batch(ASKING, 4), batch(ASKING, 8))]) is None
    warm = replace(ASKING, workload=replace(ASKING.workload, temperature=0.5))
    assert one.missing([group(warm)]) is not None
