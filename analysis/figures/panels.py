"""Lines with intervals in panels, and a strip under each axis for points without a value.

A point that ran out of memory is a result, so it has a place: a strip below zero with a
row per line, named on the axis. There the marks of several lines at one x stand under
each other, not on top of each other, and none is taken for a low throughput. Lines differ
in shape and colour, and the colours also in lightness, so that the picture survives a
grey printer and every kind of colour vision.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from analysis.conditions import constant
from analysis.disturbed import RING
from analysis.figures.logarithm import doublings
from analysis.figures.style import FAINT, INK, LETTERS, caption, styled
from analysis.insights import MISSING, feasible
from analysis.keys import Axes, Key
from analysis.subtitle import subtitle
from analysis.tuned import MARK as UNTUNED

_WIDTH, _HEIGHT = 350, 220
"""A panel above zero, in pixels."""
_ROW, _GAP = 16, 8
"""A row of the strip, and the space above the first, in pixels."""
_DODGE = 5
"""Pixels between the bars of neighbouring lines at one x."""
_SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross"]
MARKS = {"oom": "×", "skipped": "○", "unsupported": "–", "timeout": "?", "crashed": "!", "ok": "·"}
"""What stands in the strip, by outcome."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """The y axis: tokens per second above zero, the strip's rows below."""

    top: float
    ticks: list[float]
    """Round numbers from zero up."""
    rows: tuple[Any, ...]
    """Lines with at least one point to mark, in order."""

    @classmethod
    def of(cls, drawn: pl.DataFrame, line: Key) -> _Scale:
        ends = drawn.select(pl.max_horizontal("throughput_tok_s", "throughput_tok_s_ci_high").max())
        missing = drawn.filter(pl.col("throughput_tok_s").is_null()).get_column(line.column)
        highest = ends.item()
        top = 1.05 * (highest or 1.0)
        ticks = _ticks(top) if highest else [0.0]
        return cls(top=top, ticks=ticks, rows=tuple(missing.unique().sort()))

    @property
    def height(self) -> float:
        """Panel height in pixels."""
        return _HEIGHT + self._depth(len(self.rows))

    @property
    def floor(self) -> float:
        """Lower end of the axis."""
        return -self._depth(len(self.rows)) * self._pixel

    def places(self) -> dict[Any, float]:
        """Middle of each line's row."""
        return {
            line: -self._depth(index + 0.5) * self._pixel for index, line in enumerate(self.rows)
        }

    def _depth(self, rows: float) -> float:
        """Pixels from zero down to the end of that many rows."""
        return _GAP + _ROW * rows if self.rows else 0

    @property
    def _pixel(self) -> float:
        """Tokens per second in one pixel."""
        return self.top / _HEIGHT

    def axis(self, line: Key) -> alt.Axis:
        """Round numbers above zero, names of lines below."""
        names = json.dumps([line.label(value) for value in self.rows])
        row = f"floor((-datum.value / {self._pixel} - {_GAP}) / {_ROW})"
        return alt.Axis(
            values=[*self.places().values(), *self.ticks],
            labelExpr=f"datum.value < 0 ? {names}[{row}] : format(datum.value, ',~f')",
            ticks=False,
            labelPadding=6,
            labelOverlap=False,
            grid=True,
        )


def draw(frame: pl.DataFrame, *, axes: Axes, title: str, insight: str) -> alt.VConcatChart:
    """The chart of a prepared frame (see `analysis.figures.scaling.prepare`)."""
    drawn = feasible(frame)
    scale = _Scale.of(drawn, axes.line)
    panels = drawn.get_column(axes.panel.column).n_unique()
    columns = min(panels, 2 if panels <= 4 else 3)
    before, _, after = axes.panel.phrase.partition("{}")
    header = alt.Header(labelExpr=f"'{before}' + datum.value + '{after}'")
    data = drawn.with_columns(
        mark=pl.when(pl.col("throughput_tok_s").is_null()).then(
            pl.col("outcome").replace_strict(MARKS, default=None)
        ),
        strip=pl.col(axes.line.column).replace_strict(scale.places(), default=None),
        beside=_beside(drawn, axes),
    )
    note = caption([insight, _explanation(drawn)], LETTERS * max(columns, 2))
    facets = (
        _panel(drawn, axes, scale)
        .facet(
            facet=alt.Facet(f"{axes.panel.column}:O", title=None, header=header),
            columns=columns,
            data=alt.InlineData(values=data.to_dicts()),
            title=note,
        )
        .resolve_axis(x="independent", y="independent")
    )
    head = alt.TitleParams(title, subtitle=subtitle(drawn))
    return styled(alt.vconcat(facets, title=head, description=f"{title}. {insight}"))


def _panel(drawn: pl.DataFrame, axes: Axes, scale: _Scale) -> alt.LayerChart:
    predicted = constant(drawn, "source") == "predicted"
    title = "Predicted throughput (tokens/s)" if predicted else "Throughput (tokens/s)"
    y: dict[str, Any] = {
        "title": title,
        "scale": alt.Scale(domain=[scale.floor, scale.top], nice=False),
        "axis": scale.axis(axes.line),
    }
    lines = drawn.get_column(axes.line.column).unique().sort().to_list()
    line: dict[str, Any] = {"shorthand": f"{axes.line.column}:O", "title": axes.line.title}
    colours = alt.Scale(domain=lines, scheme=alt.SchemeParams(name="viridis", extent=[0, 0.85]))
    x = _x(drawn, axes.x)
    colour = alt.Color(**line, scale=colours)
    base = alt.Chart().encode(x=alt.X("beside:Q", **x), color=colour, tooltip=_tooltip(drawn, axes))
    points = base.transform_filter("isValid(datum.throughput_tok_s)").encode(
        y=alt.Y("throughput_tok_s:Q", **y)
    )
    layers = [
        alt.Chart()
        .transform_aggregate(points="count()")
        .mark_rect(color=FAINT, tooltip=None)
        .encode(y=alt.YDatum(scale.floor, **y), y2=alt.Y2Datum(0)),
        # Points without a value stay in: a line breaks there.
        base.mark_line(strokeWidth=1.8, tooltip=None).encode(y=alt.Y("throughput_tok_s:Q", **y)),
        points.transform_filter("isValid(datum.throughput_tok_s_ci_low)")
        .mark_errorbar(ticks=alt.MarkConfig(width=7), thickness=1.4)
        .encode(y=alt.Y("throughput_tok_s_ci_low:Q", **y), y2="throughput_tok_s_ci_high:Q"),
        points.mark_point(filled=True, size=62, opacity=1).encode(
            shape=alt.Shape(**line, scale=alt.Scale(domain=lines, range=_SHAPES))
        ),
        points.transform_filter("datum.disturbed")
        .mark_point(shape="circle", filled=False, size=210, strokeWidth=1.6)
        .encode(color=alt.value(RING)),
        points.transform_filter("datum.untuned")
        .mark_text(text=UNTUNED, dx=9, dy=7, fontSize=13, tooltip=None)
        .encode(color=alt.value(INK)),
        base.transform_filter("isValid(datum.mark)")
        .mark_text(fontSize=14, fontWeight="bold")
        .encode(x=alt.X(f"{axes.x.column}:Q", **x), y=alt.Y("strip:Q", **y), text="mark:N"),
    ]
    return alt.LayerChart(layer=layers, width=_WIDTH, height=scale.height)


def _x(drawn: pl.DataFrame, key: Key) -> dict[str, Any]:
    """Axis by doublings, with a tick at each value that was run."""
    low, high = _domain(drawn, key)
    values = drawn.get_column(key.column).unique().sort().to_list()
    return {
        "title": key.title,
        "scale": doublings(low, high),
        "axis": alt.Axis(values=values, format="d", grid=False),
    }


def _domain(drawn: pl.DataFrame, key: Key) -> tuple[float, float]:
    """Ends of the x axis, with a margin for the outer points."""
    values = drawn.get_column(key.column).unique().sort().to_list()
    span = values[-1] / max(values[0], 1)
    margin = span**0.08 if span > 1 else 1.5
    return values[0] / margin, max(values[-1], 1) * margin


def _beside(drawn: pl.DataFrame, axes: Axes) -> pl.Expr:
    """x shifted by some pixels per line, so that bars at one x stand side by side."""
    low, high = _domain(drawn, axes.x)
    lines = drawn.get_column(axes.line.column).unique().sort().to_list()
    middle = (len(lines) - 1) / 2
    shift = {
        line: (high / max(low, 1)) ** ((index - middle) * _DODGE / _WIDTH)
        for index, line in enumerate(lines)
    }
    return pl.col(axes.x.column) * pl.col(axes.line.column).replace_strict(shift)


def _tooltip(drawn: pl.DataFrame, axes: Axes) -> list[alt.Tooltip]:
    rows = [
        *(
            (f"{key.column}:Q", key.title, "d")
            if drawn.schema[key.column].is_integer()
            else (f"{key.column}:N", key.title, "")
            for key in (axes.x, axes.panel, axes.line)
        ),
        ("outcome:N", "Outcome", ""),
        ("outcome_reason:N", "Reason", ""),
        ("throughput_tok_s:Q", "Tokens/s", ",.1f"),
        ("throughput_tok_s_ci_low:Q", "Interval from", ",.1f"),
        ("throughput_tok_s_ci_high:Q", "to", ",.1f"),
        ("active_share:Q", "Parameters active", ".1%"),
        ("disturbed:N", "Disturbed", ""),
        ("trial_id:N", "Trial", ""),
    ]
    return [alt.Tooltip(field, title=title, format=form) for field, title, form in rows]


def _explanation(drawn: pl.DataFrame) -> str:
    """What points, bars and marks are, as far as there are any."""
    outcomes = set(drawn.filter(pl.col("throughput_tok_s").is_null()).get_column("outcome"))
    words = MISSING | {"oom": "out of memory (OOM)"}
    dominated = drawn.filter(pl.col("outcome") == "skipped").get_column("out_of_memory")
    if dominated.all():
        words |= {"skipped": "skipped, since a trial that needs no more memory ran out of it"}
    marks = [f"{MARKS[name]} {word}" for name, word in words.items() if name in outcomes]
    points = ""
    if drawn.get_column("throughput_tok_s").count():
        repeats = constant(drawn, "repeats")
        points = "Points are medians" + (f" of {repeats} repeats" if repeats else "")
    if constant(drawn, "source") == "predicted":
        points = "Points are predictions"
    if drawn.get_column("throughput_tok_s_ci_low").count():
        level = constant(drawn, "ci_level")
        cover = f"{100 * level:.3g} % " if isinstance(level, float) else ""
        points += f", bars their {cover}confidence intervals"
    return f"{points}. Below the axis: {'; '.join(marks)}." if marks else f"{points}."


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to `top`, four to eight of them."""
    unit = 10 ** math.floor(math.log10(top))
    step = next(
        step for share in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if top / (step := share * unit) < 8
    )
    return [index * step for index in range(math.floor(top / step) + 1)]
