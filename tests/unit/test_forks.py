"""Every engine has a process of its own, and what breaks in it ends one trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.poisonous import ABORT, EXHAUSTED, ILLEGAL, UNBUILDABLE
from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.forks import PRELOAD, Forks

WELL = 16


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRELOAD, "vllm", "tests.preload_poisonous")
        made = Forks(["vllm"])
        made.prepare()
        yield made


def _ended(forks: Forks, folder: Path, *lengths: int) -> tuple[dict[int, str], int]:
    """Why trials of such prompts failed, by length, and how many engines were begun."""
    tickets = tuple(
        Ticket(
            trial=Trial(
                model=Model(name="mixtral-8x7b", weights="dummy", scale=0.25),
                workload=Workload(batch_size=1, input_tokens=length, output_tokens=2),
                engine=EngineSettings(),
            ),
            trial_id=str(length),
        )
        for length in lengths
    )
    log = folder / "log"
    job = Job(
        sweep="s", run_id="r", group_id="g", profile="h100", tickets=tickets,
        log=str(log), scratch=str(folder),
    )  # fmt: skip
    ended: dict[int, str] = {}
    for one in runner.run(job, lambda job: forks.run(job, None)):
        if isinstance(one, Finished):
            reason = one.record.column("outcome_reason")[0].as_py()
            ended[int(one.trial_id)] = reason if one.outcome == "crashed" else one.outcome
    assert forks.survivors() == 0
    engines = [line for line in log.read_text().splitlines() if line.startswith("engine of")]
    assert len(set(engines)) == len(engines), "each in a process of its own"
    return ended, len(engines)


def test_a_broken_process_is_not_used_again(forks: Forks, tmp_path: Path) -> None:
    ended, engines = _ended(forks, tmp_path, ILLEGAL, WELL)
    assert ended[ILLEGAL] == "CUDA error: an illegal memory access was encountered"
    assert (ended[WELL], engines) == ("ok", 2)


def test_a_process_that_dies_while_it_builds_ends_one_trial(forks: Forks, tmp_path: Path) -> None:
    ended, _ = _ended(forks, tmp_path, ABORT, WELL)
    assert ended == {ABORT: "the engine's process died: SIGABRT", WELL: "ok"}


def test_a_build_that_fails_ends_one_trial(forks: Forks, tmp_path: Path) -> None:
    ended, engines = _ended(forks, tmp_path, UNBUILDABLE, WELL)
    assert ended[UNBUILDABLE].startswith("invalid device function")
    assert (ended[WELL], engines) == ("ok", 2)


def test_builds_that_fail_twice_alike_end_the_others_too(forks: Forks, tmp_path: Path) -> None:
    ended, engines = _ended(forks, tmp_path, *range(UNBUILDABLE, UNBUILDABLE + 4))
    assert all(reason.startswith("invalid device function") for reason in ended.values())
    assert (len(ended), engines) == (4, 2)


def test_what_an_earlier_engine_printed_is_no_cause(forks: Forks, tmp_path: Path) -> None:
    ended, engines = _ended(forks, tmp_path, EXHAUSTED, ABORT)
    assert ended[ABORT] == "the engine's process died: SIGABRT"
    assert engines == 2
