"""How much a quantity changes along one key, when not every point was measured.

A grid has holes: memory runs out at its far corner. Comparing the far ends of lines that
have them with the near ends of lines that do not would mix the effect with the hole, so
a comparison is made over one range of the key, and only by lines measured at both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import polars as pl


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Change of throughput between two values of a key."""

    low: int
    """Smallest value of the key that is compared."""
    high: int
    """Largest one."""
    whole: bool
    """Whether that is the whole range of the grid."""
    lines: pl.DataFrame
    """One row per line measured at both ends: its keys, `change` (share of the value at
    the low end, -0.5 is a fall by half) and `apart` (whether the confidence intervals of
    the two ends do not overlap; null where there are none)."""


def compare(
    frame: pl.DataFrame, x: str, line: Sequence[str], grid: Sequence[int]
) -> Comparison | None:
    """Change of `throughput_tok_s` along `x`, per line (the columns `line`).

    Takes the whole range of `x` if any line was measured at both of its ends, else the
    widest range (in grid steps) that one was; of equals, the one with more lines.

    Args:
        frame: one row per point, with the throughput (null where there is none) and its
            interval.
        grid: all values of `x`, ascending.

    Returns:
        None where no line was measured at two values of `x`.
    """
    points = frame.drop_nulls("throughput_tok_s")
    best: tuple[int, int, int] | None = None
    chosen = points.clear()
    for low, high in combinations(range(len(grid)), 2):
        ends = _ends(points, x, line, grid[low], grid[high])
        score = (high - low, len(ends), -low)
        if len(ends) and (best is None or score > best):
            best, chosen = score, ends
    if best is None:
        return None
    low = -best[2]
    high = low + best[0]
    return Comparison(low=grid[low], high=grid[high], whole=best[0] == len(grid) - 1, lines=chosen)


def steps(frame: pl.DataFrame, x: str, line: Sequence[str], grid: Sequence[int]) -> pl.DataFrame:
    """Mean change over each step of `grid`, the ascending values of `x` to look at.

    Only lines measured at every one of them count, so that steps are comparable.

    Returns:
        One row per step: `low`, `high`, `change`; no rows where no line is whole.
    """
    points = frame.filter(pl.col(x).is_in(grid)).drop_nulls("throughput_tok_s")
    whole = points.filter(pl.col(x).n_unique().over(*line) == len(grid))
    schema = {"low": pl.Int64, "high": pl.Int64, "change": pl.Float64}
    if whole.is_empty():
        return pl.DataFrame(schema=schema)
    means = [_ends(whole, x, line, *step).get_column("change").mean() for step in pairwise(grid)]
    return pl.DataFrame({"low": grid[:-1], "high": grid[1:], "change": means}, schema=schema)


def _ends(points: pl.DataFrame, x: str, line: Sequence[str], low: int, high: int) -> pl.DataFrame:
    value, floor, ceiling = (f"throughput_tok_s{end}" for end in ("", "_ci_low", "_ci_high"))
    columns = [*line, value, floor, ceiling]
    return (
        points.filter(pl.col(x) == low)
        .select(columns)
        .join(points.filter(pl.col(x) == high).select(columns), on=list(line), suffix="_end")
        .select(
            *line,
            change=pl.col(f"{value}_end") / pl.col(value) - 1,
            apart=(pl.col(f"{ceiling}_end") < pl.col(floor))
            | (pl.col(f"{floor}_end") > pl.col(ceiling)),
        )
        .sort(line)
    )
