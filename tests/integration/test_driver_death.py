"""What a driver leaves that is killed: its records, and nothing that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.harness import (
    TINY,
    footprint,
    forks_of,
    hosts_of,
    orchestrate,
    records,
    start,
    summary,
    sweep_file,
    until,
)

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != "zombie"]


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_driver_takes_its_engine_along(tmp_path: Path, tensor: int) -> None:
    """In the middle of a pass that would last for minutes. Ray's services die with the driver,
    so nobody is left who would end the engine but itself."""
    base: dict[str, Any] = TINY["base"] | {
        "workload": {"batch_size": 1, "input_tokens": 16, "output_tokens": 30_000},
        "layout": {"tensor": tensor},
    }
    before = {one for one in footprint() if "/dev/shm" in one}
    driver = start(sweep_file(tmp_path, base=base), "--out", tmp_path, "--plain")
    try:
        logs = tmp_path / "tiny" / "logs"
        until(lambda: any("init engine" in one.read_text() for one in logs.glob("*/*.log")))
        (host,) = hosts_of(driver.pid)
        forks = forks_of(host)
        assert len(forks) >= 2, "a server and its fork"
        ranks = [one for fork in forks for one in fork.children(recursive=True)]
        family = [host, *host.children(recursive=True), *forks, *ranks]
    finally:
        driver.kill()
        driver.communicate()
    until(lambda: not _running(family), timeout=20)
    assert {one for one in footprint() if "/dev/shm" in one} <= before


@pytest.mark.slow
def test_the_same_command_goes_on_where_a_killed_driver_stopped(tmp_path: Path) -> None:
    base = TINY["base"] | {"measure": {"warmup": 0, "repeats": 1}}
    grid = {"workload.seed": list(range(20)), "workload.output_tokens": [300]}
    path = sweep_file(tmp_path, base=base, grid=grid)
    driver = start(path, "--out", tmp_path, "--plain")
    try:
        until(lambda: _ended(tmp_path) >= 3)
    finally:
        driver.kill()
        driver.communicate()
    kept = records(tmp_path / "tiny").height
    assert 3 <= kept < 20
    answer = summary(orchestrate(path, "--out", tmp_path, "--json"))
    assert (answer["resumed"], answer["outcomes"]) == (kept, {"ok": 20})
    assert records(tmp_path / "tiny")["trial_id"].n_unique() == 20


def _ended(folder: Path) -> int:
    """Trials of which the schedule has heard, and which are therefore on disk."""
    logs = (folder / "tiny" / "logs").glob("*/events.jsonl")
    return sum(one.read_text().count('"TrialEnded"') for one in logs)
