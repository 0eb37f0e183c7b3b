"""Stacked bars: one layer of each kind beside the whole model, all parameters and active ones.

Bars start at zero and are as long as there are parameters, so that sparsity is a length; the
two columns have scales of their own, since a layer is a fraction of a model.
"""

from __future__ import annotations

import altair as alt
import polars as pl

from analysis.breakdown import OUTSIDE, PARTS
from analysis.figures.style import INK, LETTERS, PALETTE, caption, styled

_WIDTH, _BAR = 330, 26
"""A panel, and the height of one bar with its gap, in pixels."""
_ROOM = 1.22
"""Space beyond the longest bar, for its number."""

_COLOURS = dict(zip(PARTS, (PALETTE[index] for index in (0, 1, 2, 6, 7, 5, 4, 3)), strict=True))
"""A part looks the same whatever parts a model has; neighbours differ in lightness."""


def draw(frame: pl.DataFrame, *, title: str, insight: str) -> alt.VConcatChart:
    """The chart of a prepared frame (see `analysis.breakdown.breakdown`)."""
    parts = [part for part in PARTS if part in set(frame.get_column("part"))]
    rows = []
    for (model,), one in frame.group_by("model", maintain_order=True):
        each = pl.when(pl.col("count") > 1).then(pl.lit(", each: ")).otherwise(pl.lit(": "))
        layer = _long(one.filter(pl.col("layers") != OUTSIDE), pl.col("layers") + each, 1)
        whole = _long(one, pl.lit("whole model: "), pl.col("count"))
        panels = [_panel(data, parts) for data in (layer, whole)]
        rows.append(alt.hconcat(*panels, title=alt.TitleParams(str(model), fontSize=14, offset=6)))
    note = caption([insight], 2 * LETTERS)
    head = alt.TitleParams(title, subtitle="Counted from the models' configurations, not measured")
    body = alt.vconcat(*rows, title=note, spacing=18)
    return styled(alt.vconcat(body, title=head, description=f"{title}. {insight}"))


def _long(rows: pl.DataFrame, bar: pl.Expr, factor: pl.Expr | int) -> pl.DataFrame:
    """A row per bar and part: `bar`, `part`, `params`, in the order of the frame."""
    uses = {"params_total": "all", "params_active": "active"}
    return (
        rows.with_columns(bar=bar)
        .with_columns(pl.col(list(uses)) * factor)
        .unpivot(list(uses), index=["bar", "part"], variable_name="use", value_name="params")
        .with_columns(bar=pl.col("bar") + pl.col("use").replace_strict(uses))
        .group_by("bar", "part", maintain_order=True)
        .agg(pl.col("params").sum())
    )


def _panel(data: pl.DataFrame, parts: list[str]) -> alt.LayerChart:
    bars = data.get_column("bar").unique(maintain_order=True).sort().to_list()
    bars.sort(key=lambda name: (name.rpartition(": ")[0], name.endswith("active")))
    sums = data.group_by("bar").agg(pl.col("params").sum())
    longest = sums.get_column("params").max()
    assert isinstance(longest, int)
    y = alt.Y("bar:N", sort=bars, title=None, axis=alt.Axis(labelLimit=260, ticks=False))
    scale = alt.Scale(domain=[0, longest * _ROOM], nice=False)
    axis = alt.Axis(format="~s", tickCount=4, labelExpr="replace(datum.label, 'G', 'B')")
    order = {part: index for index, part in enumerate(parts)}
    drawn = data.with_columns(order=pl.col("part").replace_strict(order))
    colour = alt.Color(
        "part:N",
        title=None,
        scale=alt.Scale(domain=parts, range=[_COLOURS[part] for part in parts]),
        sort=parts,
    )
    stacked = (
        alt.Chart(alt.InlineData(values=drawn.to_dicts()))
        .mark_bar(height=_BAR - 8)
        .encode(
            x=alt.X("params:Q", title="Parameters", axis=axis, scale=scale),
            y=y,
            color=colour,
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("part:N", title="Part"),
                alt.Tooltip("bar:N", title="Of"),
                alt.Tooltip("params:Q", title="Parameters", format=","),
            ],
        )
    )
    ends = sums.with_columns(label=pl.col("params").map_elements(_short, return_dtype=pl.String))
    numbers = (
        alt.Chart(alt.InlineData(values=ends.to_dicts()))
        .mark_text(align="left", dx=5, color=INK, fontSize=11.5, tooltip=None)
        .encode(x=alt.X("params:Q", scale=scale), y=y, text="label:N")
    )
    return alt.LayerChart(layer=[stacked, numbers], width=_WIDTH, height=_BAR * len(bars))


def _short(params: int) -> str:
    return f"{params / 1e9:,.2f} B" if params >= 1e9 else f"{params / 1e6:,.1f} M"
