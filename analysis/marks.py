"""What a reader must know of single records beside their figures: marks, and lines that explain
them."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from analysis import disturbed, drift, preempted, tuned

COLUMNS = ("disturbed", "preemptions", "untuned")
"""What marks follow from; a figure that shows records keeps them."""
MARKS = pl.concat_str(
    pl.when("disturbed").then(pl.lit(disturbed.MARK)),
    pl.when(pl.col("preemptions") > 0).then(pl.lit(preempted.MARK)),
    pl.when("untuned").then(pl.lit(tuned.MARK)),
    ignore_nulls=True,
).replace("", None)
"""What stands behind a figure of a record, as a column; null where nothing does."""


def mark(row: Mapping[str, object]) -> str:
    """What stands behind a figure of this record."""
    return disturbed.mark(row) + preempted.mark(row) + tuned.mark(row)


def lines(frame: pl.DataFrame) -> list[str]:
    """How many records of a frame are marked, and why; then how far the machine drifted."""
    said = [disturbed.line(frame), preempted.line(frame), tuned.line(frame)]
    said += drift.lines(frame)
    return [line for line in said if line]
