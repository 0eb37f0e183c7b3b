"""A real engine beside real programs that want its cores: the record says so."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import pytest

from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.measure import Measure
from workers.contract.message import Finished, Progress
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

TRIAL = Trial(
    model=Model(name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584),
    workload=Workload(batch_size=2, input_tokens=16, output_tokens=8),
    engine=EngineSettings(eager=True),
    measure=Measure(repeats=2),
)
SPIN = "import os; os.sched_setaffinity(0, range(os.cpu_count()))\nwhile True: pass"
"""On any core: children inherit the one that an engine's first thread is bound to."""


def test_a_record_made_beside_busy_programs_says_so(tmp_path: Path) -> None:
    """A program for every core, from the end of the warm-up on: what is below this process by
    then counts as the engine's."""
    ticket = Ticket(trial=TRIAL, trial_id="t")
    job = Job(
        sweep="s",
        run_id="r",
        group_id="g",
        profile="cpu",
        tickets=(ticket,),
        scratch=str(tmp_path),
    )
    finished: list[Finished] = []
    with ExitStack() as programs:
        busy = False
        for message in runner.run(job):
            if isinstance(message, Progress) and message.stage == "run" and not busy:
                busy = True
                for _ in range(os.cpu_count() or 1):
                    one = subprocess.Popen([sys.executable, "-c", SPIN])
                    programs.callback(one.wait)
                    programs.callback(one.kill)
            elif isinstance(message, Finished):
                finished.append(message)
                programs.close()
    (one,) = finished
    (row,) = one.record.to_pylist()
    assert row["outcome"] == "ok" and row["disturbed"]
    assert "of 2 timed passes: " in row["disturbed_reason"]
    assert row["repeats"] == 2 and row["passes_disturbed"] >= 2

    passes = pl.DataFrame(one.samples)
    timed = passes.filter(kind="timed")
    assert len(timed) >= 4, "as many again, and more where they are short"
    assert timed["counted"].sum() == 2
    marked = timed.filter("disturbed")
    assert marked["disturbed_reason"].null_count() == 0
    assert (marked["run_delay_s"] > 0.05 * marked["wall_s"]).any()
    assert (marked["others_cpu_s"] > 0.05 * marked["wall_s"]).any()
    assert timed["involuntary_switches"].max() > 0
    raw = ("wall_s", "own_cpu_s", "run_delay_s", "others_cpu_s", "steal_s", "check_s", "cores")
    assert not any(passes[name].null_count() for name in raw), "the warm-up's too"
    assert passes.filter(kind="warmup")["counted"].null_count() == 1
