"""A real engine runs what the sweep's fields and its own overrides ask for, both of them.

And requests that it may not have in flight wait: the time to their first token holds the queue, as
the roofline predicts it. Timings here are of a shared machine, so only their order is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract import tiny
from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.measure import Measure
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.hardware.roofline import Prediction, predict
from workers.moe.architecture import structure

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=4, input_tokens=48, output_tokens=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral", dtype="bfloat16")


def _records(trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """In the order of `trials`, which share an engine."""
    tickets = tuple(Ticket(trial=one, trial_id=one.named_id) for one in trials)
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=tickets)
    ended = [one for one in runner.run(job) if isinstance(one, Finished)]
    rows = {one.trial_id: one.record.to_pylist()[0] for one in ended}
    return (rows[one.named_id] for one in trials)


def _trial(folder: Path, args: dict[str, Any], **changes: Any) -> Trial:
    trial = Trial(
        model=Model(name=str(folder)),
        workload=WORKLOAD,
        engine=EngineSettings(eager=True, args=args),
        measure=Measure(warmup=1, repeats=1),
    )
    return replace(trial, **changes)


def test_axes_and_overrides_both_reach_the_model(checkpoint: Path) -> None:
    args = {"hf_overrides": {"sliding_window": 32}}
    trials = [
        _trial(checkpoint, args, model=Model(name=str(checkpoint), top_k=top_k)) for top_k in (1, 4)
    ]
    for trial, row in zip(trials, _records(trials), strict=True):
        assert row["outcome"] == "ok", row["outcome_reason"]
        assert row["top_k"] == trial.model.top_k
        assert '"sliding_window": 32' in row["engine_args"]
        assert f'"num_experts_per_tok": {trial.model.top_k}' in row["engine_args"]
        known = structure(trial)
        assert known is not None
        assert {layer.attention.window for layer in known.layers} == {32}


def test_what_waits_is_in_the_time_to_the_first_token(checkpoint: Path) -> None:
    workload = replace(WORKLOAD, batch_size=8, output_tokens=48)
    predicted: dict[int, Prediction] = {}
    measured: dict[int, dict[str, Any]] = {}
    for most in (1, 8):
        trial = _trial(checkpoint, {"max_num_seqs": most}, workload=workload)
        (measured[most],) = _records([trial])
        assert measured[most]["outcome"] == "ok", measured[most]["outcome_reason"]
        known = structure(trial)
        assert known is not None
        found = predict(known, trial, device("cpu"))
        assert found is not None
        predicted[most] = found
    one, all_ = measured[1], measured[8]
    # Three and a half of eight requests go before the median one, and it is one of eight.
    assert 0.3 < one["ttft_s"] / one["e2e_s"] < 0.7
    assert predicted[1].ttft_s / predicted[1].e2e_s == pytest.approx(3.5 / 8, rel=0.2)
    # The roofline charges every request's admission, most of a pass of so small a model, so no
    # factor is asked of it.
    assert one["ttft_s"] > 2 * all_["ttft_s"] and predicted[1].ttft_s > predicted[8].ttft_s
    assert one["e2e_s"] > all_["e2e_s"] and predicted[1].e2e_s > predicted[8].e2e_s
