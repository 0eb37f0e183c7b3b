"""What a reader must know of single records beside their figures: marks, and lines that explain
them."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from analysis import disturbed, drift, preempted


def mark(row: Mapping[str, object]) -> str:
    """What stands behind a figure of this record."""
    return disturbed.mark(row) + preempted.mark(row)


def lines(frame: pl.DataFrame) -> list[str]:
    """How many records of a frame are marked, and why; then how far the machine drifted."""
    said = [disturbed.line(frame), preempted.line(frame), *drift.lines(frame)]
    return [line for line in said if line]
