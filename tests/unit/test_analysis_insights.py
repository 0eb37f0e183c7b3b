"""Sentences against points of known arithmetic (see `grid`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from analysis import load
from analysis.aggregate import compare, steps
from analysis.insights import summary
from tests.unit.test_analysis_dataset import failure, grid, record, write
from tests.unit.test_analysis_figures import of_records

FFN, EXPERTS, TOP_K = "hparam-ffn", "hparam-experts", "hparam-topk"
INTERVAL = ("throughput_tok_s_ci_low", "throughput_tok_s_ci_high")


def insight(folder: Path, name: str, values: list[dict[str, Any]]) -> str:
    write(folder, values)
    figure = of_records(name)
    return figure.insight(figure.prepare(load(folder)))


def line(*points: tuple[int, float, float, float], top_k: int = 1) -> pl.DataFrame:
    """Points (x, value, low, high) of one line."""
    names = ("x", "throughput_tok_s", *INTERVAL)
    return pl.DataFrame(points, schema=names, orient="row").with_columns(top_k=pl.lit(top_k))


def test_compare_takes_the_whole_range_and_only_lines_that_have_it() -> None:
    whole = line((1, 100.0, 90.0, 110.0), (2, 80.0, 70.0, 95.0), (4, 50.0, 45.0, 55.0))
    part = line((1, 100.0, 90.0, 110.0), (2, 10.0, 9.0, 11.0), top_k=2)
    found = compare(pl.concat([whole, part]), "x", ["top_k"], [1, 2, 4])
    assert found is not None
    assert (found.low, found.high, found.whole) == (1, 4, True)
    assert found.lines.rows() == [(1, -0.5, True)]


def test_compare_falls_back_to_the_widest_range() -> None:
    points = line((1, 100.0, 99.0, 101.0), (2, 104.0, 100.0, 108.0))
    found = compare(points, "x", ["top_k"], [1, 2, 4])
    assert found is not None
    assert (found.low, found.high, found.whole) == (1, 2, False)
    assert found.lines.row(0) == (1, pytest.approx(0.04), False)
    assert compare(points.head(1), "x", ["top_k"], [1, 2, 4]) is None


def test_steps_need_lines_without_a_hole() -> None:
    whole = line((1, 100.0, 90.0, 110.0), (2, 80.0, 70.0, 95.0), (4, 60.0, 45.0, 55.0))
    holed = line((1, 100.0, 90.0, 110.0), (4, 1.0, 1.0, 1.0), top_k=2)
    found = steps(pl.concat([whole, holed]), "x", ["top_k"], [1, 2, 4])
    assert found.select("low", "high").rows() == [(1, 2), (2, 4)]
    assert found.get_column("change").to_list() == pytest.approx([-0.2, -0.25])
    assert steps(holed, "x", ["top_k"], [1, 2, 4]).is_empty()


def test_fall_by_ffn_dimension(tmp_path: Path) -> None:
    # Of 8 experts: -50 %, .35/.9 - 1 = -61.1 %, .195/.8 - 1 = -75.6 %; of 16: -50 %.
    assert insight(tmp_path, FFN, grid()) == (
        "From FFN 224 to 896 throughput falls by 59 % on average over 4 lines (-50 % to -76 %). "
        "The steepest step is FFN 448 to 896 (-45 %). "
        "The largest loss is that of top-k 4 (-76 %). "
        "Differences larger than their confidence intervals: all 4. "
        "2 of 18 points have no value: 1 out of memory and 1 skipped."
    )


def test_fall_by_experts_and_where_memory_ends(tmp_path: Path) -> None:
    assert insight(tmp_path, EXPERTS, grid()) == (
        "From 8 to 16 experts throughput falls by 10 % at FFN 224, by 10 % at FFN 448 "
        "and by 10 % at FFN 896 (top-k 1 only); medians over top-k 1, 2 and 4. "
        "Differences larger than their confidence intervals: all 7. "
        "Memory first runs out at 16 experts for FFN 896 (top-k 2 and 4 only). "
        "2 of 18 points have no value: 1 out of memory and 1 skipped."
    )


def test_fall_by_top_k(tmp_path: Path) -> None:
    assert insight(tmp_path, TOP_K, grid()) == (
        "From top-k 1 to 4 throughput falls by 20 % at FFN 224, by 40 % at FFN 448 "
        "and by 61 % at FFN 896 (8 experts only); medians over 8 and 16 experts. "
        "Differences larger than their confidence intervals: all 5. "
        "2 of 18 points have no value: 1 out of memory and 1 skipped."
    )


def test_an_end_that_ran_out_of_memory_narrows_the_range(tmp_path: Path) -> None:
    def lost(point: dict[str, Any]) -> bool:
        return bool(point["ffn_dim"] == 896 and point["top_k"] == 4)

    points = [
        point | failure(point["trial_id"], "oom", ffn_dim=896, top_k=4) if lost(point) else point
        for point in grid()
        if point["num_experts"] == 8
    ]
    assert insight(tmp_path, TOP_K, points) == (
        "From top-k 1 to 4 throughput falls by 20 % at FFN 224 and by 40 % at FFN 448; "
        "as far as measured, from top-k 1 to 2, it falls by 30 % at FFN 896; with 8 experts. "
        "Differences larger than their confidence intervals: all 3. "
        "1 of 9 points has no value: 1 out of memory."
    )


def test_a_rise_is_called_a_rise(tmp_path: Path) -> None:
    values = {(1, 224): 100.0, (2, 224): 130.0, (1, 448): 100.0, (2, 448): 100.0}
    values |= {(1, 896): 100.0, (2, 896): 99.5}
    points = [
        record(f"{k} {f}", top_k=k, ffn_dim=f, throughput_tok_s=v) for (k, f), v in values.items()
    ]
    assert insight(tmp_path, TOP_K, points).startswith(
        "From top-k 1 to 2 throughput rises by 30 % at FFN 224, stays the same at FFN 448 "
        "and falls by 0.5 % at FFN 896; with 8 experts. "
        "Differences larger than their confidence intervals: 1 of 3."
    )


def test_lines_without_an_interval_are_counted_apart(tmp_path: Path) -> None:
    points = grid(**dict.fromkeys(INTERVAL))
    assert "No confidence intervals were recorded." in insight(tmp_path / "none", FFN, points)
    some = [
        point | (dict.fromkeys(INTERVAL) if point["num_experts"] == 16 else {}) for point in grid()
    ]
    assert "intervals: all 3 (1 more have none)." in insight(tmp_path / "some", FFN, some)


def test_predictions_are_called_predicted(tmp_path: Path) -> None:
    points = grid(measured=False, engine="roofline")
    assert " predicted throughput falls " in insight(tmp_path, FFN, points)


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    points = [failure(str(k), "oom", top_k=k) for k in (1, 2)]
    points += [failure("4", "crashed", top_k=4)]
    for name in (FFN, TOP_K):
        assert insight(tmp_path, name, points) == (
            "No point was measured. 3 of 3 points have no value: 2 out of memory and 1 crashed."
        )


def test_one_point_is_not_compared(tmp_path: Path) -> None:
    text = insight(tmp_path, EXPERTS, [record()])
    assert text == "No line has two measured points to compare. No point ran out of memory."


def test_infeasible_and_unrecorded_points_are_counted(tmp_path: Path) -> None:
    points = [
        record("a", num_experts=2, top_k=1),
        failure("b", "infeasible", num_experts=2, top_k=4),
        record("c", num_experts=8, top_k=4),
    ]
    assert insight(tmp_path, TOP_K, points) == (
        "No line has two measured points to compare. "
        "1 point is infeasible and left out. 1 point is without a record."
    )


def test_many_panels_are_named_by_their_ends(tmp_path: Path) -> None:
    points = [
        record(f"{f} {k}", ffn_dim=f, top_k=k, throughput_tok_s=1000.0 / k)
        for f in (100, 200, 300, 400, 500)
        for k in (1, 2)
    ]
    assert insight(tmp_path, TOP_K, points).startswith(
        "From top-k 1 to 2 throughput falls by 50 % at FFN 100 and by 50 % at FFN 500;"
    )


def test_summary(tmp_path: Path) -> None:
    assert summary(load(tmp_path).collect()) == "No records yet."
    write(tmp_path, grid())
    assert summary(load(tmp_path).collect()) == (
        "18 trials: 16 ok, 1 oom, 1 skipped. "
        "The highest throughput is 1,000 tok/s, of trial f224e8k1."
    )
