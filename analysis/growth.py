"""Sentences on how throughput grows along lines, from line to line, and with devices.

Like those of `analysis.insights`, they follow from the points that are drawn. A ratio is only
made of two points that were both measured, and says of how many it is the median.
"""

from __future__ import annotations

from typing import cast

import polars as pl

from analysis.aggregate import compare
from analysis.insights import MISSING, feasible, percent
from analysis.keys import Axes, enumeration


def at_ends(frame: pl.DataFrame, axes: Axes) -> str:
    """The change along x on the first and on the last line of each panel."""
    sentences = []
    for panel, rows in _panels(frame, axes):
        low, high = _ends(rows, axes.x.column)
        lines = rows.get_column(axes.line.column).unique().sort().to_list()
        found = []
        for line in dict.fromkeys((lines[0], lines[-1])):
            one = rows.filter(pl.col(axes.line.column) == line)
            ratio = _ratio(one, axes.x.column, low, high)
            if ratio is not None:
                found.append(f"{_signed(ratio - 1)} at {axes.line.label(line)}")
        if found and low != high:
            sentences.append(f"{panel}: {enumeration(found)}")
    if not sentences:
        return ""
    low, high = _ends(feasible(frame), axes.x.column)
    return f"From {axes.x.span(low, high)}, {'; '.join(sentences)}."


def along_x(frame: pl.DataFrame, axes: Axes) -> str:
    """How many times the throughput of the first x the last one has, per panel."""
    drawn = feasible(frame)
    grid = drawn.get_column(axes.x.column).unique().sort().to_list()
    words = []
    spans = set()
    for panel, rows in _panels(frame, axes):
        found = compare(rows, axes.x.column, [axes.line.column], grid)
        if found is not None:
            ratios = found.lines.get_column("change") + 1
            words.append(f"{_times(ratios)} for {panel}")
            spans.add((found.low, found.high))
    if len(spans) != 1:
        return ""
    low, high = spans.pop()
    return (
        f"Throughput at {axes.x.label(high)} over that at {axes.x.label(low)}: "
        f"{enumeration(words)}, medians over lines."
    )


def across_lines(frame: pl.DataFrame, axes: Axes) -> str:
    """How many times the throughput of the first line the last one has, per panel."""
    sentences = []
    ends: tuple[object, object] | None = None
    for panel, rows in _panels(frame, axes):
        first, last = _ends(rows, axes.line.column)
        pairs = _pairs(rows, axes, first, last).sort(axes.x.column)
        if first == last or pairs.is_empty():
            continue
        ends = (first, last)
        end = pairs.row(-1, named=True)
        sentences.append(
            f"{_times(pairs.get_column('ratio'))} for {panel}, "
            f"{end['ratio']:.2g} at {axes.x.label(end[axes.x.column])}"
        )
    if ends is None:
        return ""
    first_label, last_label = (axes.line.label(cast(int, end)) for end in ends)
    return (
        f"Throughput at {last_label} over that at {first_label}: {'; '.join(sentences)}; "
        "medians over the axis."
    )


def advantage(frame: pl.DataFrame, axes: Axes) -> str:
    """What the first line has over the last one: its median, and where it is least and most."""
    drawn = feasible(frame).drop_nulls("throughput_tok_s")
    names = drawn.get_column(axes.line.column).unique().sort().to_list()
    if len(names) < 2:
        return ""
    first, last = names[0], names[-1]
    pairs = _pairs(drawn, axes, last, first).sort("ratio")
    if pairs.is_empty():
        return f"No point was measured with both {first} and {last}."
    places = [
        f"{_signed(row['ratio'] - 1)} at {axes.x.label(row[axes.x.column])}, "
        f"{axes.panel.label(row[axes.panel.column])}"
        for row in (pairs.row(0, named=True), pairs.row(-1, named=True))
    ]
    middle = cast(float, pairs.get_column("ratio").median())
    apart = int(pairs.get_column("apart").sum())
    words = [
        f"Throughput of {first} over {last}: {_signed(middle - 1)} in the median of {len(pairs)} "
        f"points ({places[0]}, to {places[1]})."
    ]
    along = pairs.group_by(axes.x.column).agg(pl.col("ratio").median()).sort(axes.x.column)
    if len(along) > 1:
        ends = [along.row(0), along.row(-1)]
        words.append(
            "It is "
            + " and ".join(
                f"{_signed(cast(float, ratio) - 1)} at {axes.x.label(value)}"
                for value, ratio in ends
            )
            + ", medians over the panels."
        )
    words.append(f"Intervals are apart in {apart} of {len(pairs)}.")
    return " ".join(words)


def with_devices(frame: pl.DataFrame, axes: Axes) -> str:
    """Relative throughput and efficiency of each line at its most devices, per panel."""
    sentences = []
    for panel, rows in _panels(frame, axes):
        words = []
        for (line,), one in rows.group_by(axes.line.column, maintain_order=True):
            beyond = one.sort(axes.x.column).filter(pl.col(axes.x.column) > 1)
            if beyond.is_empty():
                continue
            last, first = beyond.row(-1, named=True), one.sort(axes.x.column).row(0, named=True)
            where = axes.x.label(last[axes.x.column])
            if last["relative_throughput"] is not None:
                words.append(
                    f"{line} {last['relative_throughput']:.2f} times one device on {where} "
                    f"(efficiency {percent(last['parallel_efficiency'])})"
                )
            elif last[axes.x.column] != first[axes.x.column]:
                ratio = last["throughput_tok_s"] / first["throughput_tok_s"]
                words.append(f"{line} {ratio:.2f} times {first[axes.x.column]} on {where}")
            else:
                words.append(f"{line} on {where} has nothing to be compared with")
        if words:
            sentences.append(f"{panel}: {'; '.join(words)}.")
    if sentences and frame.get_column("threads").drop_nulls().n_unique() > 1:
        sentences.append("Devices have unequal numbers of threads: efficiency is over threads.")
    return " ".join(sentences) or "No layout of several devices was measured."


def without_value(frame: pl.DataFrame, axes: Axes) -> str:
    """Each drawn point that has no value, and why."""
    drawn = feasible(frame)
    holes = drawn.filter(pl.col("throughput_tok_s").is_null())
    words = [
        f"{axes.panel.label(row[axes.panel.column])}, {axes.line.label(row[axes.line.column])} on "
        f"{axes.x.label(row[axes.x.column])}: {MISSING.get(row['outcome'], row['outcome'])}"
        for row in holes.iter_rows(named=True)
    ]
    refused = len(frame) - len(drawn)
    if refused:
        words.append(f"{refused} infeasible, left out")
    return f"Without a value: {'; '.join(words)}." if words else ""


def _panels(frame: pl.DataFrame, axes: Axes) -> list[tuple[str, pl.DataFrame]]:
    """Label and measured points of each panel."""
    drawn = feasible(frame).drop_nulls("throughput_tok_s")
    return [
        (axes.panel.label(cast(int, value)), rows)
        for (value,), rows in drawn.sort(axes.panel.column).group_by(
            axes.panel.column, maintain_order=True
        )
    ]


def _pairs(rows: pl.DataFrame, axes: Axes, below: object, above: object) -> pl.DataFrame:
    """`ratio` of two lines where both were measured, and whether their intervals are `apart`."""
    keys = [axes.panel.column, axes.x.column]
    value, floor, ceiling = (f"throughput_tok_s{end}" for end in ("", "_ci_low", "_ci_high"))
    kept = [*keys, value, floor, ceiling]
    line = pl.col(axes.line.column)
    return (
        rows.filter(line == below)
        .select(kept)
        .join(rows.filter(line == above).select(kept), on=keys, suffix="_above")
        .select(
            *keys,
            ratio=pl.col(f"{value}_above") / pl.col(value),
            apart=(pl.col(f"{floor}_above") > pl.col(ceiling))
            | (pl.col(f"{ceiling}_above") < pl.col(floor)),
        )
    )


def _ratio(line: pl.DataFrame, x: str, low: object, high: object) -> float | None:
    found = [
        line.filter(pl.col(x) == end).get_column("throughput_tok_s").to_list()
        for end in (low, high)
    ]
    if not (found[0] and found[1]):
        return None
    return float(found[1][0] / found[0][0])


def _times(ratios: pl.Series) -> str:
    """`13 times (11 to 16)`: the median, and the range of several."""
    low, middle, high = (cast(float, one) for one in (ratios.min(), ratios.median(), ratios.max()))
    return f"{middle:.2g} times" + (f" ({low:.2g} to {high:.2g})" if len(ratios) > 1 else "")


def _ends(rows: pl.DataFrame, column: str) -> tuple[int, int]:
    values = rows.get_column(column).unique().sort().to_list()
    return values[0], values[-1]


def _signed(share: float) -> str:
    return f"{'-' if share < 0 else '+'}{percent(share)}"
