"""Figures 7 to 9: what is drawn, in which roles, and what the files hold."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest

from analysis import load
from analysis.errors import AnalysisError, SelectionError
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import FIGURES, find
from analysis.figures.write import write as write_figure
from tests.unit.test_analysis_dataset import failure, grid, record, write

NAMES = ["hparam-ffn", "hparam-experts", "hparam-topk"]


@pytest.fixture
def records(tmp_path: Path) -> pl.LazyFrame:
    write(tmp_path / "hparam", grid())
    return load(tmp_path / "hparam")


def of_records(name: str) -> RecordsFigure:
    figure = find(name)
    assert isinstance(figure, RecordsFigure)
    return figure


def layers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["vconcat"][0]["spec"]["layer"]
    return found


def points_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    (points,) = spec["datasets"].values()
    found: list[dict[str, Any]] = points
    return found


def spec_of(figure: RecordsFigure, records: pl.LazyFrame) -> dict[str, Any]:
    spec: dict[str, Any] = figure.chart(figure.prepare(records)).to_dict()
    return spec


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("alias", "name", "x", "panel", "line"),
    [
        ("fig7", "hparam-ffn", "ffn_dim", "num_experts", "top_k"),
        ("fig8", "hparam-experts", "num_experts", "ffn_dim", "top_k"),
        ("fig9", "hparam-topk", "top_k", "ffn_dim", "num_experts"),
    ],
)
def test_roles_are_the_papers(
    records: pl.LazyFrame, alias: str, name: str, x: str, panel: str, line: str
) -> None:
    figure = of_records(alias)
    assert figure.name == name
    assert alias.removeprefix("fig") in figure.paper
    spec = spec_of(figure, records)
    points = next(one for one in layers(spec) if one["mark"]["type"] == "point")
    assert spec["vconcat"][0]["facet"]["field"] == panel
    run = of_records(alias).prepare(records).get_column(x).unique().sort().to_list()
    assert points["encoding"]["x"]["axis"]["values"] == run
    assert points["encoding"]["color"]["field"] == points["encoding"]["shape"]["field"] == line


def test_names_are_unique_and_a_wrong_one_is_answered() -> None:
    words = [word for figure in FIGURES for word in (figure.name, *figure.aliases)]
    assert len(words) == len(set(words))
    with pytest.raises(SelectionError, match="no figure 'hparam-fnn'; did you mean 'hparam-ffn'"):
        find("hparam-fnn")


def test_prepare_keeps_every_point_with_its_outcome(records: pl.LazyFrame) -> None:
    frame = of_records("fig9").prepare(records)
    assert frame.columns[:3] == ["ffn_dim", "num_experts", "top_k"]
    assert frame.select(frame.columns[:3]).rows() == [
        (f, e, k) for f in (224, 448, 896) for e in (8, 16) for k in (1, 2, 4)
    ]
    first = frame.row(0, named=True)
    assert first["throughput_tok_s"] == 1000.0
    assert first["throughput_tok_s_ci_low"] == 990.0
    assert first["active_share"] == 0.25
    holes = frame.filter(pl.col("throughput_tok_s").is_null())
    columns = ("outcome", "out_of_memory", "skipped_by", "profile")
    assert holes.select(columns).rows() == [
        ("oom", True, None, "cpu"),
        ("skipped", True, "f896e16k2", "cpu"),
    ]


def test_a_trial_skipped_for_another_cause_did_not_run_out_of_memory(tmp_path: Path) -> None:
    dead = failure("b", "crashed", top_k=4)
    write(tmp_path, [record("a"), dead, failure("c", "skipped", top_k=8, skipped_by="b")])
    frame = of_records("fig9").prepare(load(tmp_path))
    assert not frame.get_column("out_of_memory").any()


def test_mixed_records_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [*grid(), record("gpu", profile="h100")])
    with pytest.raises(SelectionError, match="profile"):
        of_records("fig7").prepare(load(tmp_path))


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="no records yet"):
        of_records("fig7").prepare(load(tmp_path))
    write(tmp_path, [failure("a", "infeasible")])
    with pytest.raises(SelectionError, match="infeasible"):
        of_records("fig7").prepare(load(tmp_path))


@pytest.mark.lengthy
def test_holes_stand_in_rows_of_their_own_below_zero(records: pl.LazyFrame) -> None:
    spec = spec_of(of_records("fig9"), records)
    drawn = points_of(spec)
    marks = {(one["top_k"], one["mark"]): one["strip"] for one in drawn if one["mark"]}
    assert set(marks) == {(2, "×"), (4, "○")}
    assert len({*marks.values()}) == 1  # both are of the line of 16 experts
    assert all(place < 0 for place in marks.values())
    axis = layers(spec)[1]["encoding"]["y"]["axis"]
    assert [value for value in axis["values"] if value < 0] == [*{*marks.values()}]
    assert json.dumps(["16 experts"]) in axis["labelExpr"]

    by_top_k = points_of(spec_of(of_records("fig8"), records))
    assert len({one["strip"] for one in by_top_k if one["mark"]}) == 2


def test_a_line_breaks_where_a_point_is_missing(tmp_path: Path) -> None:
    points = [record(str(k), top_k=k) for k in (1, 4)] + [failure("2", "timeout", top_k=2)]
    write(tmp_path, points)
    spec = spec_of(of_records("fig9"), load(tmp_path))
    line = next(one for one in layers(spec) if one["mark"]["type"] == "line")
    assert "transform" not in line  # the null point is kept, and breaks the path
    assert [one["mark"] for one in points_of(spec)] == [None, "?", None]


@pytest.mark.lengthy
def test_predictions_are_labelled(tmp_path: Path) -> None:
    write(tmp_path, grid(measured=False, engine="roofline"))
    spec = spec_of(of_records("fig7"), load(tmp_path))
    assert spec["title"]["subtitle"][0] == "Predicted by a model (roofline), not measured"
    assert layers(spec)[1]["encoding"]["y"]["title"].startswith("Predicted")


def test_pivots_are_the_panels_as_text(records: pl.LazyFrame) -> None:
    figure = of_records("fig9")
    first, *_, last = figure.pivots(figure.prepare(records))
    assert (first.title, first.columns) == ("FFN 224", ("1", "2", "4"))
    assert first.rows[0] == ("8 experts", "1,000 ±1 %", "900 ±1 %", "800 ±1 %")
    assert last.rows[1] == ("16 experts", "450 ±1 %", "OOM", "skipped")


@pytest.mark.parametrize("name", NAMES)
def test_csv_holds_what_is_drawn(records: pl.LazyFrame, tmp_path: Path, name: str) -> None:
    figure = of_records(name)
    frame = figure.prepare(records)
    write_figure(figure, frame, tmp_path / "x.csv")
    assert pl.read_csv(tmp_path / "x.csv", schema=frame.schema).equals(frame)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", NAMES)
def test_svg_shows_panels_marks_and_sentence(
    records: pl.LazyFrame, tmp_path: Path, name: str
) -> None:
    figure = of_records(name)
    frame = figure.prepare(records)
    write_figure(figure, frame, tmp_path / "x.svg")
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [" ".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("×") == 1
    assert texts.count("○") == 1
    assert {"8 experts", "16 experts"} <= set(texts) or {"FFN 224", "FFN 896"} <= set(texts)
    assert figure.title in texts
    page = " ".join(texts)
    assert figure.insight(frame) in page
    assert "× out of memory (OOM)" in page
    assert "93.8 % confidence intervals" in page


@pytest.mark.lengthy
def test_png_is_a_picture_of_double_density(records: pl.LazyFrame, tmp_path: Path) -> None:
    figure = of_records("fig9")
    write_figure(figure, figure.prepare(records), tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 1500
    assert height > 1000
    assert len(data) > 30_000


@pytest.mark.lengthy
def test_html_stands_alone_and_cannot_be_broken_out_of(
    records: pl.LazyFrame, tmp_path: Path
) -> None:
    figure = of_records("fig9")
    write_figure(figure, figure.prepare(records), tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    scripts = re.findall(r"<script([^>]*)>", page)
    assert scripts == [' type="text/javascript"'] * 2
    assert page.count("</script") == 2
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"src=|href=|url\(|@import", outside)
    assert "</script><b>" not in page
    assert r"\u003c/script>\u003cb>" in page
    assert len(page) > 500_000  # the drawing library is inside


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.pdf", "no format '.pdf'"), ("x", "no format"), ("none/x.svg", "there is no folder")],
)
def test_bad_outputs_are_explained(
    records: pl.LazyFrame, tmp_path: Path, name: str, message: str
) -> None:
    figure = of_records("fig9")
    with pytest.raises(AnalysisError, match=message):
        write_figure(figure, figure.prepare(records), tmp_path / name)


def test_a_file_that_cannot_be_written_leaves_nothing(
    records: pl.LazyFrame, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").mkdir()
    figure = of_records("fig9")
    with pytest.raises(AnalysisError, match=r"x\.csv: cannot be written"):
        write_figure(figure, figure.prepare(records), tmp_path / "x.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hparam", "x.csv"]


@pytest.mark.lengthy
def test_all_out_of_memory_is_still_a_picture(tmp_path: Path) -> None:
    points = [failure(str(k), "oom", top_k=k) for k in (1, 2, 4)]
    write(tmp_path, points)
    figure = of_records("fig7")
    write_figure(figure, figure.prepare(load(tmp_path)), tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count(">×<") == 3
