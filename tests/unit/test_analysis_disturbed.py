"""Disturbed records in tables, figures and sentences, from records written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from analysis import load
from analysis.__main__ import main as commands
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import find
from tests.unit.test_analysis_dataset import grid, record, write

NOISY = {"disturbed": True, "disturbed_reason": "3 of 5 timed passes: its threads waited"}
LINE = "2 of 18 records disturbed by something else (marked * or ringed)"


def _some_noisy(**more: Any) -> list[dict[str, Any]]:
    """The grid of Figure 9, two of its measured points disturbed, the others not."""
    found = grid()
    measured = [one for one in found if one["outcome"] == "ok"]
    for number, one in enumerate(measured):
        one |= (NOISY if number in (0, 5) else {"disturbed": False}) | more
    return found


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path / "hparam", _some_noisy())
    return tmp_path / "hparam"


def _run(*arguments: object) -> str:
    done = CliRunner().invoke(commands, [str(one) for one in arguments])
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def _rings(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Marks of layers that draw rings, wherever they are."""
    found = [spec] if spec.get("mark", {}) and _is_ring(spec["mark"]) else []
    for value in spec.values():
        for one in value if isinstance(value, list) else [value]:
            found += _rings(one) if isinstance(one, dict) else []
    return found


def _is_ring(mark: object) -> bool:
    return isinstance(mark, dict) and mark.get("type") == "point" and mark.get("filled") is False


def _chart(name: str, frame: pl.DataFrame) -> dict[str, Any]:
    spec: dict[str, Any] = find(name).chart(frame).to_dict()
    return spec


def test_the_table_of_records_marks_and_counts_them(dataset: Path) -> None:
    said = _run("table", dataset)
    assert said.count("ok*") == 2
    assert LINE in said
    assert "2 × disturbed (*): for instance 3 of 5 timed passes: its threads waited" in said
    assert "Something else disturbed 2 of them; --rerun disturbed measures them again." in said
    rows = json.loads(_run("table", dataset, "--json"))
    assert [row["disturbed"] for row in rows].count(True) == 2


@pytest.mark.lengthy
def test_a_figure_rings_them_counts_them_and_says_so(dataset: Path, tmp_path: Path) -> None:
    figure = find("fig9")
    assert isinstance(figure, RecordsFigure)
    frame = figure.prepare(load(dataset))
    spec = _chart("fig9", frame)
    assert LINE in json.dumps(spec["title"])
    (ring,) = _rings(spec)
    assert {"filter": "datum.disturbed"} in ring["transform"]
    (points,) = spec["datasets"].values()
    assert [one["disturbed"] for one in points].count(True) == 2
    cells = [cell for pivot in figure.pivots(frame) for row in pivot.rows for cell in row]
    assert sum("*" in cell for cell in cells) == 2 and "1,000* ±1 %" in cells
    said = _run("figure", "fig9", dataset, "-o", tmp_path / "x.csv", "-o", tmp_path / "x.svg")
    assert said.endswith(f"{LINE}.\n")
    assert "disturbed" in (tmp_path / "x.csv").read_text().splitlines()[0]
    assert "2 of 18 records disturbed" in (tmp_path / "x.svg").read_text()


@pytest.mark.lengthy
def test_figures_with_lines_of_variants_and_bars_mark_them_too(tmp_path: Path) -> None:
    plain = record("plain", **NOISY)
    pruned = record("pruned", prune_kind="inter", prune_ratio=0.25, num_experts=6, disturbed=False)
    write(tmp_path / "pruning", [plain, pruned])
    figure = find("fig11")
    assert isinstance(figure, RecordsFigure)
    frame = figure.prepare(load(tmp_path / "pruning"))
    assert len(_rings(_chart("fig11", frame))) == 1
    cells = [cell for pivot in figure.pivots(frame) for row in pivot.rows for cell in row]
    assert sum("*" in cell for cell in cells) == 1
    latency = find("fig3")
    assert isinstance(latency, RecordsFigure)
    times = {"ttft_paper_s": 0.1, "itl_paper_s": 0.01, "e2e_s": 1.0}
    write(tmp_path / "latency", [record("one", **times, **NOISY)])
    bars = latency.prepare(load(tmp_path / "latency"))
    assert '"mark": "*"' in json.dumps(_chart("fig3", bars))
    assert "100*" in str(latency.pivots(bars)[0].rows)
    assert "1 of 1 record disturbed" in json.dumps(_chart("fig3", bars))


def test_records_with_requests_put_back_are_marked_and_counted(tmp_path: Path) -> None:
    line = "2 of 18 records with requests put back and computed anew for want of KV cache"
    found = grid()
    measured = [one for one in found if one["outcome"] == "ok"]
    for number, one in enumerate(measured):
        one["preemptions"] = {0: 3, 5: 1}.get(number, 0)
    write(tmp_path / "hparam", found)
    said = _run("table", tmp_path / "hparam")
    assert said.count("ok†") == 2 and line in said
    figure = find("fig9")
    assert isinstance(figure, RecordsFigure)
    frame = figure.prepare(load(tmp_path / "hparam"))
    assert line in json.dumps(_chart("fig9", frame)["title"])
    cells = [cell for pivot in figure.pivots(frame) for row in pivot.rows for cell in row]
    assert sum("†" in cell for cell in cells) == 2


@pytest.mark.lengthy
def test_where_none_was_disturbed_or_nobody_knows_nothing_is_said(tmp_path: Path) -> None:
    """Quiet records, and those of version 0.1.0, which have no such column."""
    write(tmp_path / "old", grid())
    write(tmp_path / "quiet", [one | {"disturbed": False} for one in grid()])
    for name in ("old", "quiet"):
        assert "disturbed" not in _run("table", tmp_path / name)
        figure = find("fig9")
        assert isinstance(figure, RecordsFigure)
        spec = _chart("fig9", figure.prepare(load(tmp_path / name)))
        assert "records disturbed" not in json.dumps(spec)
    old = load("tests/golden/hparam").collect()
    assert old.get_column("disturbed").null_count() == len(old) > 0
