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

from tests.integration.harness import orchestrate, records, summary, sweep_file

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


def test_a_record_made_beside_busy_programs_says_so_and_is_repeated(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, grid={"workload.batch_size": [1, 2]})
    with _busy_cores():
        done = orchestrate(path, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert summary(done)["outcomes"] == {"ok": 2} and summary(done)["disturbed"] == 2
    first = records(tmp_path / "tiny")
    assert first["disturbed"].all()
    assert first["disturbed_reason"].str.contains("of 2 timed passes: ").all()
    assert first["repeats"].to_list() == [2, 2] and first["passes_disturbed"].min() >= 2

    passes = pl.scan_ipc(tmp_path / "tiny" / "samples").collect().filter(kind="timed")
    assert passes.group_by("trial_id").len()["len"].to_list() == [4, 4], "as many again"
    assert passes.group_by("trial_id").agg(pl.col("counted").sum())["counted"].to_list() == [2, 2]
    marked = passes.filter("disturbed")
    assert marked["disturbed_reason"].null_count() == 0
    assert (marked["run_delay_s"] > 0.05 * marked["wall_s"]).any()
    assert (marked["others_cpu_s"] > 0.05 * marked["wall_s"]).any()
    assert passes["involuntary_switches"].max() > 0

    plain = orchestrate(path, "--out", tmp_path, "--plain", "--rerun", "disturbed")
    assert plain.returncode == 0, plain.stderr
    assert "from earlier runs" not in plain.stdout, "both are measured again"
    assert records(tmp_path / "tiny").height == 4
