"""How records whose figures something else took part in are marked, and counted in words.

`workers.disturbance` says which they are. A reader must not have to know that there is a column:
so every table and figure that shows such a record marks it and says how many there are. Records of
version 0.1.0 say nothing of it, and are not marked.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from analysis import tuned

MARK = "*"
"""Behind a figure."""
RING = "#cc3311"
"""Colour of the ring around a point."""


def line(frame: pl.DataFrame) -> str:
    """How many records of a frame were disturbed; empty where none was.

    Counts trials where rows tell of which they are, since a figure may show one several times.
    """
    if "disturbed" not in frame.columns:
        return ""
    found = frame.filter(pl.col("disturbed").fill_null(False))
    number, whole = (_records(one) for one in (found, frame))
    if not number:
        return ""
    return (
        f"{number} of {whole} record{'s' if whole > 1 else ''} disturbed by something else "
        f"(marked {MARK} or ringed)"
    )


MARKS = pl.concat_str(
    pl.when("disturbed").then(pl.lit(MARK)),
    pl.when("untuned").then(pl.lit(tuned.MARK)),
    ignore_nulls=True,
).replace("", None)
"""What stands behind a figure of a record; null where nothing does."""


def mark(row: Mapping[str, object]) -> str:
    """The same, of a row."""
    return (MARK if row.get("disturbed") else "") + (tuned.MARK if row.get("untuned") else "")


def _records(frame: pl.DataFrame) -> int:
    keys = [name for name in ("run_id", "trial_id") if name in frame.columns]
    return frame.select(keys).n_unique() if keys else len(frame)
