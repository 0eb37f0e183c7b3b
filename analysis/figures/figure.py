"""What a figure is: a question to a dataset, answered as a frame, a picture and a sentence.

`prepare` decides what is shown and refuses what must not be mixed; everything after it is
a function of the prepared frame alone. So the CSV beside a picture holds exactly what the
picture shows, and a sentence can be checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True, kw_only=True, slots=True)
class Pivot:
    """One panel of a figure as a table."""

    title: str
    corner: str
    """What the columns hold."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells as text; the first of each row names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A named figure."""

    name: str
    aliases: tuple[str, ...]
    """Other names, for instance the number that the paper gives it."""
    title: str
    paper: str
    """The paper's figure that this reproduces."""
    prepare: Callable[[pl.LazyFrame], pl.DataFrame]
    """From records as `load` gives them to exactly what is drawn, one row per point.
    Raises SelectionError where the records do not make one figure."""
    chart: Callable[[pl.DataFrame], alt.TopLevelMixin]
    """The picture of a prepared frame."""
    pivots: Callable[[pl.DataFrame], list[Pivot]]
    """The same as tables, one per panel."""
    insight: Callable[[pl.DataFrame], str]
    """What follows from a prepared frame, in whole sentences."""
