"""The engine that predicts: with a pace it takes its time, and its figures stay the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.grid import expand
from orchestrator.plan import ROOFLINE_S, Group, build, own_dimensions
from orchestrator.sweep import load
from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.errors import OutOfMemory, Unsupported
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished, Message, Progress
from workers.engines.base import Site
from workers.engines.roofline_engine import RooflineEngine, pace
from workers.hardware.device import device

PACE = 0.01
WRONG = [-1, -0.5, True, "2", float("inf"), float("nan"), [1]]


def _group(folder: Path, args: dict[str, Any], **base: Any) -> Group:
    """Two workloads of one model in 4 devices, as planned for H100s."""
    path = folder / "p.yaml"
    sections = {
        "model": {"name": "mixtral-8x7b", "weights": "dummy"},
        "layout": {"tensor": 4},
        "workload": {"input_tokens": 64, "output_tokens": 32},
        "engine": {"kind": "roofline", "args": args},
    }
    grid = {"workload.batch_size": [1, 4]}
    path.write_text(yaml.safe_dump({"name": "p", "base": sections | base, "grid": grid}))
    sweep = load(path, (), "h100")
    (group,) = build(sweep, expand(sweep, own_dimensions), device("h100")).groups
    return group


def _run(group: Group) -> Iterator[Finished]:
    return (one for one in _messages(group) if isinstance(one, Finished))


def _messages(group: Group) -> Iterator[Message]:
    tickets = tuple(
        Ticket(trial=one.trial, trial_id=one.trial_id, axes=one.axes) for one in group.trials
    )
    job = Job(sweep="p", run_id="r", group_id=group.group_id, profile="h100", tickets=tickets)
    return runner.run(job)


def test_a_paced_group_takes_as_long_as_its_plan_says(tmp_path: Path) -> None:
    list(_run(_group(tmp_path, {"pace": 0})))  # what only the first run pays
    group = _group(tmp_path, {"pace": PACE})
    began = time.monotonic()
    ended = list(_run(group))
    taken = time.monotonic() - began
    assert [one.outcome for one in ended] == ["ok", "ok"]
    assert group.predicted_s > 0.1
    assert taken == pytest.approx(group.predicted_s, abs=0.3)
    assert taken > group.predicted_s - ROOFLINE_S


def test_passes_count_for_the_time_that_they_took(tmp_path: Path) -> None:
    """Not for the seconds that they predict, which are 100 times as many here."""
    began = time.monotonic()
    messages = list(_messages(_group(tmp_path, {"pace": PACE})))
    busy_s = sum(one.busy_s for one in messages if isinstance(one, Progress))
    assert 0 < busy_s <= time.monotonic() - began


def test_a_pace_changes_no_figure(tmp_path: Path) -> None:
    slow, quick = (list(_run(_group(tmp_path, args))) for args in ({"pace": 0.001}, {}))
    figures = ["measured", "engine", "engine_version", "device", "e2e_s", "ttft_s", "tpot_s"]
    figures += ["throughput_tok_s", "device_count", "repeats"]
    for one, other in zip(slow, quick, strict=True):
        row = one.record.select(figures).to_pylist()
        assert row == other.record.select(figures).to_pylist()
        assert row[0]["measured"] is False


def test_a_paced_group_holds_its_devices_for_the_time_it_takes(tmp_path: Path) -> None:
    quick, none, slow = (_group(tmp_path, args) for args in ({}, {"pace": 0}, {"pace": 0.5}))
    assert (quick.devices, quick.held) == (4, 1)
    assert quick.predicted_s == none.predicted_s == ROOFLINE_S
    assert none.held == slow.held == 4
    known = [one.prediction for one in slow.trials if one.prediction is not None]
    passes = sum(one.prefill_s + one.e2e_s for one in known)
    assert slow.predicted_passes_s == pytest.approx(0.5 * passes)
    assert slow.predicted_load_s == pytest.approx(0.5 * known[0].load_s + ROOFLINE_S)


def test_memory_that_runs_out_takes_the_time_of_a_load(tmp_path: Path) -> None:
    tight = {"kind": "roofline", "memory_limit_gib": 1.0, "args": {"pace": PACE}}
    group = _group(tmp_path, {}, engine=tight)
    known = group.trials[0].prediction
    assert known is not None and group.predicted_oom == 2
    site = Site(scratch=tmp_path, device="h100")
    trial = group.trials[0].trial
    began = time.monotonic()
    with pytest.raises(OutOfMemory):
        RooflineEngine(trial, [trial.workload], site)
    assert time.monotonic() - began >= PACE * known.load_s > 0.1
    assert group.predicted_passes_s == 0.0


@pytest.mark.parametrize("wrong", WRONG)
def test_a_pace_that_is_no_number_is_refused(wrong: object) -> None:
    settings = EngineSettings(kind="roofline", args={"pace": wrong})
    with pytest.raises(Unsupported, match=r"engine\.args\.pace is .* at least 0"):
        pace(settings)


@pytest.mark.parametrize("wrong", [-1, "2", True])
def test_a_refused_pace_ends_every_trial_and_waits_for_nothing(
    tmp_path: Path, wrong: object
) -> None:
    group = _group(tmp_path, {"pace": wrong})
    assert group.held == 1 and group.predicted_s == ROOFLINE_S
    ended = list(_run(group))
    assert [one.outcome for one in ended] == ["unsupported", "unsupported"]
    (reason,) = ended[0].record.column("outcome_reason").to_pylist()
    assert reason == f"engine.args.pace is {wrong!r}: engine roofline takes a number of at least 0"


def test_engines_without_a_pace_wait_for_nothing() -> None:
    assert pace(EngineSettings(kind="roofline")) is None
    assert pace(EngineSettings(kind="roofline", args={"pace": 2})) == 2.0


def test_waiting_is_in_the_figures_that_a_record_has(tmp_path: Path) -> None:
    for most, waves in ((4, 1), (3, 2), (1, 4)):
        group = _group(tmp_path, {"max_num_seqs": most})
        known = group.trials[1].prediction  # of a batch of 4
        assert known is not None and known.waves == waves
        rows = [one.record.to_pylist()[0] for one in _run(group)]
        (row,) = (one for one in rows if one["batch_size"] == 4)
        assert row["ttft_s"] == pytest.approx(known.ttft_s)
        assert row["e2e_s"] == pytest.approx(known.e2e_s)
