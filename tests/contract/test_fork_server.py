"""Engines in forks of a server: what they find there, and how those end that hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.devices import opened, tell
from tests.integration.harness import TINY
from workers import patience
from workers.contract.engine import EngineSettings
from workers.contract.errors import TimedOut
from workers.contract.job import Job, Ticket
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.message import Finished, Progress, Stage
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.forks import EngineDied, Forks

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(120)]

TRIAL = Trial(
    model=Model(**TINY["base"]["model"]),
    workload=Workload(batch_size=2, input_tokens=16, output_tokens=8),
    engine=EngineSettings(eager=True),
    measure=Measure(repeats=50),
)
PREDICTED = {"predicted_e2e_s": 0.1, "predicted_ttft_s": 0.01, "predicted_load_s": 0.1}
HANG_S = 4.0


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        # What vLLM falls back on where a rank must not be a fork: on WSL, or behind CUDA.
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        made = Forks(["vllm"])
        made.prepare()
        yield made


def _job(folder: Path, trial: Trial, **more: Any) -> Job:
    return Job(
        sweep="s",
        run_id="r",
        group_id="g",
        profile="cpu",
        tickets=(Ticket(trial=trial, trial_id="t", predicted=PREDICTED),),
        log=str(folder / "log"),
        scratch=str(folder),
        **more,
    )


def test_imports_are_done_and_no_device_is_open(forks: Forks) -> None:
    """It shows nothing of CUDA on a machine without; on one with a GPU, forks depend on it."""
    ours, theirs = forks._context.Pipe()
    look = forks._context.Process(target=tell, args=(theirs,))
    look.start()
    assert ours.recv() == ([], False, True)
    look.join()


def test_a_device_that_is_open_is_seen() -> None:
    before = opened("/dev/zero")
    with Path("/dev/zero").open("rb"):
        assert opened("/dev/zero") == [*before, "/dev/zero"]


@pytest.mark.slow
def test_ranks_may_be_new_processes(forks: Forks, tmp_path: Path) -> None:
    trial = replace(TRIAL, layout=Layout(tensor=2), measure=Measure(repeats=1))
    job = replace(_job(tmp_path, trial), scratch=None)  # sockets need short paths
    messages = list(forks.run(job, None))
    (ended,) = [one for one in messages if isinstance(one, Finished)]
    assert ended.outcome == "ok", ended.record.column("outcome_reason")[0].as_py()
    assert forks.survivors() == 0


@pytest.mark.parametrize("where", ["load", "run"])
def test_a_hang_is_ended_by_the_prediction(
    where: Stage, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("LEAST_S", HANG_S), ("LEAST_LOAD_S", 60.0), ("GRACE_S", 0.0)):
        monkeypatch.setattr(patience, name, seconds)
    job = _job(tmp_path, TRIAL, slowness=1.0)
    messages = forks.run(job, None)
    until = (one for one in messages if isinstance(one, Progress) and one.stage == where)
    assert next(until)
    os.kill(_fork().pid, signal.SIGSTOP)
    monkeypatch.setattr(patience, "LEAST_LOAD_S", HANG_S)
    began = time.monotonic()
    with pytest.raises(EngineDied) as died:
        list(messages)  # what it had said before
    assert HANG_S <= time.monotonic() - began < HANG_S + 10
    assert isinstance(died.value.error, TimedOut)
    assert died.value.trial_id == (None if where == "load" else "t")
    what = "building the engine" if where == "load" else "the trial"
    assert str(died.value.error) == f"{what} said nothing for {HANG_S:.0f} s"
    assert forks.survivors() == 0


def _fork() -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    return max(
        (one for one in children if "forkserver" in str(one.cmdline())),
        key=lambda one: one.create_time(),
    )
