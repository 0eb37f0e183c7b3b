"""Runs that are interrupted, and engines and ranks that are killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import polars as pl
import pytest

from tests.integration.harness import (
    base,
    engine_of,
    footprint,
    gone,
    hosts_of,
    orchestrate,
    records,
    start,
    summary,
    sweep_file,
    until,
)

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.mark.parametrize("presses", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_keeps_what_finished_and_leaves_nothing(tmp_path: Path, presses: int) -> None:
    before = footprint()
    path = sweep_file(tmp_path, grid={"model.top_k": [1, 2], "model.num_experts": [4, 8]})
    driver = start(path, "--out", tmp_path, "--plain")
    try:
        folder = tmp_path / "tiny" / "records"
        until(
            lambda: (
                any(one.name.startswith("2") or "-" in one.name for one in folder.iterdir())
                and records(tmp_path / "tiny").height >= 1
                if folder.is_dir()
                else False
            )
        )
        for _ in range(presses):
            driver.send_signal(signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    assert "goes on where this one stopped" in out
    assert not gone(before)
    kept = records(tmp_path / "tiny")
    assert 1 <= kept.height < 4
    if presses == 1:  # the slow one goes on, too
        done = orchestrate(path, "--out", tmp_path, "--json")
        assert summary(done)["resumed"] == kept.height
        assert records(tmp_path / "tiny")["trial_id"].n_unique() == 4


@pytest.mark.slow
def test_killed_ranks_leave_no_shared_memory(tmp_path: Path) -> None:
    """Tensor-parallel ranks are processes with shared memory of their own."""
    before = footprint()
    changed = base(
        layout={"tensor": 2},
        workload={"batch_size": 1, "input_tokens": 16, "output_tokens": 8000},
    )
    driver = start(sweep_file(tmp_path, base=changed), "--out", tmp_path, "--plain")
    try:
        if "avx512f" in Path("/proc/cpuinfo").read_text():  # other builds exchange by sockets
            shared = Path("/dev/shm")
            until(lambda: any(one.name.startswith("vllm_dist_") for one in shared.iterdir()))
        until(lambda: _logged(tmp_path, "init engine"))
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 130, err
    assert not gone(before)


def _logged(folder: Path, words: str) -> bool:
    logs = (folder / "tiny" / "logs").rglob("*.log")
    return any(words in one.read_text() for one in logs if one.name != "driver.log")


@pytest.mark.parametrize("whose", [pytest.param("host", marks=pytest.mark.slow), "engine"])
def test_a_killed_engine_ends_its_trial_and_no_other(tmp_path: Path, whose: str) -> None:
    path = sweep_file(
        tmp_path,
        cases=[
            {"model.num_experts": 8, "workload.output_tokens": 1500},
            {"model.num_experts": 4},
        ],
    )
    before = footprint()
    driver = start(path, "--out", tmp_path, "--json")
    try:
        log = tmp_path / "tiny" / "logs"
        until(
            lambda: any(
                "init engine" in one.read_text()
                for one in log.rglob("*.log")
                if one.name != "driver.log"
            )
        )
        (host,) = hosts_of(driver.pid)
        (host if whose == "host" else engine_of(host)).kill()
        out, err = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 1, err
    answer = json.loads(out)
    assert answer["outcomes"] == {"crashed": 1, "ok": 1}
    (why,) = answer["reasons"]
    assert (why["outcome"], why["trials"]) == ("crashed", 1) and "died" in why["text"]
    assert (tmp_path / "tiny" / why["log"]).is_file()
    crashed = records(tmp_path / "tiny").filter(pl.col("outcome") == "crashed")
    assert "died" in crashed["outcome_reason"][0]
    assert ("SIGKILL" in crashed["outcome_reason"][0]) == (whose == "engine")
    (events,) = log.glob("*/events.jsonl")
    opened = events.read_text().count('"open ')
    assert opened == (2 if whose == "host" else 1)  # a host outlives its engine
    assert not gone(before)
