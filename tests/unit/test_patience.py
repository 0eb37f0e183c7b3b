"""How long an engine may be silent, from its prediction and its deadline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.measure import Measure
from workers.contract.message import Stage
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.patience import GRACE_S, LEAST_LOAD_S, LEAST_S, RATIO, patience_s


def _ticket(name: str, e2e_s: float, **trial: Any) -> Ticket:
    made = Trial(**{"model": Model(name="mixtral-8x7b", weights="dummy")} | trial)
    predicted = {"predicted_e2e_s": e2e_s, "predicted_ttft_s": e2e_s / 10, "predicted_load_s": 50.0}
    return Ticket(trial=made, trial_id=name, predicted=predicted)


def _job(*tickets: Ticket, slowness: float | None = 1.0) -> Job:
    names = {"sweep": "s", "run_id": "r", "group_id": "g", "profile": "cpu"}
    return Job(**names, tickets=tickets, slowness=slowness)


@pytest.mark.parametrize(
    ("stage", "trial_id", "slowness", "seconds"),
    [
        ("run", "short", 1.0, LEAST_S),
        ("run", "long", 1.0, RATIO * 11.0),  # a pass in full, and one of one token
        ("run", "long", 3.0, RATIO * 33.0),  # this machine is slower than predicted
        ("run", "long", 0.1, RATIO * 11.0),  # a faster one is no reason for haste
        ("warmup", "long", 1.0, RATIO * 20.0),  # two passes without a word between them
        ("load", None, 1.0, RATIO * 50.0),
        ("close", None, 1.0, RATIO * 50.0),
        ("run", "long", 100.0, 1800.0),  # the deadline
        ("run", "long", None, 1800.0),  # predicted for another device
    ],
)
def test_a_silence_of_many_times_the_prediction_is_a_hang(
    stage: Stage, trial_id: str | None, slowness: float | None, seconds: float
) -> None:
    measure = Measure(warmup=2)
    short, long = _ticket("short", 0.01), _ticket("long", 10.0, measure=measure)
    job = _job(short, long, slowness=slowness)
    assert patience_s(job, stage, trial_id) == pytest.approx(seconds + GRACE_S)


def test_where_there_is_no_telling_the_deadline_alone_counts() -> None:
    unknown = replace(_ticket("t", 1.0), predicted={})
    computed = _ticket("t", 1.0, engine=EngineSettings(kind="roofline"))
    fetched = _ticket("t", 1.0, model=Model(name="nobody/a-model"))
    for ticket in (unknown, computed):
        assert patience_s(_job(ticket), "run", "t") == 1800.0 + GRACE_S
    assert patience_s(_job(fetched), "load", None) == 1800.0 + GRACE_S
    assert patience_s(_job(fetched), "run", "t") == LEAST_S + GRACE_S
    assert patience_s(_job(_ticket("t", 1.0)), "load", None) == 1000.0 + GRACE_S > LEAST_LOAD_S


def test_no_patience_is_longer_than_the_deadline() -> None:
    hasty = _ticket("t", 1.0, measure=Measure(timeout_s=5.0))
    for stage, trial_id in (("load", None), ("run", "t")):
        assert patience_s(_job(hasty), stage, trial_id) == 5.0 + GRACE_S  # type: ignore[arg-type]
