"""A real engine beside real programs that want its cores: the record says so, and is repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from orchestrator.store import Dataset
from tests.integration.harness import orchestrate, records, summary, sweep_file
from workers.contract.record import RECORDS, rows

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


@contextmanager
def _busy_cores() -> Iterator[None]:
    """A program that computes all the time, for every core."""
    spin = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(spin) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for one in programs:
            one.kill()
            one.wait()


def test_a_record_made_beside_busy_programs_says_so(tmp_path: Path) -> None:
    path = sweep_file(tmp_path)
    with _busy_cores():
        done = orchestrate(path, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert summary(done)["outcomes"] == {"ok": 1} and summary(done)["disturbed"] == 1
    (row,) = records(tmp_path / "tiny").iter_rows(named=True)
    assert row["disturbed"] and "of 2 timed passes: " in row["disturbed_reason"]
    assert row["repeats"] == 2 and row["passes_disturbed"] >= 2

    passes = pl.scan_ipc(tmp_path / "tiny" / "samples").collect().filter(kind="timed")
    assert (len(passes), passes["counted"].sum()) == (4, 2), "as many again, two of them count"
    marked = passes.filter("disturbed")
    assert marked["disturbed_reason"].null_count() == 0
    assert (marked["run_delay_s"] > 0.05 * marked["wall_s"]).any()
    assert (marked["others_cpu_s"] > 0.05 * marked["wall_s"]).any()
    assert passes["involuntary_switches"].max() > 0


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
