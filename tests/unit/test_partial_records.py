"""Every figure, table and sentence of records that lack something.

Records end in many ways, older ones have fewer columns, and a figure is asked for after the first
point. So whatever is emptied, taken away or made equal, the answer is a picture whose numbers are
numbers, or one line that says why there is none: never a traceback, nor `nan`, `inf` or `None` in
what people read.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from altair.utils.schemapi import debug_mode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from analysis.columns import ABOVE_ZERO
from analysis.errors import AnalysisError
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import FIGURES, find
from analysis.figures.write import write
from analysis.insights import summary
from analysis.replay import Made
from analysis.replay_tables import replay_facts, replay_table, sentences
from analysis.tables import reasons, records_table
from tests.unit.scenes import SCENES, Scene

pytestmark = pytest.mark.lengthy

DRAWN = {figure.name: figure for figure in FIGURES if isinstance(figure, RecordsFigure)}
OUTCOMES = ("oom", "skipped", "unsupported", "timeout", "crashed", "infeasible")
IDENTITY = ("outcome", "run_id", "trial_id", "schema_version")
EMPTIED = sorted({*next(iter(SCENES.values())).records.columns} - {*IDENTITY})
FIGURES_OF_A_TRIAL = [name for name in EMPTIED if name in ABOVE_ZERO and "predicted" not in name]
INTERVALS = [name for name in EMPTIED if "_ci_" in name or name in ("ci_level", "e2e_s_std")]
UNREADABLE = re.compile(r"(?<![\w.-])([+-]?(nan|NaN|inf)|None)(?![\w-])")

Change = Callable[[Scene], Scene]


def _chosen(rows: int, bits: int) -> pl.Expr:
    """Rows whose bit is set; bits begin again where there are more rows."""
    return pl.lit(pl.Series([bool(bits >> (at % 16) & 1) for at in range(rows)], dtype=pl.Boolean))


def emptied(columns: Sequence[str], bits: int = -1) -> Change:
    def change(scene: Scene) -> Scene:
        here = _chosen(len(scene.records), bits)
        return replace(
            scene,
            records=scene.records.with_columns(
                pl.when(~here).then(pl.col(name)).alias(name) for name in {*columns}
            ),
        )

    return change


def filled(column: str, value: float) -> Change:
    return lambda scene: replace(
        scene,
        records=scene.records.with_columns(
            pl.lit(value, dtype=scene.records.schema[column]).alias(column)
        ),
    )


def ended(outcome: str, bits: int = -1) -> Change:
    """Trials that ended so have no figures."""

    def change(scene: Scene) -> Scene:
        here = _chosen(len(scene.records), bits)
        told = pl.when(here).then(pl.lit(outcome)).otherwise("outcome").alias("outcome")
        without = emptied(FIGURES_OF_A_TRIAL, bits)(scene)
        return replace(without, records=without.records.with_columns(told))

    return change


def kept(bits: int) -> Change:
    return lambda scene: replace(
        scene, records=scene.records.filter(_chosen(len(scene.records), bits))
    )


def one_repeat(scene: Scene) -> Scene:
    return filled("repeats", 1)(emptied(INTERVALS)(scene))


def no_spread(scene: Scene) -> Scene:
    ends = [
        pl.col(name).alias(f"{name}_ci_{end}")
        for name in ("throughput_tok_s", "e2e_s")
        for end in ("low", "high")
    ]
    return replace(scene, records=scene.records.with_columns(*ends, pl.lit(0.0).alias("e2e_s_std")))


def all_equal(scene: Scene) -> Scene:
    """Every figure is the same everywhere."""
    return replace(
        scene,
        records=scene.records.with_columns(pl.col(FIGURES_OF_A_TRIAL).drop_nulls().first()),
    )


def without(table: str) -> Change:
    return lambda scene: replace(scene, **{table: getattr(scene, table).clear()})


def untouched(scene: Scene) -> Scene:
    return scene


def read(
    figure: RecordsFigure, scene: Scene, *, drawn: bool, unlike: pl.DataFrame | None = None
) -> pl.DataFrame | None:
    """What people get of a figure, looked through; null where it was refused in one line.

    A picture follows from the prepared frame alone: it is not drawn for the frame `unlike`, whose
    picture was looked at before.
    """
    frame: pl.DataFrame | None
    try:
        tables = [scene.table(one) for one in figure.beside]
        frame = figure.prepare(scene.loaded(), *tables)
        words = [figure.insight(frame)]
        for pivot in figure.pivots(frame):
            words += [pivot.title, pivot.corner, *pivot.columns]
            words += [cell for row in pivot.rows for cell in row]
        if drawn and unlike is not None:
            drawn = not frame.equals(unlike)
        spec = figure.chart(frame).to_dict(validate=False) if drawn else {}
    except AnalysisError as error:
        words, frame, spec = [str(error)], None, {}
    assert words[0] and "\n" not in words[0]
    for text in words:
        assert _readable(text)
    if frame is None:
        return None
    assert not [number for number in _numbers(spec) if not math.isfinite(number)]
    _sound(frame)
    return frame


def _readable(text: str) -> bool:
    return not UNREADABLE.search(text)


def _numbers(spec: Any) -> Iterator[float]:
    if isinstance(spec, dict | list):
        for one in spec.values() if isinstance(spec, dict) else spec:
            yield from _numbers(one)
    elif isinstance(spec, float):
        yield spec


def _sound(frame: pl.DataFrame) -> None:
    for name, kind in frame.schema.items():
        values = frame.get_column(name).drop_nulls()
        if kind.is_float():
            assert values.is_finite().all(), name
        if name in ABOVE_ZERO:
            assert (values > 0).all(), name


bits = st.integers(min_value=0, max_value=2**16 - 1)
changes = st.lists(
    st.one_of(
        st.builds(emptied, st.lists(st.sampled_from(EMPTIED), min_size=1, max_size=3), bits),
        st.builds(emptied, st.lists(st.sampled_from(EMPTIED), min_size=1, max_size=3)),
        st.builds(ended, st.sampled_from(OUTCOMES), st.one_of(bits, st.just(-1))),
        st.builds(kept, bits),
        st.builds(filled, st.sampled_from(ABOVE_ZERO), st.sampled_from([0.0, -1.0, math.nan])),
        st.builds(filled, st.sampled_from(["top_k", "output_tokens", "batch_size"]), st.just(1)),
        st.sampled_from([one_repeat, no_spread, all_equal]),
        st.builds(without, st.sampled_from(["samples", "activations"])),
    ),
    min_size=1,
    max_size=3,
)
unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck))


def changed(scene: Scene, made: Sequence[Change]) -> Scene:
    for change in made:
        scene = change(scene)
    return scene


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_of_records_is_drawn_of_a_scene(name: str, tmp_path: Path) -> None:
    """A new figure needs a scene, or nothing here says anything of it."""
    with debug_mode(False):  # altair's own check of every part, which each figure's tests have
        frame = read(DRAWN[name], SCENES[name], drawn=True)
    assert frame is not None and len(frame) > 1
    write(DRAWN[name], frame, tmp_path / "x.csv")
    assert pl.read_csv(tmp_path / "x.csv", infer_schema=False).height == len(frame)


@given(name=st.sampled_from(sorted(DRAWN)), made=changes)
@settings(unhurried, max_examples=60)
def test_what_is_missing_is_no_traceback(name: str, made: list[Change]) -> None:
    read(DRAWN[name], changed(SCENES[name], made), drawn=False)


@given(name=st.sampled_from(sorted(DRAWN)), made=changes)
@settings(unhurried, max_examples=8)
def test_what_is_missing_is_no_broken_picture(name: str, made: list[Change]) -> None:
    with debug_mode(False):
        read(DRAWN[name], changed(SCENES[name], made), drawn=True)


SINGLE: dict[str, Change] = {
    "all out of memory": ended("oom"),
    "all crashed": ended("crashed"),
    "all infeasible": ended("infeasible"),
    "one point": kept(1),
    "one repeat": one_repeat,
    "no spread": no_spread,
    "all equal": all_equal,
    "no throughput": emptied([name for name in EMPTIED if name.startswith("throughput")]),
    "no latency": emptied([name for name in FIGURES_OF_A_TRIAL if name.endswith("_s")]),
    "dense": filled("top_k", 0),
    "no token routed": lambda scene: replace(
        scene, activations=scene.activations.with_columns(tokens=pl.lit(0, dtype=pl.Int64))
    ),
}


@pytest.mark.parametrize("change", SINGLE.values(), ids=SINGLE)
def test_the_usual_gaps_in_every_figure(change: Change) -> None:
    with debug_mode(False):
        for name, figure in DRAWN.items():
            read(figure, change(SCENES[name]), drawn=change is SINGLE["all out of memory"])


@pytest.mark.slow
@pytest.mark.parametrize("column", EMPTIED)
def test_no_single_column_is_taken_for_granted(column: str) -> None:
    with debug_mode(False):
        for name, figure in DRAWN.items():
            scene = SCENES[name]
            usual = read(figure, scene, drawn=False)
            whole = emptied([column])(scene)
            if not whole.records.equals(scene.records):
                read(figure, whole, drawn=True, unlike=usual)
                read(figure, emptied([column], 0b0101010101010101)(scene), drawn=False)
            if column in ABOVE_ZERO:
                read(figure, filled(column, 0.0)(scene), drawn=False)


@given(name=st.sampled_from(sorted(SCENES)), made=changes)
@settings(unhurried, max_examples=20)
def test_the_table_of_records_has_a_row_for_each(name: str, made: list[Change]) -> None:
    frame = changed(SCENES[name], made).loaded().collect()
    paper = Console(file=io.StringIO(), width=1000)
    if len(frame):
        table = records_table(frame)
        assert table.row_count == len(frame)
        paper.print(table, *reasons(frame))
    paper.print(summary(frame))
    assert isinstance(paper.file, io.StringIO)
    assert not re.search(r"\bnan\b|\binf\b", paper.file.getvalue())
    _sound(frame)
    json.dumps(frame.drop("started_at", "finished_at").to_dicts(), allow_nan=False)


@given(name=st.sampled_from(sorted(SCENES)), made=changes, again=changes)
@settings(unhurried, max_examples=20)
def test_a_replay_is_told_whatever_either_record_lacks(
    name: str, made: list[Change], again: list[Change]
) -> None:
    sides = [changed(SCENES[name], one).loaded().collect() for one in (made, again)]
    if any(side.is_empty() for side in sides):
        return
    record, replay = (
        Made(record=side.row(0, named=True), dataset=Path("d"), run={}, companions=None)
        for side in sides
    )
    facts = replay_facts(record, replay, status=0)
    json.dumps(facts, allow_nan=False)
    assert replay_table(facts).row_count
    assert all(map(_readable, sentences(facts)))


def test_one_output_token_has_no_time_between_tokens() -> None:
    """Version 0.1.0 wrote 0.0, or what noise left, and Figure 3 divided by it."""
    scene = filled("output_tokens", 1)(filled("itl_paper_s", 0.0)(SCENES["latency"]))
    frame = read(DRAWN["latency"], scene, drawn=True)
    assert frame is not None
    for column in ("itl_paper_s", "itl_s"):
        assert frame.get_column(column).null_count() == len(frame)
    assert frame.get_column("e2e_s").null_count() == 0
    sentence = find("fig3").insight(frame)
    assert "shortest time to first token" in sentence and "inter-token" not in sentence
    (pivot,) = find("fig3").pivots(frame)
    assert {row[2] for row in pivot.rows} == {"no value"}


def test_equal_models_have_no_rank() -> None:
    """A correlation of equal values is no number."""
    frame = read(DRAWN["latency"], all_equal(SCENES["latency"]), drawn=False)
    assert frame is not None and "rank alike" not in find("fig3").insight(frame)


def test_a_share_without_its_kind_is_not_taken_for_unpruned() -> None:
    scene = emptied(["prune_ratio"], 0b100)(SCENES["pruning"])
    frame = read(DRAWN["pruning"], scene, drawn=False)
    lost = SCENES["pruning"].records.row(2, named=True)
    assert lost["prune_kind"] == "inter"
    assert frame is not None and lost["trial_id"] not in frame.get_column("trial_id").to_list()
