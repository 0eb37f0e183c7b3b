"""What a figure is: a question, answered as a frame, a picture and a sentence.

`prepare` decides what is shown and refuses what must not be mixed; everything after it is
a function of the prepared frame alone. So the CSV beside a picture holds exactly what the
picture shows, and a sentence can be checked against it.

The question goes to datasets (`RecordsFigure`) or to the catalogues of models and devices
(`CatalogueFigure`); what comes after `prepare` does not know which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from analysis.options import Options

if TYPE_CHECKING:
    import altair as alt

    from analysis.dataset import Beside


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
    """A named figure, apart from where its frame comes from."""

    name: str
    aliases: tuple[str, ...]
    """Other names, for instance the number that the paper gives it."""
    title: str
    paper: str
    """The paper's figure that this reproduces."""
    chart: Callable[[pl.DataFrame], alt.TopLevelMixin]
    """The picture of a prepared frame."""
    pivots: Callable[[pl.DataFrame], list[Pivot]]
    """The same as tables, one per panel."""
    insight: Callable[[pl.DataFrame], str]
    """What follows from a prepared frame, in whole sentences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordsFigure(Figure):
    """A figure of what trials gave: their records and, where it looks closer, other tables."""

    beside: tuple[Beside, ...] = ()
    """Those tables, read from the same datasets."""
    prepare: Callable[..., pl.DataFrame]
    """From records as `load` gives them, and the tables `beside` in their order, to exactly what
    is drawn, one row per point. Raises SelectionError where they lack what is asked for or do not
    make one figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueFigure(Figure):
    """A figure of what follows from structure and data sheets: computed, never measured."""

    takes: tuple[str, ...]
    """Fields of `Options` that it can be asked for."""
    defaults: Options
    """What is drawn where nothing is asked for: the paper's choice."""
    prepare: Callable[[Options], pl.DataFrame]
    """From options, `defaults` filled in, to exactly what is drawn.
    Raises OptionError for a model or device that cannot be drawn."""

    def frame(self, asked: Options) -> pl.DataFrame:
        """The prepared frame for what was asked, defaults for the rest.

        Raises:
            OptionError: as `prepare`, and for an option that the figure does not take.
        """
        what = f"figure {self.name!r}"
        return self.prepare(asked.over(self.defaults, takes=self.takes, what=what))
