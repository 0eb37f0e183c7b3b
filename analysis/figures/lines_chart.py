"""Lines of series in panels: colour and shape tell lines apart, dashes a second thing.

For figures whose lines have names without an order. One long frame is drawn: `panel`, `line`,
`dash`, `x`, `y`, `low` and `high` where points have intervals, `label` where they have words
beside them, `ring` where a disturbed record is to be marked, and `untuned` where an untuned one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import polars as pl

from analysis.disturbed import RING
from analysis.errors import SelectionError
from analysis.figures.logarithm import doublings
from analysis.figures.style import INK, LETTERS, PALETTE, caption, styled
from analysis.tuned import MARK as UNTUNED

_WIDTH, _HEIGHT = 400, 220
_ALONE = 640, 300
"""Width and height of a panel, and of the only one."""
_SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross"]
_DASHES = [[1, 0], [5, 4], [2, 2]]
_MOST_TICKS = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of all panels."""

    title: str
    form: str = ""
    """How numbers are written, in d3's words."""
    doublings: bool = False
    """Logarithmic to base 2, with a tick at each value that was run."""
    whole: bool = False
    """Whole numbers, a tick at each as far as there is room."""
    low: float | None = 0.0
    """Where it begins; null: near the lowest value."""
    top: float | None = None
    """Where it ends at least; null: at the highest value."""


def draw(
    frame: pl.DataFrame,
    *,
    title: str,
    subtitle: Sequence[str],
    notes: Sequence[str],
    x: Axis,
    y: Axis,
    shared: bool = True,
    lines: str | None = None,
    dashes: str | None = None,
    marked: str | None = None,
) -> alt.VConcatChart:
    """The chart of a long frame; `shared` gives all panels one y axis.

    `lines` and `dashes` are the titles of the legends; a null one has none. Only lines of the
    dash `marked` have points; where it is null, all have.

    Raises:
        SelectionError: no point has a value.
    """
    if frame.drop_nulls(["x", "y"]).is_empty():
        raise SelectionError(f"no point has a value to draw. {notes[0]}")
    panels = frame.get_column("panel").unique(maintain_order=True).to_list()
    columns = 1 if len(panels) == 1 else 2
    several = len(panels) > 1
    charts = [_panel(frame, name, x, y, shared, lines, dashes, several, marked) for name in panels]
    rows = [
        alt.hconcat(*charts[at : at + columns], spacing=28) for at in range(0, len(charts), columns)
    ]
    body = alt.vconcat(*rows, title=caption(notes, LETTERS * 2 if several else 100), spacing=18)
    head = alt.TitleParams(title, subtitle=list(subtitle))
    return styled(alt.vconcat(body, title=head, description=f"{title}. {notes[0]}"))


def _panel(
    frame: pl.DataFrame,
    name: str,
    x: Axis,
    y: Axis,
    shared: bool,
    lines: str | None,
    dashes: str | None,
    titled: bool,
    marked: str | None,
) -> alt.LayerChart:
    rows = frame.filter(pl.col("panel") == name)
    names = frame.get_column("line").unique(maintain_order=True).to_list()
    kinds = frame.get_column("dash").unique(maintain_order=True).to_list()
    colour = alt.Color(
        "line:N",
        title=lines,
        sort=names,
        scale=alt.Scale(domain=names, range=[PALETTE[n % len(PALETTE)] for n in range(len(names))]),
        legend=alt.Legend(
            columns=1 if max(map(len, names)) > 20 and len(kinds) > 1 else 3, labelLimit=0
        )
        if len(names) > 1
        else None,
    )
    shape = alt.Shape(
        "line:N",
        title=lines,
        sort=names,
        scale=alt.Scale(domain=names, range=[_SHAPES[n % len(_SHAPES)] for n in range(len(names))]),
        legend=alt.Legend(
            columns=1 if max(map(len, names)) > 20 and len(kinds) > 1 else 3, labelLimit=0
        )
        if len(names) > 1
        else None,
    )
    dash = alt.StrokeDash(
        "dash:N",
        title=dashes,
        sort=kinds,
        scale=alt.Scale(domain=kinds, range=_DASHES[: len(kinds)]),
        legend=alt.Legend(symbolType="stroke", symbolSize=400) if len(kinds) > 1 else None,
    )
    base = alt.Chart(alt.InlineData(values=rows.to_dicts())).encode(
        x=_x(frame, x),
        y=_y(frame if shared else rows, y, str(name) if titled and not shared else None),
        color=colour,
        detail="dash:N",
        tooltip=[
            alt.Tooltip("line:N", title="Series"),
            *([alt.Tooltip("dash:N", title=dashes or "Kind")] if len(kinds) > 1 else []),
            alt.Tooltip("x:Q", title=x.title),
            alt.Tooltip("y:Q", title=y.title, format=y.form or ",.4~g"),
        ],
    )
    layers = [
        base.mark_line(strokeWidth=1.8, tooltip=None).encode(strokeDash=dash),
        base.transform_filter("isValid(datum.y)")
        .transform_filter(
            alt.FieldOneOfPredicate(field="dash", oneOf=[marked] if marked else kinds)
        )
        .mark_point(filled=True, size=48, opacity=1)
        .encode(shape=shape),
    ]
    if "ring" in frame.columns and frame.get_column("ring").any():
        layers.append(
            base.transform_filter("isValid(datum.y) && datum.ring")
            .mark_point(shape="circle", filled=False, size=190, strokeWidth=1.6)
            .encode(color=alt.value(RING))
        )
    if "untuned" in frame.columns and frame.get_column("untuned").any():
        layers.append(
            base.transform_filter("isValid(datum.y) && datum.untuned")
            .mark_text(text=UNTUNED, dx=9, dy=7, fontSize=13, tooltip=None)
            .encode(color=alt.value(INK))
        )
    if {"low", "high"} <= set(frame.columns):
        layers.insert(
            0,
            base.transform_filter("isValid(datum.low)")
            .mark_rule(strokeWidth=1.2, opacity=0.7)
            .encode(y=alt.Y("low:Q"), y2="high:Q"),
        )
    if "label" in frame.columns:
        layers.append(
            # Slanted, so that names of neighbouring points pass each other.
            base.mark_text(align="left", angle=325, dx=7, dy=-4, fontSize=11, tooltip=None)
            .encode(text="label:N", color=alt.value(INK))
            .transform_filter("isValid(datum.label)")
        )
    head = alt.TitleParams(str(name), fontSize=13, offset=6) if titled and shared else None
    width, height = (_WIDTH, _HEIGHT) if titled else _ALONE
    chart = alt.LayerChart(layer=layers, width=width, height=height)
    return chart.properties(title=head) if head is not None else chart


def _x(frame: pl.DataFrame, axis: Axis) -> alt.X:
    values = frame.get_column("x").drop_nulls().unique().sort().to_list()
    if axis.doublings:
        scale = doublings(values[0] / 1.3, max(values[-1], 1) * 1.3)
        return alt.X("x:Q", title=axis.title, scale=scale, axis=_ticks(values, grid=False))
    low = values[0] if axis.low is None else min(values[0], axis.low)
    share = 0.16 if "label" in frame.columns else 0.06  # room for the names
    margin = share * max(values[-1] - low, abs(values[-1]) / 4, 1e-9)
    start = low - margin if axis.low is None or axis.whole else low
    scale = alt.Scale(domain=[start, values[-1] + margin], nice=False, zero=False)
    if axis.whole:
        return alt.X("x:Q", title=axis.title, scale=scale, axis=_ticks(values, grid=False))
    return alt.X("x:Q", title=axis.title, scale=scale, axis=alt.Axis(format=axis.form, grid=False))


def _ticks(values: list[float], *, grid: bool) -> alt.Axis:
    step = -(-len(values) // _MOST_TICKS)
    return alt.Axis(values=values[::step], format="d", grid=grid)


def _y(rows: pl.DataFrame, axis: Axis, name: str | None) -> alt.Y:
    columns = [name for name in ("y", "high") if name in rows.columns]
    values = [v for name in columns for v in rows.get_column(name).drop_nulls()] or [1.0]
    high = max([*values, *([axis.top] if axis.top is not None else [])])
    high *= 1.15 if "label" in rows.columns else 1  # room for the names
    low = min(values) if axis.low is None else min(axis.low, *values)
    room = 0.06 * (high - low or abs(high) or 1.0)
    ends = [low if axis.low is not None else low - room, high + room]
    return alt.Y(
        "y:Q",
        title=name or axis.title,
        scale=alt.Scale(domain=ends, nice=False, zero=False),
        axis=alt.Axis(format=axis.form) if axis.form else alt.Axis(),
    )
