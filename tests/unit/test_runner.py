"""The stop rule, the order of workloads and the place for temporary files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from workers.contract.job import Ticket
from workers.contract.measure import Measure
from workers.contract.measurement import Pass
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.runner import _scratch, _Trial, _turn


def _trial(measure: Measure, workload: Workload | None = None) -> _Trial:
    trial = Trial(model=Model(name="m"), measure=measure, workload=workload or Workload())
    return _Trial(Ticket(trial=trial, trial_id="t"))


def _pass(e2e_s: float) -> Pass:
    return Pass(
        kind="timed",
        repeat=0,
        started_at=0.0,
        e2e_s=e2e_s,
        input_tokens=1,
        token_s=((e2e_s,),),
        step_s=(e2e_s,),
    )


@pytest.mark.parametrize(
    ("measure", "times", "passes"),
    [
        (Measure(repeats=3), [1.0] * 9, 3),
        (Measure(repeats=3, ci_width=0.1), [1.0] * 9, 3),
        (Measure(repeats=3, ci_width=0.1), [1.0, 2.0] * 9, 9),
        (Measure(repeats=3, ci_width=0.1, max_repeats=5), [1.0, 2.0] * 9, 5),
        # the outliers leave the interval once there are enough repeats to drop them
        (Measure(repeats=2, ci_width=0.1, max_repeats=20), [1.0, 3.0] + [1.0] * 18, 9),
        (Measure(repeats=1, ci_width=0.1), [1.0] * 9, 2),
    ],
)
def test_stop_rule(measure: Measure, times: list[float], passes: int) -> None:
    trial = _trial(measure)
    made = 0
    while not trial.enough():
        trial.passes.append(_pass(times[made]))
        made += 1
    assert made == passes


def test_the_smallest_top_k_comes_first_then_the_largest_workload() -> None:
    sizes = [Workload(batch_size=b, input_tokens=i) for b, i in [(1, 10), (8, 500), (8, 10)]]
    tickets = [
        Ticket(trial=Trial(model=Model(name="mixtral-8x7b", top_k=k), workload=one), trial_id="t")
        for k in (4, 1, None)
        for one in sizes
    ]
    ordered = sorted(tickets, key=_turn)
    assert [one.trial.model.top_k for one in ordered] == [1] * 3 + [None] * 3 + [4] * 3
    assert [one.trial.workload for one in ordered] == [sizes[1], sizes[2], sizes[0]] * 3


def test_temporary_files_go_where_they_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = tempfile.gettempdir()
    segment = Path("/dev/shm/vllm_dist_test_of_runner-tp")
    with _scratch(str(tmp_path)) as folder:
        assert Path(tempfile.gettempdir()) == folder
        (folder / "vllm_dist_test_of_runner").touch()
        segment.touch()
        assert folder.parent == tmp_path
    assert not folder.exists()
    assert not segment.exists()
    assert tempfile.gettempdir() == before
