"""Two panels over the batch size: share of parameters, and bandwidth with the devices' peaks."""

from __future__ import annotations

import altair as alt
import polars as pl

from analysis.figures.labels import apart
from analysis.figures.logarithm import Log
from analysis.figures.style import INK, LETTERS, PALETTE, caption, styled

_WIDTH, _HEIGHT = 380, 300
_SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross"]


def draw(frame: pl.DataFrame, *, title: str, conditions: str, insight: str) -> alt.VConcatChart:
    """The chart of a prepared frame (see `analysis.figures.sparsity.prepare`)."""
    models = frame.filter(pl.col("kind") == "model").get_column("name")
    names = models.unique(maintain_order=True).to_list()
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
    shapes = [_SHAPES[index % len(_SHAPES)] for index in range(len(names))]
    colour = alt.Color(
        "name:N", scale=alt.Scale(domain=names, range=colours), sort=names, title=None
    )
    shape = alt.Shape("name:N", scale=alt.Scale(domain=names, range=shapes), sort=names, title=None)
    panels = alt.hconcat(
        _shares(frame, colour, shape), _bandwidths(frame, colour, shape), spacing=36
    )
    panels = panels.properties(title=caption([insight], 2 * LETTERS))
    subtitle = [
        "Computed from structure and data sheets, not measured",
        "Experts as under uniform routing, an upper bound for independent tokens"
        + ("; open marks: traced by the paper" if "paper" in set(frame["kind"]) else ""),
        f"Bandwidth: {conditions}",
    ]
    head = alt.TitleParams(title, subtitle=subtitle)
    return styled(alt.vconcat(panels, title=head, description=f"{title}. {insight}"))


def _shares(frame: pl.DataFrame, colour: alt.Color, shape: alt.Shape) -> alt.LayerChart:
    y = alt.Y(
        "share:Q",
        title="Share of parameters activated",
        scale=alt.Scale(domain=[0, 1], nice=False),
        axis=alt.Axis(format="%"),
    )
    base, paper = (
        alt.Chart(alt.InlineData(values=frame.filter(pl.col("kind") == kind).to_dicts())).encode(
            x=_x(frame), y=y, color=colour, tooltip=_tooltip("share:Q", "Share", ".2%")
        )
        for kind in ("model", "paper")
    )
    layers = [
        base.mark_line(strokeWidth=1.8, tooltip=None),
        base.mark_point(filled=True, size=48, opacity=1).encode(shape=shape),
        paper.mark_point(filled=False, size=90, strokeWidth=2, opacity=1).encode(shape=shape),
    ]
    return alt.LayerChart(layer=layers, width=_WIDTH, height=_HEIGHT)


def _bandwidths(frame: pl.DataFrame, colour: alt.Color, shape: alt.Shape) -> alt.LayerChart:
    devices = frame.filter(pl.col("kind") == "device")
    values = frame.get_column("bandwidth_gb_s").drop_nulls().to_list()
    up = Log(low=min(values) / 1.3, high=max(values) * 1.3, pixels=_HEIGHT)
    y = alt.Y(
        "bandwidth_gb_s:Q",
        title="Bandwidth (GB/s, logarithmic)",
        scale=up.scale(),
        axis=alt.Axis(format=",~r", values=up.ticks()),
    )
    base = alt.Chart(
        alt.InlineData(values=frame.filter(pl.col("kind") == "model").to_dicts())
    ).encode(x=_x(frame), y=y, color=colour, tooltip=_tooltip("bandwidth_gb_s:Q", "GB/s", ",.1f"))
    heights = apart([up.pixel(value) for value in devices.get_column("bandwidth_gb_s")], 14)
    placed = devices.with_columns(label_y=pl.Series([up.value(one) for one in heights]))
    peaks = alt.Chart(alt.InlineData(values=placed.to_dicts()))
    layers = [
        peaks.mark_rule(color="#888888", strokeDash=[5, 4]).encode(
            y=y, tooltip=_tooltip("bandwidth_gb_s:Q", "Peak, GB/s", ",.1f")[::2]
        ),
        peaks.mark_text(align="left", color=INK, fontSize=11.5, tooltip=None).encode(
            x=alt.value(_WIDTH + 6), y=alt.Y("label_y:Q", scale=up.scale()), text="name:N"
        ),
        base.mark_line(strokeWidth=1.8, tooltip=None),
        base.mark_point(filled=True, size=48, opacity=1).encode(shape=shape),
    ]
    return alt.LayerChart(layer=layers, width=_WIDTH, height=_HEIGHT)


def _x(frame: pl.DataFrame) -> alt.X:
    batches = frame.get_column("batch").drop_nulls().unique().sort().to_list()
    return alt.X(
        "batch:Q",
        title="Batch size (sequences decoded together)",
        scale=alt.Scale(
            type="log", base=2, domain=[batches[0] / 1.3, batches[-1] * 1.3], nice=False
        ),
        axis=alt.Axis(values=batches, format="d", grid=False),
    )


def _tooltip(field: str, title: str, form: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="Name"),
        alt.Tooltip("batch:Q", title="Batch"),
        alt.Tooltip(field, title=title, format=form),
    ]
