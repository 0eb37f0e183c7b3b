"""The command line on a real GPU: Ray grants it, a fork is told of it, and it is clean after.

The same ways of ending as on CPUs: a point that fits, one that does not, an engine that is
killed while it measures.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.integration.harness import (
    engine_of,
    hosts_of,
    orchestrate,
    records,
    start,
    sweep_file,
    until,
)
from workers.hardware.host import describe, gpu_memory_used

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

BASE: dict[str, Any] = {
    "model": {"name": "mixtral-8x7b", "weights": "dummy", "scale": 0.25, "num_layers": 2},
    "workload": {"batch_size": 4, "input_tokens": 64, "output_tokens": 32},
    "engine": {"eager": True},
    "measure": {"repeats": 3},
}


def test_what_fits_is_measured_and_what_does_not_is_out_of_memory(tmp_path: Path) -> None:
    grid = {"model.scale": [0.25, 1.0], "model.top_k": [1, 2], "workload.batch_size": [1, 4]}
    base = BASE | {"model": BASE["model"] | {"num_experts": 64, "num_layers": 8}}
    path = sweep_file(tmp_path, base=base, grid=grid)
    done = orchestrate(path, "--out", tmp_path, "--json", timeout=390)
    assert done.returncode == 0, done.stderr
    frame = records(tmp_path / "tiny")
    assert frame.height == frame["trial_id"].n_unique() == 8
    ok = frame.filter(pl.col("outcome") == "ok")
    assert ok.height == 4 and set(ok["scale"]) == {0.25}
    assert ok["engine_load_s"].n_unique() == 1  # one engine: both batches, both top-k
    assert set(ok["device"]) == {describe().device}
    assert set(ok["threads"]) == {None}
    for row in ok.iter_rows(named=True):
        assert 0 < row["ttft_s"] < row["e2e_s"]
        assert row["weights_gib"] == row["predicted_weights_gib"]
        assert (row["peak_source"], row["activation_source"]) == ("catalogue", "uniform")
        assert 0 < row["s_mbu_paper"] < row["s_mbu"] < 1
    full = frame.filter(pl.col("outcome") != "ok")
    assert set(full["outcome"]) <= {"oom", "skipped"} and "oom" in set(full["outcome"])
    oom = full.filter(pl.col("outcome") == "oom")
    assert set(oom["oom_stage"]) == {"load"} and set(oom["oom_scope"]) == {"device"}
    assert oom["oom_bytes"].min() > 0
    assert gpu_memory_used("0") < 2**28


def test_a_killed_engine_is_typed_and_its_gpu_is_used_again(tmp_path: Path) -> None:
    grid = {"model.ffn_dim": [7168, 14336]}
    base = BASE | {"workload": BASE["workload"] | {"output_tokens": 1500}}
    path = sweep_file(tmp_path, base=base, grid=grid)
    driver = start(path, "--out", tmp_path, "--json")
    try:
        host = until(lambda: next(iter(hosts_of(driver.pid)), None))
        until(lambda: gpu_memory_used("0") > 2**32)
        os.kill(engine_of(host).pid, signal.SIGKILL)
        _, said = driver.communicate(timeout=300)
    finally:
        if driver.poll() is None:
            driver.kill()
    frame = records(tmp_path / "tiny")
    assert sorted(frame["outcome"]) == ["crashed", "ok"], said
    assert gpu_memory_used("0") < 2**28
