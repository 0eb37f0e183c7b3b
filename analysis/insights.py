"""The sentences under a figure, worked out from the points that are drawn.

A sentence that is typed once is true of one machine. These follow from the frame at hand,
also where that contradicts the paper, and say what they rest on: which range was compared
if not the whole one, which lines reach it, whether the difference is larger than the
confidence intervals, and how many points have no value and why.

Each function takes a prepared frame (one row per point, see `analysis.figures.scaling`)
and answers with whole sentences, or with nothing where it has nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import cast

import polars as pl

from analysis.aggregate import Comparison, compare, steps
from analysis.conditions import constant
from analysis.keys import Axes, Key, enumeration

_MOST_PANELS = 4
"""Panels that one sentence names; of more, only the first and the last."""

MISSING = {
    "oom": "out of memory",
    "skipped": "skipped",
    "unsupported": "unsupported",
    "timeout": "timed out",
    "crashed": "crashed",
    "ok": "no value",
}
"""Outcomes that leave a hole in a figure, in words. A trial that was measured leaves one where a
figure does not exist, as the time between tokens of a request of one token."""


def per_panel(frame: pl.DataFrame, axes: Axes) -> str:
    """Change along x in each panel: the median over its lines."""
    drawn = feasible(frame)
    grid = _values(drawn, axes.x)
    found: dict[int, Comparison] = {}
    for panel in _named(_values(drawn, axes.panel)):
        one = drawn.filter(pl.col(axes.panel.column) == panel)
        if (comparison := compare(one, axes.x.column, [axes.line.column], grid)) is not None:
            found[panel] = comparison
    if not found:
        return _nothing(drawn)
    reach = {panel: _values(one.lines, axes.line) for panel, one in found.items()}
    usual = max(reach.values(), key=list(reach.values()).count)
    clauses: list[str] = []
    for (whole, low, high), panels in groupby(
        found, key=lambda panel: (found[panel].whole, found[panel].low, found[panel].high)
    ):
        changes = [
            (
                axes.panel.label(panel)
                + ("" if reach[panel] == usual else f" ({axes.line.listing(reach[panel])} only)"),
                cast(float, found[panel].lines.get_column("change").median()),
            )
            for panel in panels
        ]
        subject = "it" if clauses else _quantity(drawn)
        clauses.append(f"{_range(whole, axes.x.span(low, high))} {subject} {_changes(changes)}")
    over = f"{'medians over' if len(usual) > 1 else 'with'} {axes.line.listing(usual)}"
    return f"{_capital('; '.join([*clauses, over]))}. {_certainty(found.values())}"


def overall(frame: pl.DataFrame, axes: Axes) -> str:
    """Change along x over all lines of all panels, its steepest step, the line hit most."""
    drawn = feasible(frame)
    keys = [axes.panel.column, axes.line.column]
    grid = _values(drawn, axes.x)
    found = compare(drawn, axes.x.column, keys, grid)
    if found is None:
        return _nothing(drawn)
    changes = found.lines.get_column("change").to_list()
    span = _range(found.whole, axes.x.span(found.low, found.high))
    sentence = _capital(f"{span} {_quantity(drawn)} {_change(sum(changes) / len(changes))}")
    if len(changes) > 1:
        least, most = sorted([min(changes), max(changes)], key=abs)
        sentence += f" on average over {len(changes)} lines ({_signed(least)} to {_signed(most)})"
    sentences = [f"{sentence}."]
    between = [value for value in grid if found.low <= value <= found.high]
    each = steps(drawn, axes.x.column, keys, between).sort("change").rows()
    if len(each) > 1 and each[0][2] < 0:
        low, high, change = each[0]
        sentences.append(f"The steepest step is {axes.x.span(low, high)} ({_signed(change)}).")
    if (worst := _worst(found.lines, axes, len(_values(drawn, axes.line)))) is not None:
        line, change = worst
        sentences.append(
            f"The largest loss is that of {axes.line.label(line)} ({_signed(change)})."
        )
    return " ".join([*sentences, _certainty([found])])


def memory_boundary(frame: pl.DataFrame, axes: Axes) -> str:
    """At which value of x memory first runs out, per panel."""
    drawn = feasible(frame)
    beyond = drawn.filter("out_of_memory")
    if beyond.is_empty():
        return "No point ran out of memory."
    places = []
    for panel in _values(beyond, axes.panel):
        one = beyond.filter(pl.col(axes.panel.column) == panel)
        first = _values(one, axes.x)[0]
        here = (pl.col(axes.panel.column) == panel) & (pl.col(axes.x.column) == first)
        lines = _values(beyond.filter(here), axes.line)
        some = lines != _values(drawn.filter(here), axes.line)
        limit = f" ({axes.line.listing(lines)} only)" if some else ""
        places.append(f"at {axes.x.label(first)} for {axes.panel.label(panel)}{limit}")
    return f"Memory first runs out {enumeration(places)}."


def absent(frame: pl.DataFrame, axes: Axes) -> str:
    """How many points of the grid have no value, and why."""
    drawn = feasible(frame)
    sentences = []
    holes = drawn.filter(pl.col("throughput_tok_s").is_null())
    if len(holes):
        counts = holes.group_by("outcome").len().sort("len", "outcome", descending=[True, False])
        words = MISSING | {"ok": "measured without one"}
        why = [f"{count} {words.get(outcome, outcome)}" for outcome, count in counts.iter_rows()]
        has = "has" if len(holes) == 1 else "have"
        sentences.append(f"{len(holes)} of {len(drawn)} points {has} no value: {enumeration(why)}.")
    if refused := len(frame) - len(drawn):
        sentences.append(f"{_points(refused)} infeasible and left out.")
    if unrecorded := _unrecorded(frame, axes):
        sentences.append(f"{_points(unrecorded)} without a record.")
    return " ".join(sentences)


def summary(records: pl.DataFrame) -> str:
    """How the trials ended, and the fastest of them."""
    if records.is_empty():
        return "No records yet."
    counts = (
        records.get_column("outcome")
        .value_counts(sort=True)
        .sort("count", "outcome", descending=[True, False])
    )
    ended = ", ".join(f"{count} {outcome}" for outcome, count in counts.iter_rows())
    sentence = f"{len(records)} trial{'' if len(records) == 1 else 's'}: {ended}."
    if noisy := int(records.get_column("disturbed").sum()):
        sentence += (
            f" Something else disturbed {noisy} of them; --rerun disturbed measures them again."
        )
    ranked = records.drop_nulls("throughput_tok_s").sort("throughput_tok_s", descending=True)
    if ranked.is_empty():
        return sentence
    best = ranked.row(0, named=True)
    return (
        f"{sentence} The highest {_quantity(ranked.head(1))} is "
        f"{best['throughput_tok_s']:,.0f} tok/s, of trial {best['trial_id']}."
    )


def feasible(frame: pl.DataFrame) -> pl.DataFrame:
    """The points that are drawn: all but those that contradict themselves."""
    return frame.filter(pl.col("outcome") != "infeasible")


def percent(share: float) -> str:
    """A share of 1 without its sign: `61 %`; below one per cent `0.4 %`."""
    number = abs(share) * 100
    return f"{number:.0f} %" if number >= 0.95 else f"{number:.1f} %"


def _change(share: float) -> str:
    if percent(share) == "0.0 %":
        return "stays the same"
    return f"{'falls' if share < 0 else 'rises'} by {percent(share)}"


def _changes(places: Iterable[tuple[str, float]]) -> str:
    """`falls by 61 % at FFN 1792, by 64 % at FFN 3584 and rises by 3 % at FFN 7168`."""
    words: list[str] = []
    last = ""
    for where, share in places:
        verb, _, amount = _change(share).partition(" by ")
        words.append(
            f"{_change(share) if verb != last or not amount else f'by {amount}'} at {where}"
        )
        last = verb
    return enumeration(words)


def _signed(share: float) -> str:
    return f"{'-' if share < 0 else '+'}{percent(share)}"


def _range(whole: bool, span: str) -> str:
    return f"from {span}" if whole else f"as far as measured, from {span},"


def _nothing(drawn: pl.DataFrame) -> str:
    if drawn.get_column("throughput_tok_s").count():
        return "No line has two measured points to compare."
    return "No point was measured."


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _certainty(comparisons: Iterable[Comparison]) -> str:
    """In how many comparisons the intervals of the two ends do not overlap."""
    apart = pl.concat([one.lines.get_column("apart") for one in comparisons])
    known = apart.drop_nulls()
    if known.is_empty():
        return "No confidence intervals were recorded."
    larger = int(known.sum())
    among = f"all {larger}" if larger == len(known) else f"{larger} of {len(known)}"
    without = f" ({len(apart) - len(known)} more have none)" if len(known) < len(apart) else ""
    return f"Differences larger than their confidence intervals: {among}{without}."


def _worst(lines: pl.DataFrame, axes: Axes, count: int) -> tuple[int, float] | None:
    """The line that falls most, and by how much on average over the panels that have all lines."""
    panel, line = axes.panel.column, axes.line.column
    whole = lines.filter(pl.len().over(panel) == count)
    if whole.is_empty() or count < 2:
        return None
    means = whole.group_by(line).agg(pl.col("change").mean()).sort("change", line)
    value, change = cast(tuple[int, float], means.row(0))
    return (value, change) if change < 0 else None


def _unrecorded(frame: pl.DataFrame, axes: Axes) -> int:
    """Points of the grid that no record speaks of, nor could not (top-k above experts)."""
    cells = pl.LazyFrame({"": [0]})
    for name in axes.columns:
        cells = cells.join(frame.lazy().select(pl.col(name).unique()), how="cross")
    if {"top_k", "num_experts"} <= set(axes.columns):
        cells = cells.filter(pl.col("top_k") <= pl.col("num_experts"))
    return cells.join(frame.lazy(), on=axes.columns, how="anti").collect().height


def _quantity(frame: pl.DataFrame) -> str:
    predicted = constant(frame, "source") == "predicted"
    return "predicted throughput" if predicted else "throughput"


def _values(frame: pl.DataFrame, key: Key) -> list[int]:
    return frame.get_column(key.column).unique().sort().to_list()


def _named(panels: list[int]) -> list[int]:
    return panels if len(panels) <= _MOST_PANELS else [panels[0], panels[-1]]


def _points(count: int) -> str:
    return f"{count} point{' is' if count == 1 else 's are'}"
