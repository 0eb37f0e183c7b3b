"""How records are marked whose engine had too little KV cache for the batch.

vLLM then puts requests back and computes them anew, so the figure is that of a smaller batch and
more work. It happens where a sweep sets the size of the cache itself; else such a trial is out of
memory. Records of version 0.1.0 say nothing of it, and are not marked.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from analysis import disturbed

MARK = "†"
"""Behind a figure."""


def line(frame: pl.DataFrame) -> str:
    """How many records of a frame had requests put back; empty where none had."""
    if "preemptions" not in frame.columns:
        return ""
    number = disturbed.records(frame.filter(pl.col("preemptions") > 0))
    if not number:
        return ""
    return (
        f"{number} of {disturbed.records(frame)} records with requests put back and computed anew "
        f"for want of KV cache (marked {MARK} in tables)"
    )


def mark(row: Mapping[str, object]) -> str:
    """What stands behind a figure of this record."""
    number = row.get("preemptions")
    return MARK if isinstance(number, int) and number > 0 else ""
