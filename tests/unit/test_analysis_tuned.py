"""Records of an untuned MoE kernel beside tuned ones, in columns, tables and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from analysis import load
from analysis.columns import derived
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import find
from analysis.tuned import MARK, line
from tests.unit.scenes import full
from tests.unit.test_analysis_dataset import grid, record, write
from workers.contract.record import RECORDS, rows

TUNED, USERS = "E=8,N=224,device_name=NVIDIA_H200.json", "E=16,N=224,x.json@0123abcd"


def _untuned(*configs: str | None, device: str = "GPU") -> list[bool | None]:
    records = [
        full(str(number), moe_config=config, device=device) for number, config in enumerate(configs)
    ]
    frame = pl.from_arrow(rows(RECORDS, records))
    assert isinstance(frame, pl.DataFrame)
    return derived(frame).collect().get_column("untuned").to_list()


@pytest.mark.parametrize(
    ("configs", "untuned"),
    [
        ((TUNED, "default", USERS), [False, True, False]),
        ((TUNED, f"{TUNED}; default"), [False, True]),  # some layers have no file
        (("default", "default"), [False, False]),  # one kernel throughout
        ((TUNED, USERS), [False, False]),
        ((None, "default"), [None, False]),  # a kernel that asks for none
        ((None, None), [None, None]),
    ],
)
def test_a_record_is_untuned_where_others_are_tuned(
    configs: tuple[str | None, ...], untuned: list[bool | None]
) -> None:
    assert _untuned(*configs) == untuned


def _some_untuned() -> list[dict[str, Any]]:
    """The grid of Figure 9, a third of its measured points without a file."""
    found = grid()
    for number, one in enumerate(one for one in found if one["outcome"] == "ok"):
        one["moe_config"] = TUNED if number % 3 else "default"
    return found


def test_a_figure_marks_them_counts_them_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "hparam", _some_untuned())
    figure = find("fig9")
    assert isinstance(figure, RecordsFigure)
    frame = figure.prepare(load(tmp_path / "hparam"))
    number = int(frame.get_column("untuned").sum())
    assert number > 0
    words = f"{number} of {len(frame)} records ran on vLLM's default MoE configuration"
    assert line(frame).startswith(words)
    spec = figure.chart(frame).to_dict()
    assert words in json.dumps(spec["title"])
    assert {"filter": "datum.untuned"} in _transforms(spec)
    cells = [cell for pivot in figure.pivots(frame) for row in pivot.rows for cell in row]
    assert sum(MARK in cell for cell in cells) == number


def test_lines_and_bars_mark_them_too(tmp_path: Path) -> None:
    plain = record("plain", moe_config="default")
    pruned = record("pruned", prune_kind="inter", prune_ratio=0.25, num_experts=6, moe_config=TUNED)
    write(tmp_path / "pruning", [plain, pruned])
    lines = find("fig11")
    assert isinstance(lines, RecordsFigure)
    spec = lines.chart(lines.prepare(load(tmp_path / "pruning"))).to_dict()
    assert {"filter": "isValid(datum.y) && datum.untuned"} in _transforms(spec)
    times = {"ttft_paper_s": 0.1, "itl_paper_s": 0.01, "e2e_s": 1.0}
    both = [
        record("one", **times, moe_config="default", disturbed=True),
        record("two", **times, moe_config=TUNED, model="other"),
    ]
    write(tmp_path / "latency", both)
    bars = find("fig3")
    assert isinstance(bars, RecordsFigure)
    told = bars.chart(bars.prepare(load(tmp_path / "latency"))).to_dict()
    assert json.dumps({"mark": f"*{MARK}"})[1:-1] in json.dumps(told)


def test_where_all_run_alike_nothing_is_said(tmp_path: Path) -> None:
    write(tmp_path / "old", grid())  # as records of 0.1.0, which have no such column
    figure = find("fig9")
    assert isinstance(figure, RecordsFigure)
    frame = figure.prepare(load(tmp_path / "old"))
    assert line(frame) == "" and MARK not in json.dumps(figure.chart(frame).to_dict()["title"])


def _transforms(spec: Any) -> list[Any]:
    """Every transformation of a chart, wherever it is."""
    if isinstance(spec, list):
        return [found for one in spec for found in _transforms(one)]
    if not isinstance(spec, dict):
        return []
    own = spec.get("transform", [])
    return [*own, *(found for value in spec.values() for found in _transforms(value))]
