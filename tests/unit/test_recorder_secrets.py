"""What a record quotes of others is free of secrets, whoever writes the row."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from workers import recorder
from workers.contract.engine import EngineSettings
from workers.contract.errors import Crashed, OutOfMemory, TrialError, Unsupported
from workers.contract.job import Job, Ticket
from workers.contract.model import Model
from workers.contract.trial import Trial

IN_ENVIRONMENT = "canary-of-the-environment"
IN_ARGS = "canary-of-the-arguments"


def _row(error: TrialError, **columns: Any) -> dict[str, Any]:
    args = {"api_key": IN_ARGS, "headers": {"Authorization": f"Bearer {IN_ARGS}"}, "seed": 1}
    trial = Trial(
        model=Model(name="mixtral-8x7b", weights="dummy"),
        engine=EngineSettings(args=args),
    )
    ticket = Ticket(trial=trial, trial_id="t", axes={"engine.args.api_key": IN_ARGS, "n": 1})
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100", tickets=(ticket,))
    (row,) = recorder.failed(job, ticket, error, **columns).to_pylist()
    told: dict[str, Any] = row
    return told


@pytest.mark.parametrize(
    "error",
    [
        Crashed(f"401 Client Error for url: https://host/x?a={IN_ENVIRONMENT}"),
        Unsupported(f"ValidationError: input_value='{IN_ARGS}', input_type=str"),
        OutOfMemory(f"with Authorization: Bearer {IN_ARGS}", stage="load", scope="device"),
        Crashed("cloning https://me:secret-of-the-url@host/x failed: hf_abcdefghijklmnopqrstuv"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_record_of_a_failure_carries_none(
    error: TrialError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", IN_ENVIRONMENT)
    args = json.dumps({"hf_token": IN_ARGS, "seed": 1, "note": IN_ENVIRONMENT})
    row = _row(error, engine_args=args, started_at=datetime.now(UTC))
    text = json.dumps(row, default=str)
    for secret in (IN_ENVIRONMENT, IN_ARGS, "secret-of-the-url", "hf_abcdefgh"):
        assert secret not in text
    assert row["outcome"] == error.outcome and "***" in row["outcome_reason"]
    assert json.loads(row["engine_args"]) == {"hf_token": "***", "note": "***", "seed": 1}
    assert json.loads(row["axes"]) == {"engine.args.api_key": "***", "n": 1}


def test_a_record_without_secrets_is_left_alone() -> None:
    reason = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"
    assert _row(Crashed(reason))["outcome_reason"] == reason
