"""A record measured again from its id, by the command line, on a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.integration.harness import footprint, gone, orchestrate, records, sweep_file

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(200)]


def test_a_record_is_replayed_alone_and_its_dataset_left_as_it_was(tmp_path: Path) -> None:
    before = footprint()
    path = sweep_file(tmp_path, grid={"workload.batch_size": [1, 2]})
    done = orchestrate(path, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    original = records(folder)
    assert original["outcome"].to_list() == ["ok", "ok"]
    (trial_id,) = original.filter(pl.col("batch_size") == 2)["trial_id"]
    untouched = {one: one.stat().st_mtime_ns for one in folder.rglob("*")}

    out = tmp_path / "again"
    command = [sys.executable, "-m", "analysis", "replay", trial_id[:8], str(folder), "--json"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not gone(before)
    assert {one: one.stat().st_mtime_ns for one in folder.rglob("*")} == untouched

    told = json.loads(done.stdout)
    new = records(out / "tiny")
    assert (told["trial_id"], told["status"]) == (trial_id, 0)
    (row,) = new.to_dicts()
    (old,) = original.filter(pl.col("trial_id") == trial_id).to_dicts()
    assert (row["trial_id"], row["outcome"], row["batch_size"]) == (trial_id, "ok", 2)
    assert row["axes"] == old["axes"] == '{"workload.batch_size": 2}'
    assert told["replay"]["run_id"] == row["run_id"] != old["run_id"] == told["original"]["run_id"]
    assert told["replay"]["dataset"] == str(out / "tiny")
    for one in told["figures"]:
        assert (one["original"], one["replay"]) == (old[one["name"]], row[one["name"]])
        assert one["ratio"] == pytest.approx(row[one["name"]] / old[one["name"]])
    assert {one["name"]: one["overlap"] is None for one in told["figures"]} == {
        "ttft_s": True,
        "itl_s": True,
        "e2e_s": False,
        "throughput_tok_s": False,
    }
    differ = {one["name"]: (one["original"], one["replay"]) for one in told["differences"]}
    assert differ.pop("trials on the engine") == (2, 1)
    assert not {"device", "engine_version", "host", "code"} & differ.keys()
