"""How every figure looks: ink, type sizes, the sentences under it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import altair as alt

INK, FAINT = "#333333", "#f2f2f2"
LETTERS = 76
"""Characters of the caption that fit under 430 pixels."""
PALETTE = ("#332288", "#117733", "#cc6677", "#882255", "#44aa99", "#aa4499", "#88ccee", "#ddaa33")
"""Colours of things without an order, told apart by every kind of colour vision (after Paul
Tol's muted scheme); those too light for letters come last."""


def caption(paragraphs: Iterable[str], letters: int) -> alt.TitleParams:
    """Sentences under a figure, wrapped at `letters` characters; a number keeps its %."""
    lines = [
        text.replace("\N{NO-BREAK SPACE}", " ")
        for paragraph in paragraphs
        for text in textwrap.wrap(
            paragraph.replace(" %", "\N{NO-BREAK SPACE}%"), letters, break_on_hyphens=False
        )
    ]
    return alt.TitleParams(lines, orient="bottom", fontSize=12, fontWeight="normal", offset=14)


def styled(chart: alt.VConcatChart) -> alt.VConcatChart:
    """`chart` with the configuration that all figures share."""
    chart.config = alt.Config(
        font="sans-serif",
        background="white",
        padding=14,
        view=alt.ViewConfig(stroke="#cccccc"),
        title=alt.TitleConfig(
            anchor="start",
            color=INK,
            fontSize=17,
            lineHeight=17,
            offset=14,
            subtitleColor="#555555",
            subtitleFontSize=12,
            subtitleLineHeight=16,
            subtitlePadding=6,
        ),
        axis=alt.AxisConfig(
            domainColor="#888888",
            gridColor="#e3e3e3",
            labelColor=INK,
            labelFontSize=11.5,
            tickColor="#888888",
            titleColor=INK,
            titleFontSize=12,
            titleFontWeight="normal",
        ),
        header=alt.HeaderConfig(labelColor=INK, labelFontSize=13, labelFontWeight="bold"),
        legend=alt.LegendConfig(
            columnPadding=16,
            direction="horizontal",
            labelColor=INK,
            labelFontSize=12,
            orient="top",
            symbolOpacity=1,
            symbolSize=90,
            titleColor=INK,
            titleFontSize=12,
            titleFontWeight="normal",
            titleLimit=0,
            titleOrient="left",
        ),
    )
    return chart
