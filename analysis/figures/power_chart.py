"""Devices as points over two logarithmic axes, models as horizontal lines across them."""

from __future__ import annotations

import altair as alt
import polars as pl

from analysis.figures.labels import apart, place
from analysis.figures.logarithm import Log
from analysis.figures.style import INK, LETTERS, PALETTE, caption, styled

_WIDTH, _HEIGHT = 720, 520
_LINE = 14
"""Least distance between the names of two lines, in pixels."""


def draw(frame: pl.DataFrame, *, title: str, conditions: str, insight: str) -> alt.VConcatChart:
    """The chart of a prepared frame (see `analysis.figures.power.prepare`)."""
    devices = frame.filter((pl.col("kind") == "device") & pl.col("power_w").is_not_null())
    needs = frame.filter(pl.col("kind") == "model").sort("bandwidth_gb_s", descending=True)
    bandwidths = frame.get_column("bandwidth_gb_s").to_list()
    powers = devices.get_column("power_w").to_list() or [100.0]
    across = Log(low=min(powers) / 1.5, high=max(powers) * 1.9, pixels=_WIDTH)
    up = Log(low=min(bandwidths) / 1.5, high=max(bandwidths) * 1.5, pixels=_HEIGHT)
    x = alt.X(
        "power_w:Q",
        title="Power (W, logarithmic)",
        scale=across.scale(),
        axis=alt.Axis(format=",d", values=across.ticks(), grid=False),
    )
    y = alt.Y(
        "bandwidth_gb_s:Q",
        title="Peak memory bandwidth (GB/s, logarithmic)",
        scale=up.scale(),
        axis=alt.Axis(format=",d", values=up.ticks()),
    )
    layers = [*_lines(needs, up, y), *_points(devices, needs, across, up, x, y)]
    chart = alt.LayerChart(
        layer=layers, width=_WIDTH, height=_HEIGHT, title=caption([insight], int(1.9 * LETTERS))
    )
    head = alt.TitleParams(
        title,
        subtitle=[
            "Computed from structure and data sheets, not measured",
            f"Lines: {conditions}. Open points: peaks not verified",
        ],
    )
    return styled(alt.vconcat(chart, title=head, description=f"{title}. {insight}"))


def _lines(needs: pl.DataFrame, up: Log, y: alt.Y) -> list[alt.Chart]:
    if needs.is_empty():
        return []
    models = needs.get_column("name").unique(maintain_order=True).sort().to_list()
    heights = [up.pixel(value) for value in needs.get_column("bandwidth_gb_s")]
    drawn = needs.with_columns(
        label=pl.format(
            "{}, {}: {}",
            "name",
            "activation",
            pl.col("bandwidth_gb_s").map_elements(lambda n: f"{n:,.0f}", return_dtype=pl.String),
        ),
        label_y=pl.Series([up.value(height) for height in apart(heights, _LINE)]),
    )
    base = alt.Chart(alt.InlineData(values=drawn.to_dicts())).encode(
        color=alt.Color(
            "name:N", scale=alt.Scale(domain=models, range=list(_colours(models))), legend=None
        ),
        tooltip=[
            alt.Tooltip("name:N", title="Model"),
            alt.Tooltip("activation:N", title="Activation"),
            alt.Tooltip("bandwidth_gb_s:Q", title="Needed, GB/s", format=",.0f"),
            alt.Tooltip("read_gb:Q", title="Read per token, GB", format=",.2f"),
        ],
    )
    dash = alt.StrokeDash(
        "activation:N",
        title="Lines",
        legend=alt.Legend(symbolSize=500),
        scale=alt.Scale(domain=["batch 1", "every expert"], range=[[5, 4], [1, 0]]),
    )
    return [
        base.mark_rule(strokeWidth=1.6).encode(y=y, strokeDash=dash),
        base.mark_text(align="left", fontSize=11.5, tooltip=None).encode(
            x=alt.value(_WIDTH + 8), y=alt.Y("label_y:Q", scale=up.scale()), text="label:N"
        ),
    ]


def _points(
    devices: pl.DataFrame, needs: pl.DataFrame, across: Log, up: Log, x: alt.X, y: alt.Y
) -> list[alt.Chart]:
    pixels = [
        (across.pixel(power), _HEIGHT - up.pixel(bandwidth))
        for power, bandwidth in devices.select("power_w", "bandwidth_gb_s").iter_rows()
    ]
    places = place(
        pixels,
        devices.get_column("name").to_list(),
        width=_WIDTH,
        height=_HEIGHT,
        lines=[_HEIGHT - up.pixel(value) for value in needs.get_column("bandwidth_gb_s")],
    )
    drawn = devices.with_columns(
        label_x=pl.Series([across.value(one.x) for one in places], dtype=pl.Float64),
        label_y=pl.Series([up.value(_HEIGHT - one.y) for one in places], dtype=pl.Float64),
        far=pl.Series([one.far for one in places], dtype=pl.Boolean),
    )
    base = alt.Chart(alt.InlineData(values=drawn.to_dicts()))
    label_x, label_y = (
        alt.X("label_x:Q", scale=across.scale()),
        alt.Y("label_y:Q", scale=up.scale()),
    )
    return [
        base.transform_filter("datum.far")
        .mark_rule(color="#bbbbbb", strokeWidth=0.8, tooltip=None)
        .encode(x=x, y=y, x2="label_x:Q", y2="label_y:Q"),
        base.mark_point(size=46, color=INK, fill=INK, opacity=1, strokeWidth=1.4).encode(
            x=x,
            y=y,
            fillOpacity=alt.FillOpacity(
                "verified:N",
                scale=alt.Scale(domain=[True, False], range=[1, 0]),
                legend=None,
            ),
            tooltip=[
                alt.Tooltip("name:N", title="Device"),
                alt.Tooltip("bandwidth_gb_s:Q", title="GB/s", format=",.1f"),
                alt.Tooltip("power_w:Q", title="W", format=",.0f"),
            ],
        ),
        # White below the letters, so that a line that passes does not cross them out.
        base.mark_text(fontSize=10.5, stroke="white", strokeWidth=3, tooltip=None).encode(
            x=label_x, y=label_y, text="name:N"
        ),
        base.mark_text(fontSize=10.5, color=INK, tooltip=None).encode(
            x=label_x, y=label_y, text="name:N"
        ),
    ]


def _colours(models: list[str]) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(len(models))]
