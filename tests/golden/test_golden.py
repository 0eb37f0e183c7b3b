"""A dataset that was once written stays readable for ever.

`hparam/` is a real run: `make sweep` of version 0.1.0 on a 2-core machine, records only. When
the schema grows, this file does not; it must go on loading, drawing and adding up.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from analysis import load
from analysis.figures.registry import find
from orchestrator.request import Request, prepare
from orchestrator.store import Guard, settled
from orchestrator.vouching import models
from workers.contract.record import RECORDS

DATASET = Path(__file__).parent / "hparam"
TOO_LARGE = {(1792, 64), (1792, 32), (896, 64)}


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return load(DATASET).collect()


def test_every_point_of_the_grid_has_one_record(frame: pl.DataFrame) -> None:
    assert set(RECORDS.names) <= set(frame.columns)
    assert frame.height == frame["trial_id"].n_unique() == 64
    shapes = frame.select("ffn_dim", "num_experts", "top_k").unique()
    assert shapes.height == 64
    assert set(frame["schema_version"]) == {1}


def test_what_ran_out_of_memory_is_what_the_prediction_said(frame: pl.DataFrame) -> None:
    oom = frame.filter(pl.col("outcome") == "oom")
    assert set(oom.select("ffn_dim", "num_experts").iter_rows()) == TOO_LARGE
    assert oom.height == 12
    too_large = frame.filter(pl.col("predicted_memory_gib") > pl.col("memory_limit_gib"))
    assert set(too_large["trial_id"]) == set(oom["trial_id"])
    assert set(oom["oom_scope"]) == {"device"} and set(oom["oom_stage"]) == {"load"}


def test_figures_add_up(frame: pl.DataFrame) -> None:
    ok = frame.filter(pl.col("outcome") == "ok")
    tokens = ok["batch_size"] * (ok["input_tokens"] + ok["output_tokens"])
    assert ((tokens / ok["e2e_s"] - ok["throughput_tok_s"]).abs() < 1e-6).all()
    assert (ok["e2e_s_ci_low"] <= ok["e2e_s"]).all() and (ok["e2e_s"] <= ok["e2e_s_ci_high"]).all()
    assert (ok["weights_gib"] * 2**30 >= ok["params_total"] * 2).all()


@pytest.mark.parametrize("name", ["fig7", "fig8", "fig9"])
def test_the_three_figures_can_be_drawn_from_it(name: str, frame: pl.DataFrame) -> None:
    figure = find(name)
    prepared = figure.prepare(frame.lazy())
    assert prepared.filter(pl.col("outcome") == "ok").height == 52
    assert prepared.filter(pl.col("outcome") == "oom").height == 12
    sentence = figure.insight(prepared)
    assert "12 out of memory" in sentence


def test_resuming_over_it_says_which_records_nobody_can_vouch_for(frame: pl.DataFrame) -> None:
    """Version 0.1.0 identified trials by names: its records are found by that, and not used."""
    sweep = Path(__file__).parents[2] / "sweeps" / "hparam.yaml"
    plan = prepare(Request(sweep=sweep), "cpu")[1]
    assert plan.named_ids() == set(frame["trial_id"])
    guard = Guard(engine_version=None, device=None)
    done = settled(frame, guard=guard)
    now = {one.trial_id for group in plan.groups for one in group.trials}
    assert len(now) == 64 and not now & set(done)
    line = models(frame, plan.named_ids())
    assert line is not None and "\n" not in line
    assert line.startswith("64 records of version 0.1.0 (run ") and "measured anew" in line
    assert models(frame.with_columns(model_digest=pl.lit("d")), plan.named_ids()) is None
    assert models(frame, now) is None
