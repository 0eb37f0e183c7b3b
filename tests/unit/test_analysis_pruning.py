"""Figure 11: pruned models against the unpruned one, from a dataset of known arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from analysis import load
from analysis.errors import SelectionError
from analysis.figures.figure import RecordsFigure
from analysis.figures.pruning import compared
from analysis.figures.registry import find
from analysis.figures.write import write as write_figure
from tests.unit.test_analysis_dataset import failure, record, write

EXPERTS, WIDTH = 8, 256


def points(model: str = "small-moe") -> list[dict[str, Any]]:
    """Unpruned 1000/k; inter is faster by its ratio, intra at 25 % slower by 1 %."""
    found = []
    for top_k in (1, 2, 4):
        base = 1000.0 / top_k
        cuts: list[tuple[str | None, float | None, float]] = [(None, None, 1.0)]
        cuts += [("inter", ratio, 1 + ratio) for ratio in (0.125, 0.25, 0.5)]
        cuts += [("intra", 0.25, 0.99), ("intra", 0.5, 1.5)]
        for kind, ratio, factor in cuts:
            share = 1 - (ratio or 0.0)
            value = base * factor
            found.append(
                record(
                    f"{model}-{kind}-{ratio}-{top_k}",
                    model=model,
                    top_k=top_k,
                    prune_kind=kind,
                    prune_ratio=ratio,
                    prune_criterion="norm" if kind else None,
                    num_experts=round(EXPERTS * share) if kind == "inter" else EXPERTS,
                    ffn_dim=round(WIDTH * share) if kind == "intra" else WIDTH,
                    throughput_tok_s=value,
                    throughput_tok_s_ci_low=value * 0.99,
                    throughput_tok_s_ci_high=value * 1.01,
                )
            )
    return found


def figure() -> RecordsFigure:
    found = find("fig11")
    assert isinstance(found, RecordsFigure) and found.name == "pruning"
    return found


def prepared(tmp_path: Path, rows: list[dict[str, Any]]) -> pl.DataFrame:
    write(tmp_path, rows)
    return figure().prepare(load(tmp_path))


def test_the_unpruned_model_stands_in_both_panels(tmp_path: Path) -> None:
    frame = prepared(tmp_path, points())
    lines = frame.group_by("prune_kind", maintain_order=True).agg(
        pl.col("line").unique(maintain_order=True)
    )
    assert lines.rows() == [
        ("inter", ["unpruned", "12.5 % removed", "25 % removed", "50 % removed"]),
        ("intra", ["unpruned", "25 % removed", "50 % removed"]),
    ]
    assert len(frame) == 3 * 4 + 3 * 3


def test_the_comparison_is_with_the_unpruned_model_of_the_same_top_k(tmp_path: Path) -> None:
    frame = prepared(tmp_path, points())
    pairs = compared(frame.filter(prune_kind="inter"))
    assert pairs.get_column("change").to_list() == pytest.approx(
        [0.125] * 3 + [0.25] * 3 + [0.5] * 3
    )
    assert pairs.get_column("apart").all()


def test_the_sentence_tells_what_each_ratio_does(tmp_path: Path) -> None:
    said = figure().insight(prepared(tmp_path, points()))
    assert said == (
        "Change of throughput by pruning. inter (fewer experts): at top-k 4 +12.5 % with 12.5 % "
        "removed, +25.0 % with 25 % removed, +50.0 % with 50 % removed; 0 of 9 pruned points are "
        "slower than the unpruned model. intra (narrower experts): at top-k 4 -1.0 % with 25 % "
        "removed (within the confidence intervals), +50.0 % with 50 % removed; 3 of 6 pruned "
        "points are slower than the unpruned model, 0 by more than the confidence intervals."
    )


def test_holes_and_infeasible_points_are_counted(tmp_path: Path) -> None:
    rows = [row for row in points() if row["trial_id"] != "small-moe-inter-0.5-4"]
    cut = {"model": "small-moe", "prune_kind": "inter", "prune_ratio": 0.5, "num_experts": 4,
           "ffn_dim": WIDTH, "prune_criterion": "norm"}  # fmt: skip
    rows += [failure("dead", "oom", top_k=4, **cut), failure("no", "infeasible", top_k=8, **cut)]
    frame = prepared(tmp_path, rows)
    said = figure().insight(frame)
    assert "at top-k 2 +50.0 % with 50 % removed" in said
    assert said.endswith("1 point has no value. 1 point is infeasible and left out.")
    (inter, _) = figure().pivots(frame)
    assert inter.columns == ("1", "2", "4")
    assert inter.rows[0] == ("unpruned (8 × 256)", "1,000 ±1 %", "500 ±1 %", "250 ±1 %")
    assert inter.rows[-1][0] == "50 % removed (4 × 256)"
    assert inter.rows[-1][-1] == "out of memory"


@pytest.mark.lengthy
def test_models_have_panels_of_their_own(tmp_path: Path) -> None:
    frame = prepared(tmp_path, [*points(), *points("other-moe")])
    titles = [pivot.title for pivot in figure().pivots(frame)]
    assert titles == [
        f"{model}, {kind}"
        for model in ("other-moe", "small-moe")
        for kind in ("inter (fewer experts)", "intra (narrower experts)")
    ]
    for suffix in ("png", "svg", "csv", "html"):
        file = tmp_path / f"fig.{suffix}"
        write_figure(figure(), frame, file)
        assert file.stat().st_size > 1000


def test_what_makes_no_figure_is_refused(tmp_path: Path) -> None:
    def refused(name: str, rows: list[dict[str, Any]]) -> str:
        with pytest.raises(SelectionError) as caught:
            prepared(tmp_path / name, rows)
        return str(caught.value)

    assert "no record of a pruned model" in refused("a", [record("a")])
    other = [row | {"prune_criterion": "random", "trial_id": row["trial_id"] + "r"}
             for row in points() if row["prune_kind"]]  # fmt: skip
    assert "prune_criterion (null, norm, random)" in refused("b", [*points(), *other])
    assert "batch_size" in refused("c", [*points(), record("x", model="small-moe", batch_size=3)])
