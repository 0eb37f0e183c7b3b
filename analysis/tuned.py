"""Records whose MoE kernel ran untuned beside others whose kernel was tuned.

vLLM's Triton kernel for experts takes its tile sizes from a file for the number of experts, their
width, the device and the data type, if there is one, else from a rule of thumb; it says so in its
log alone. In a grid of widths and numbers of experts some shapes have a file and others none, so
a line jumps where the kernel changes and nothing of the model does. `docs/guides/tuning.md` says
how to make the files that lack.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from analysis import disturbed

MARK = "‡"
"""Behind a figure, or beside a point."""
DEFAULT = "default"
"""In the column `moe_config`: no file was there. A text with other words beside it means that some
layers had one."""
_ON_DEFAULT = pl.col("moe_config").str.split("; ").list.contains(DEFAULT)
UNTUNED = (
    pl.when(pl.col("moe_config").is_not_null())
    .then(_ON_DEFAULT & _ON_DEFAULT.not_().any().over("device"))
    .alias("untuned")
)
"""Ran on the default where others of the dataset and device had a file; null for kernels that ask
for no file."""


def line(frame: pl.DataFrame) -> str:
    """How many records of a figure are untuned beside others; empty where none is."""
    if "untuned" not in frame.columns:
        return ""
    found = frame.filter(pl.col("untuned").fill_null(False))
    untuned, whole = (disturbed.records(one) for one in (found, frame))
    if not untuned:
        return ""
    return (
        f"{untuned} of {whole} record{'s' if whole > 1 else ''} ran on vLLM's default MoE "
        f"configuration, others on a tuned one (marked {MARK})"
    )


def mark(row: Mapping[str, object]) -> str:
    """What stands behind a figure of this record."""
    return MARK if row.get("untuned") else ""
