"""The whole way of a record, from the command line to the dataset, on real engines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pyarrow.dataset
import pytest

from tests.integration.harness import (
    base,
    footprint,
    gone,
    orchestrate,
    records,
    summary,
    sweep_file,
)
from workers import caches
from workers.contract.record import RECORDS

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]

GRID = {"model.top_k": [1, 2, 16], "workload.batch_size": [1, 2]}


@pytest.mark.alone  # its passes are held against the machine's peaks
def test_a_sweep_ends_every_point_in_one_record_and_leaves_nothing(tmp_path: Path) -> None:
    before = footprint()
    cases = [{"engine.memory_limit_gib": 1.0}, {"engine.memory_limit_gib": 0.01}]
    path = sweep_file(tmp_path, grid=GRID, cases=cases)
    done = orchestrate(path, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert not gone(before)

    answer = summary(done)
    assert answer["outcomes"] == {"ok": 4, "oom": 4, "infeasible": 4}
    frame = records(tmp_path / "tiny")
    assert frame.height == frame["trial_id"].n_unique() == answer["trials"] == 12
    assert frame.columns == RECORDS.names

    ok = frame.filter(pl.col("outcome") == "ok")
    assert ok["measured"].all()
    assert set(ok["threads"]) == {len(os.sched_getaffinity(0))}  # as torch counts them there
    assert set(ok["ffn_dim"]) == {224} and set(ok["hidden_size"]) == {256}
    for row in ok.iter_rows(named=True):
        tokens = row["batch_size"] * (16 + 8)
        assert row["throughput_tok_s"] == pytest.approx(tokens / row["e2e_s"])
        assert row["e2e_s_ci_low"] <= row["e2e_s"] <= row["e2e_s_ci_high"]
        assert 0 < row["ttft_s"] < row["e2e_s"]
        assert row["itl_paper_s"] == pytest.approx(
            (row["e2e_s"] - row["ttft_paper_s"]) / (row["batch_size"] * 8 - 1)
        )
        assert row["weights_gib"] == row["predicted_weights_gib"]
        assert row["weights_gib"] * 2**30 >= row["params_total"] * 2 and row["predicted_e2e_s"] > 0
        assert (row["peak_source"], row["activation_source"]) == ("calibrated", "uniform")
        assert row["peak_bandwidth_gb_s"] >= row["calibrated_bandwidth_gb_s"] * 0.99 > 0
        assert 0 < row["s_mbu_paper"] < row["s_mbu"] and row["s_mbu_paper"] < row["mbu"]
        assert 0 < row["s_mfu"] < row["mfu"] < 1 and row["prefill_s_mbu"] > 0
    assert ok["engine_load_s"].n_unique() == 1  # one engine: both batches, both top-k

    oom = frame.filter(pl.col("outcome") == "oom")
    assert set(oom["oom_stage"]) == {"load"} and set(oom["oom_scope"]) == {"device"}
    assert oom["oom_bytes"].min() > 0
    infeasible = frame.filter(pl.col("outcome") == "infeasible")
    assert set(infeasible["outcome_reason"]) == {"top_k 16 is above the 8 experts of a layer"}
    assert set(infeasible["engine_version"]) == {None}
    assert frame.filter(pl.col("outcome") != "ok")["e2e_s"].is_null().all()

    samples = pl.scan_ipc(tmp_path / "tiny" / "samples").collect()
    assert set(samples["trial_id"]) == set(ok["trial_id"])
    # A warm-up, two pairs, and more where something disturbed those.
    assert set(samples.group_by("trial_id").len()["len"]) <= {5 + 2 * more for more in range(30)}
    counted = samples.filter(pl.col("counted") & (pl.col("kind") == "timed"))
    assert sorted(counted.group_by("trial_id").len()["len"]) == sorted(ok["repeats"])
    told = ("wall_s", "run_delay_s", "own_cpu_s", "others_cpu_s", "steal_s", "check_s")
    assert not any(samples[name].null_count() for name in told)
    assert ok["disturbed"].null_count() == 0 and answer["disturbed"] == ok["disturbed"].sum()
    assert pyarrow.dataset.dataset(tmp_path / "tiny" / "records", format="ipc").count_rows() == 12

    logs = {row["log"] for row in ok.iter_rows(named=True)}
    assert all((tmp_path / "tiny" / log).stat().st_size > 100 for log in logs)
    manifest = json.loads((tmp_path / "tiny" / "manifest.json").read_text())
    (run,) = manifest["runs"]
    assert run["counts"] == {"ok": 4, "oom": 4, "infeasible": 4} and run["finished_at"]

    again = orchestrate(path, "--out", tmp_path, "--json")
    assert summary(again)["resumed"] == 12
    assert records(tmp_path / "tiny").height == 12

    rerun = orchestrate(path, "--out", tmp_path, "--json", "--rerun", "infeasible", "--limit", 1)
    assert summary(rerun)["outcomes"] == {"ok": 4, "oom": 4, "infeasible": 4}
    assert records(tmp_path / "tiny").height == 16


def test_a_trial_that_says_nothing_is_timed_out(tmp_path: Path) -> None:
    """And an engine needs no home folder that can be written."""
    spare = tmp_path / f"moe-cache-{os.getuid()}"
    (spare / "moe-sweep").mkdir(parents=True)
    spare.chmod(0o700)
    for calibration in caches.own().glob("peaks-*.json"):  # or this machine is measured again
        shutil.copy(calibration, spare / "moe-sweep")
    path = sweep_file(
        tmp_path,
        base=base(
            workload={"batch_size": 1, "input_tokens": 16, "output_tokens": 8},
            measure={"repeats": 2, "timeout_s": 0.001},
        ),
        grid={"workload.batch_size": [1]},
    )
    homeless = {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path)}
    done = orchestrate(path, "--out", tmp_path, "--plain", **homeless)
    assert done.returncode == 1, done.stderr
    assert f"caches go to {spare}, since /proc/nobody/.cache cannot be written" in done.stdout
    (why,) = [line for line in done.stdout.splitlines() if " 1 timeout " in line]
    assert "measure.timeout_s" in why
    log = next(line.split()[1] for line in done.stdout.splitlines() if line.lstrip()[:4] == "log ")
    assert Path(log).is_file()
    frame = records(tmp_path / "tiny")
    assert frame["outcome"].to_list() == ["timeout"]
    assert "measure.timeout_s" in frame["outcome_reason"][0]


def test_a_sweep_for_hardware_that_nobody_has_is_predicted_and_resumed(tmp_path: Path) -> None:
    path = sweep_file(
        tmp_path,
        base={
            "model": {"name": "mixtral-8x7b", "weights": "dummy"},
            "layout": {"tensor": 4},
            "workload": {"batch_size": 16, "input_tokens": 2048, "output_tokens": 512},
            "engine": {"kind": "roofline"},
        },
        grid={"model.num_experts": [8, 64], "workload.batch_size": [1, 16]},
    )
    arguments = (path, "--out", tmp_path, "--profile", "h100", "--json")
    long = tmp_path / ("t" * 60)  # Ray's sockets have no room in it
    long.mkdir()
    done = orchestrate(*arguments, TMPDIR=str(long), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert summary(done)["outcomes"] == {"ok": 2, "oom": 2}
    frame = records(tmp_path / "tiny")
    assert not frame["measured"].any()
    assert set(frame["engine"]) == {"roofline"} and set(frame["device"]) == {"h100"}
    assert set(frame["device_count"]) == {4} and set(frame["torch_version"]) == {None}
    ok = frame.filter(pl.col("outcome") == "ok").sort("batch_size")
    assert ok["e2e_s"].to_list() == pytest.approx(ok["predicted_e2e_s"].to_list())
    assert ok["repeats"].to_list() == [1, 1] and set(ok["peak_source"]) == {"catalogue"}
    assert set(frame["disturbed"]) == {None} == set(frame["passes_disturbed"])
    assert ok["s_mbu"].is_between(0, 1, closed="none").all()
    oom = frame.filter(pl.col("outcome") == "oom")
    assert set(oom["oom_stage"]) == {"load"} == set(oom["predicted_oom_stage"])

    again = summary(orchestrate(*arguments))
    assert again["resumed"] == 4 and records(tmp_path / "tiny").height == 4
