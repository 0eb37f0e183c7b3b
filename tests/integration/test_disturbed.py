"""Disturbed records through the command line: told, left as they are, made again when asked."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from orchestrator.store import Dataset
from tests.integration.harness import orchestrate, records, summary, sweep_file
from workers.contract.record import RECORDS, rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]


def test_disturbed_records_are_made_again_where_that_is_asked(tmp_path: Path) -> None:
    """One of two records is marked by hand: no machine is disturbed at command."""
    path = sweep_file(
        tmp_path,
        base={
            "model": {"name": "mixtral-8x7b", "weights": "dummy"},
            "workload": {"batch_size": 1, "input_tokens": 16, "output_tokens": 8},
            "layout": {"tensor": 4},
            "engine": {"kind": "roofline"},
        },
        grid={"workload.batch_size": [1, 2]},
    )
    arguments = (path, "--out", tmp_path, "--profile", "h100", "--json")
    assert summary(orchestrate(*arguments))["disturbed"] == 0
    folder = tmp_path / "tiny" / "records"
    table = pl.scan_ipc(folder).collect().to_arrow().cast(RECORDS)
    found = [row | {"disturbed": row["batch_size"] == 2} for row in table.to_pylist()]
    for one in folder.iterdir():
        one.unlink()
    with Dataset.open(tmp_path, "tiny") as dataset:
        dataset.commit(found[0]["run_id"], records=rows(RECORDS, found))
    same = summary(orchestrate(*arguments))
    assert (same["resumed"], same["disturbed"]) == (2, 1), "told, and left as it is"
    again = summary(orchestrate(*arguments, "--rerun", "crashed,disturbed"))
    assert (again["resumed"], again["disturbed"]) == (1, 0)
    made = records(tmp_path / "tiny").filter(pl.col("run_id") == again["run_id"])
    assert made["batch_size"].to_list() == [2]
