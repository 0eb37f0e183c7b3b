"""Bars of models in panels beside each other, each with an axis of its own.

Models keep their order and colour in every panel, so a bar is found again. One that has no value
keeps its place, with what became of it written there.
"""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import polars as pl

from analysis.conditions import constant
from analysis.figures.style import INK, LETTERS, PALETTE, caption, styled
from analysis.insights import MISSING
from analysis.marks import MARKS
from analysis.subtitle import subtitle

_WIDTH, _BAR = 250, 34
"""A panel's width and a bar's room, in pixels."""


def draw(
    frame: pl.DataFrame, *, title: str, metrics: Mapping[str, tuple[str, float]], insight: str
) -> alt.VConcatChart:
    """The chart of a frame with a row per model.

    `metrics` are columns, in seconds, with the title of their axis and its units in a second. A
    column has an interval where the frame has it with `_ci_low` and `_ci_high`.
    """
    models = frame.get_column("model").to_list()
    panels = [
        _panel(frame, models, column, words, units, first=at == 0)
        for at, (column, (words, units)) in enumerate(metrics.items())
    ]
    lines = subtitle(frame)
    predicted = constant(frame, "source") == "predicted"
    repeats = constant(frame, "repeats")
    what = "Bars are predictions" if predicted else "Bars are medians"
    if repeats and not predicted:
        what += f" of {repeats} repeats"
    level = constant(frame, "ci_level")
    if isinstance(level, float):
        what += f", with the {100 * level:.3g} % confidence interval of the end-to-end time"
    body = alt.hconcat(*panels, spacing=24, title=caption([insight, f"{what}."], LETTERS * 2 - 20))
    head = alt.TitleParams(title, subtitle=lines)
    return styled(alt.vconcat(body, title=head, description=f"{title}. {insight}"))


def _panel(
    frame: pl.DataFrame, models: list[str], column: str, words: str, units: float, *, first: bool
) -> alt.LayerChart:
    low, high = f"{column}_ci_low", f"{column}_ci_high"
    bars = low in frame.columns
    rows = frame.select(
        "model",
        value=pl.col(column) * units,
        low=pl.col(low) * units if bars else pl.lit(None, dtype=pl.Float64),
        high=pl.col(high) * units if bars else pl.lit(None, dtype=pl.Float64),
        told=pl.when(pl.col(column).is_null()).then(pl.col("outcome").replace(MISSING)),
        mark=MARKS,
        trial="trial_id",
    )
    rows = rows.with_columns(end=pl.max_horizontal("value", "high"))
    top = rows.select(pl.col("end").max()).item() or 1.0
    base = alt.Chart(alt.InlineData(values=rows.to_dicts())).encode(
        y=alt.Y(
            "model:N",
            sort=models,
            title=None,
            axis=alt.Axis(labels=first, ticks=False, domain=False, labelLimit=0),
        )
    )
    x = alt.X(
        "value:Q",
        title=words,
        scale=alt.Scale(domain=[0, top * 1.22], nice=False),
        axis=alt.Axis(tickCount=4, format=",~f"),
    )
    colours = alt.Scale(
        domain=models, range=[PALETTE[n % len(PALETTE)] for n in range(len(models))]
    )
    return alt.LayerChart(
        layer=[
            base.mark_bar(height=_BAR - 12).encode(
                x=x,
                color=alt.Color("model:N", scale=colours, legend=None),
                tooltip=[
                    alt.Tooltip("model:N", title="Model"),
                    alt.Tooltip("value:Q", title=words, format=".4~g"),
                    alt.Tooltip("low:Q", title="Interval from", format=".4~g"),
                    alt.Tooltip("high:Q", title="to", format=".4~g"),
                    alt.Tooltip("trial:N", title="Trial"),
                ],
            ),
            base.transform_filter("isValid(datum.low)")
            .mark_rule(color=INK, tooltip=None)
            .encode(x=alt.X("low:Q", title=words), x2="high:Q"),
            base.transform_filter("isValid(datum.value)")
            .mark_text(align="left", dx=5, fontSize=11, color=INK, tooltip=None)
            .encode(x=alt.X("end:Q", title=words), text=alt.Text("value:Q", format=",.3~r")),
            base.transform_filter("isValid(datum.value) && isValid(datum.mark)")
            .mark_text(align="right", dx=-4, fontSize=15, color=INK, tooltip=None)
            .encode(x=alt.X("value:Q", title=words), text="mark:N"),
            base.transform_filter("isValid(datum.told)")
            .mark_text(align="left", dx=4, color=INK, tooltip=None)
            .encode(x=alt.XDatum(0), text="told:N"),
        ],
        width=_WIDTH,
        height=_BAR * len(models),
    )
