"""A map per series and phase, layers downwards, experts across, one colour scale for all.

The scale is that of multiples of an even share and starts at zero; its middle tone is an even
share of 1, so that what is used less and what is used more differ in hue, not in shade alone.
"""

from __future__ import annotations

import altair as alt
import polars as pl

from analysis.figures.style import LETTERS, caption, styled
from analysis.traces import PHASES, under_title

_NARROWEST, _WIDEST, _COLUMN = 110, 360, 28
"""Least and most pixels of a map across, and those of an expert."""
_PAGE = 900
"""Pixels across that models stand beside each other in."""
_CELL, _LOWEST, _HIGHEST = 14, 60, 300
"""Pixels of a layer, and the least and most of a map."""
_NONE = "#bbbbbb"
"""Where a layer saw no token."""


def draw(frame: pl.DataFrame, *, title: str, insight: str) -> alt.VConcatChart:
    """The chart of a prepared frame (see `analysis.figures.heatmap.prepare`)."""
    highest = frame.get_column("times_even").max()
    top = max(highest, 2.0) if isinstance(highest, float) else 2.0
    phases = [phase for phase in PHASES if phase in set(frame.get_column("phase"))]
    blocks = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        maps = [_map(one.filter(pl.col("phase") == phase), phase, top) for phase in phases]
        head = alt.TitleParams(str(name), fontSize=14, offset=6)
        blocks.append(alt.hconcat(*maps, title=head, spacing=28))
    experts = frame.get_column("expert").max()
    block = (_width(experts + 1 if isinstance(experts, int) else 1) + 70) * max(len(phases), 1)
    across = max(1, _PAGE // block)
    rows = [
        alt.hconcat(*blocks[at : at + across], spacing=36) for at in range(0, len(blocks), across)
    ]
    note = caption([insight, _explanation()], max(LETTERS, min(across, len(blocks)) * block // 6))
    head = alt.TitleParams(title, subtitle=under_title(frame))
    body = alt.vconcat(*rows, title=note, spacing=20).resolve_scale(color="shared")
    return styled(alt.vconcat(body, title=head, description=f"{title}. {insight}"))


def _map(cells: pl.DataFrame, phase: str, top: float) -> alt.Chart:
    layers = cells.get_column("layer").unique().sort().to_list()
    experts = cells.get_column("expert").unique().sort().to_list()
    height = min(max(_CELL * len(layers), _LOWEST), _HIGHEST)
    drawn = cells.select("layer", "expert", "tokens", "share", "times_even")
    colour = alt.Color(
        "times_even:Q",
        title="Times its even share",
        scale=alt.Scale(
            domain=[0, 0.5, 1, 1 + (top - 1) / 3, top],
            range=["#f7fbff", "#c6dbef", "#6baed6", "#cc6677", "#661122"],
            interpolate="rgb",
        ),
        legend=alt.Legend(gradientLength=260, format=".3~g", values=_stops(top)),
    )
    found: alt.Chart = (
        alt.Chart(
            alt.InlineData(values=drawn.to_dicts()),
            width=_width(len(experts)),
            height=height,
            title=alt.TitleParams(phase, fontSize=12, fontWeight="normal", offset=4),
        )
        .mark_rect()
        .encode(
            x=alt.X(
                "expert:O", title="Expert", axis=_axis(experts, 16), scale=alt.Scale(padding=0)
            ),
            y=alt.Y("layer:O", title="Layer", axis=_axis(layers, 12), scale=alt.Scale(padding=0)),
            color=alt.condition("isValid(datum.times_even)", colour, alt.value(_NONE)),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("expert:O", title="Expert"),
                alt.Tooltip("tokens:Q", title="Tokens", format=","),
                alt.Tooltip("share:Q", title="Share of tokens", format=".2%"),
                alt.Tooltip("times_even:Q", title="Times even", format=".2f"),
            ],
        )
    )
    return found


def _width(experts: int) -> int:
    return min(max(_COLUMN * experts, _NARROWEST), _WIDEST)


def _axis(values: list[int], most: int) -> alt.Axis:
    """At most `most` labels, evenly apart."""
    step = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 10**6) if len(values) / n <= most)
    return alt.Axis(values=values[::step], labelAngle=0, ticks=False, domain=False, grid=False)


def _stops(top: float) -> list[float]:
    return [0, 1, *(n for n in (2, 4, 8, 16, 32, 64, 128) if n <= top)]


def _explanation() -> str:
    return (
        "Colour, one scale for all maps: share of a layer's tokens that chose the expert, over the "
        "share k/E that all experts would have alike; layers without experts are left out."
    )
