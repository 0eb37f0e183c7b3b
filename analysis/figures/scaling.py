"""Throughput over one key, panels by a second, lines by a third.

MoE-Inference-Bench draws one grid three times (its Figures 7, 8 and 9): FFN dimension ×
experts × active experts, each key once along the axis; and others once, by batch, length,
devices or kernel (5, 6, 13, 14). So there is one builder here, and a figure is a choice of roles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import polars as pl

from analysis.conditions import CONDITIONS, refuse_mixed, refuse_repeated
from analysis.drift import CARRIED
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import MISSING, feasible, percent
from analysis.keys import Axes
from analysis.marks import COLUMNS as MARKED
from analysis.marks import mark

if TYPE_CHECKING:
    import altair as alt

Part = Callable[[pl.DataFrame, Axes], str]

_DRAWN = (
    "outcome",
    "out_of_memory",
    "throughput_tok_s",
    "throughput_tok_s_ci_low",
    "throughput_tok_s_ci_high",
    "ci_level",
    "repeats",
    "oom_stage",
    "outcome_reason",
    "skipped_by",
    "params_total",
    "params_active",
    "active_share",
    "memory_limit_gib",
    *MARKED,
    *CARRIED,
    "devices_label",
    "relative_throughput",
    "parallel_efficiency",
    "trial_id",
)
"""Columns of a prepared frame after its three keys and before its conditions."""


def _as_they_are(records: pl.LazyFrame) -> pl.LazyFrame:
    return records


def scaling(
    *,
    name: str,
    aliases: tuple[str, ...],
    title: str,
    paper: str,
    axes: Axes,
    parts: tuple[Part, ...],
    shape: Callable[[pl.LazyFrame], pl.LazyFrame] = _as_they_are,
) -> RecordsFigure:
    """A figure of throughput over `axes`, whose insight is the sentences of `parts`.

    `shape` gives records the columns of `axes` that they do not have, or leaves some out.
    """

    def chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
        from analysis.figures.panels import draw  # altair is slow to import

        return draw(frame, axes=axes, title=title, insight=insight(frame))

    def insight(frame: pl.DataFrame) -> str:
        found = " ".join(filter(None, (part(frame, axes) for part in parts)))
        return found or "There are no two points to compare."

    return RecordsFigure(
        name=name,
        aliases=aliases,
        title=title,
        paper=paper,
        prepare=lambda records: prepare(shape(records), axes),
        chart=chart,
        pivots=lambda frame: pivots(frame, axes),
        insight=insight,
    )


def prepare(records: pl.LazyFrame, axes: Axes) -> pl.DataFrame:
    """One row per point: the keys of `axes`, how it ended, its figures, its conditions.

    `out_of_memory` is true where a trial ran out of memory, and where it was skipped since
    a trial that did is its witness.

    Raises:
        SelectionError: where no record has the three keys, conditions differ, or several
            records share a point.
    """
    keys = axes.columns
    exhausted = pl.col("trial_id").filter(pl.col("outcome") == "oom").unique().implode()
    frame = (
        records.with_columns(
            out_of_memory=(pl.col("outcome") == "oom")
            | (
                (pl.col("outcome") == "skipped")
                & pl.col("skipped_by").is_in(exhausted).fill_null(False)
            )
        )
        .drop_nulls(keys)
        .collect()
    )
    if frame.is_empty():
        raise SelectionError(f"no records yet that have all of {', '.join(sorted(keys))}")
    if feasible(frame).is_empty():
        raise SelectionError("every point is infeasible: there is nothing to draw")
    refuse_mixed(frame, varied=axes.varied)
    refuse_repeated(frame, keys)
    conditions = [name for name in CONDITIONS if name not in keys]
    return frame.select(*keys, *_DRAWN, *conditions).sort(keys)


def pivots(frame: pl.DataFrame, axes: Axes) -> list[Pivot]:
    """The panels as tables: a row per line, a column per x, tokens per second in the cells."""
    columns = frame.get_column(axes.x.column).unique().sort().to_list()
    tables = []
    for (panel,), rows in frame.group_by(axes.panel.column, maintain_order=True):
        cells: dict[object, dict[object, str]] = {}
        for row in rows.iter_rows(named=True):
            cells.setdefault(row[axes.line.column], {})[row[axes.x.column]] = _cell(row)
        tables.append(
            Pivot(
                title=axes.panel.phrase.format(panel),
                corner=axes.x.title,
                columns=tuple(str(value) for value in columns),
                rows=tuple(
                    (axes.line.phrase.format(line), *(found.get(value, "") for value in columns))
                    for line, found in cells.items()
                ),
            )
        )
    return tables


def _cell(row: dict[str, object]) -> str:
    """`1,234 ±1.5 %`, or how the trial ended."""
    value, low, high = (row[f"throughput_tok_s{end}"] for end in ("", "_ci_low", "_ci_high"))
    if not isinstance(value, float):
        outcome = str(row["outcome"])
        return "OOM" if outcome == "oom" else MISSING.get(outcome, outcome)
    shown = f"{value:,.0f}{mark(row)}"
    if not (isinstance(low, float) and isinstance(high, float)):
        return shown
    return f"{shown} ±{percent((high - low) / 2 / value)}"
