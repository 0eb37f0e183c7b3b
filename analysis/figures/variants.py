"""Throughput of variants of one model, each against the one they are variants of.

Quantisation (MoE-Inference-Bench, Figure 10) and speculative decoding (its Figure 12) ask the
same question: what does it bring over the model as it is, and where. So both have lines by
variant, one of which is the baseline, over two keys of which each is the axis once; and every
point knows its ratio to the baseline under the same conditions.

A baseline may lack a key: a target that decodes alone drafts no tokens. It is then drawn at
every value, dashed, and compared with every point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.conditions import CONDITIONS, constant, refuse_mixed, refuse_repeated
from analysis.drift import CARRIED
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import MISSING, percent
from analysis.keys import Key, enumeration
from analysis.marks import COLUMNS as MARKED
from analysis.marks import mark
from analysis.subtitle import subtitle

if TYPE_CHECKING:
    import altair as alt

_ENDS = ("throughput_tok_s", "throughput_tok_s_ci_low", "throughput_tok_s_ci_high")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variants:
    """What varies, and in which roles."""

    name: str
    aliases: tuple[str, ...]
    title: str
    paper: str
    x: Key
    panel: Key
    varied: tuple[str, ...]
    """Columns in which variants differ."""
    label: pl.Expr
    """Name of a record's variant."""
    baselines: tuple[str, ...]
    """Names of the baseline; the first that there is counts."""
    own: tuple[str, ...] = ()
    """Those of x and panel that a baseline does not have."""
    beside: tuple[str, ...] = ()
    """Further columns of a point."""
    more: Callable[[pl.DataFrame], str] = lambda frame: ""
    """Further sentences."""
    extra: tuple[tuple[str, str], ...] = ()
    """Panels below the others: a column of a point, and its title."""

    def figure(self) -> RecordsFigure:
        """The figure of it."""
        return RecordsFigure(
            name=self.name,
            aliases=self.aliases,
            title=self.title,
            paper=self.paper,
            prepare=self.prepare,
            chart=self.chart,
            pivots=self.pivots,
            insight=self.insight,
        )

    def prepare(self, records: pl.LazyFrame) -> pl.DataFrame:
        """A row per point: panel, `variant`, x, `baseline`, its figures, `ratio` (throughput over
        the baseline's under the same conditions), `apart` (whether the two intervals are), its
        conditions.

        Raises:
            SelectionError: nothing to compare, conditions differ, or several share a point.
        """
        keys = [self.panel.column, "variant", self.x.column]
        frame = records.with_columns(variant=self.label).collect()
        frame = frame.filter(pl.col("outcome") != "infeasible")
        needed = [key for key in (self.panel.column, self.x.column) if key not in self.own]
        known = pl.all_horizontal(pl.col(key).is_not_null() for key in keys)
        frame = frame.drop_nulls(needed).filter(pl.col("variant").is_in(self.baselines) | known)
        names = frame.get_column("variant").unique().to_list()
        base = next((one for one in self.baselines if one in names), None)
        if base is None or len(names) < 2:
            raise SelectionError(
                f"nothing to compare: it takes {' or '.join(self.baselines)} and another variant, "
                f"there is {', '.join(sorted(names)) or 'no record'}"
            )
        frame = frame.with_columns(baseline=pl.col("variant") == base)
        refuse_mixed(frame, varied=(*self.varied, self.x.column, self.panel.column))
        refuse_repeated(frame, keys)
        ends = {name: f"base_{name}" for name in _ENDS}
        alone = frame.filter("baseline").select(*needed, *_ENDS).rename(ends)
        low, high = (pl.col(f"throughput_tok_s_ci_{end}") for end in ("low", "high"))
        base_low, base_high = (pl.col(f"base_throughput_tok_s_ci_{end}") for end in ("low", "high"))
        shown = ["outcome", "outcome_reason", *_ENDS, "ratio", "apart", *self.beside]
        conditions = [one for one in CONDITIONS if one not in (*keys, *self.beside)]
        return (
            frame.join(alone, on=needed, how="left", maintain_order="left")
            .with_columns(
                ratio=pl.when(~pl.col("baseline")).then(
                    pl.col("throughput_tok_s") / pl.col("base_throughput_tok_s")
                ),
                apart=pl.when(~pl.col("baseline")).then((low > base_high) | (high < base_low)),
            )
            .select(*keys, "baseline", *shown, *conditions, *_FOR_PEOPLE)
            .sort(pl.col("baseline").not_(), *keys, nulls_last=True)
        )

    def pivots(self, frame: pl.DataFrame) -> list[Pivot]:
        """A table per panel, a row per variant, a column per x; ratios to the baseline beside."""
        drawn = self._spread(frame)
        columns = drawn.get_column(self.x.column).unique().sort().to_list()
        tables = []
        for (panel,), rows in drawn.sort(self.panel.column).group_by(
            self.panel.column, maintain_order=True
        ):
            cells: dict[str, dict[int, str]] = {}
            for row in rows.iter_rows(named=True):
                cells.setdefault(row["variant"], {})[row[self.x.column]] = _cell(row)
            tables.append(
                Pivot(
                    title=self.panel.phrase.format(panel),
                    corner=self.x.title,
                    columns=tuple(map(str, columns)),
                    rows=tuple(
                        (name, *(found.get(value, "") for value in columns))
                        for name, found in cells.items()
                    ),
                )
            )
        return tables

    def insight(self, frame: pl.DataFrame) -> str:
        """The best and the worst against the baseline, the change along x, holes."""
        sentences = [self._best(frame), self._along(frame), self.more(frame), _absent(frame)]
        return " ".join(filter(None, sentences))

    def chart(self, frame: pl.DataFrame) -> alt.TopLevelMixin:
        """Lines by variant; a panel per value of the panel's key, and those of `extra`."""
        from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

        drawn = self._spread(frame).sort(self.panel.column, maintain_order=True)
        phrase = self.panel.phrase.format("{}")
        word = f"{'Predicted throughput' if _predicted(frame) else 'Throughput'} (tokens/s), "
        parts = [(pl.col("throughput_tok_s"), word)]
        parts += [(pl.col(column), f"{title}, ") for column, title in self.extra]
        long = pl.concat(
            drawn.select(
                panel=pl.format(f"{{}}{phrase}", pl.lit(title), self.panel.column),
                line="variant",
                dash=pl.when("baseline").then(pl.lit("baseline")).otherwise(pl.lit("variant")),
                x=pl.col(self.x.column).cast(pl.Float64),
                y=value.cast(pl.Float64),
                ring="disturbed",
                untuned="untuned",
            )
            for value, title in parts
        ).drop_nulls("y")
        base, *others = _names(frame)
        order = {name: place for place, name in enumerate([*others, base])}
        long = long.with_columns(place=pl.col("line").replace_strict(order)).sort(
            "place", maintain_order=True
        )
        titles = [
            title + self.panel.phrase.format(value)
            for _, title in parts
            for value in drawn.get_column(self.panel.column).unique().sort()
        ]
        there = set(long.get_column("panel"))
        rank = {title: place for place, title in enumerate(titles) if title in there}
        long = long.sort(pl.col("panel").replace_strict(rank), maintain_order=True).drop("place")
        return draw(
            long,
            title=self.title,
            subtitle=subtitle(frame),
            notes=[self.insight(frame)],
            x=Axis(title=self.x.title, doublings=True),
            y=Axis(title="", form=",~r"),
            shared=False,
            lines="Variant",
        )

    def _spread(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The baseline at every value of a key that it does not have."""
        for key in (self.x.column, self.panel.column):
            if key in self.own:
                values = frame.get_column(key).drop_nulls().unique()
                alone = frame.filter(pl.col(key).is_null()).drop(key)
                copies = alone.join(values.to_frame(), how="cross").select(frame.columns)
                frame = pl.concat([copies, frame.filter(pl.col(key).is_not_null())])
        return frame

    def _best(self, frame: pl.DataFrame) -> str:
        """Per panel, the variant and x with the highest ratio, and the lowest one of all."""
        known = frame.drop_nulls("ratio")
        if known.is_empty():
            return "No variant was measured beside its baseline."
        base = frame.filter("baseline").get_column("variant")[0]
        words = []
        for (panel,), rows in known.sort(self.panel.column).group_by(
            self.panel.column, maintain_order=True
        ):
            row = rows.sort("ratio").row(-1, named=True)
            words.append(
                f"{self.panel.phrase.format(panel)} {row['variant']} "
                f"({self.x.phrase.format(row[self.x.column])}, {_times(row)})"
            )
        worst = known.sort("ratio").row(0, named=True)
        return (
            f"Highest against {base}: {enumeration(words)}. Lowest of all: {worst['variant']} "
            f"({self.x.phrase.format(worst[self.x.column])}, "
            f"{self.panel.phrase.format(worst[self.panel.column])}, {_times(worst)})."
        )

    def _along(self, frame: pl.DataFrame) -> str:
        """Per variant, the change of throughput from the lowest x to the highest, median over
        panels."""
        words = []
        x, panel = self.x.column, self.panel.column
        values = frame.get_column(x).drop_nulls().unique().sort().to_list()
        if len(values) < 2:
            return ""
        low, high = values[0], values[-1]
        for name in _names(frame):
            rows = frame.filter(pl.col("variant") == name).drop_nulls("throughput_tok_s")
            ends = rows.filter(pl.col(x).is_in([low, high])).sort(panel, x)
            changes = [
                late["throughput_tok_s"] / early["throughput_tok_s"] - 1
                for early, late in pairwise(ends.iter_rows(named=True))
                if early[panel] == late[panel] and early[x] != late[x]
            ]
            if changes:
                change = pl.Series(changes).median()
                assert isinstance(change, float)
                sign = "-" if change < 0 else "+"
                words.append(f"{sign}{percent(change)} with {name}")
        if not words:
            return ""
        over = frame.get_column(panel).drop_nulls().n_unique()
        median = f", medians over {over} panels" if over > 1 else ""
        return f"From {self.x.phrase.format(f'{low} to {high}')}: {enumeration(words)}{median}."


_FOR_PEOPLE = (
    "devices_label",
    "memory_limit_gib",
    *MARKED,
    *CARRIED,
    "trial_id",
)


def _names(frame: pl.DataFrame) -> list[str]:
    """Variants, the baseline first."""
    base = frame.filter("baseline").get_column("variant")[0]
    return [base, *sorted(set(frame.get_column("variant").to_list()) - {base})]


def _times(row: dict[str, Any]) -> str:
    """`1.25 times, more than the intervals`."""
    words = f"{row['ratio']:.2f} times"
    if row["apart"] is None:
        return words
    return f"{words}, {'beyond' if row['apart'] else 'within'} the confidence intervals"


def _cell(row: dict[str, Any]) -> str:
    value = row["throughput_tok_s"]
    if value is None:
        return MISSING.get(row["outcome"], str(row["outcome"]))
    return f"{value:,.0f}{mark(row)}" + ("" if row["ratio"] is None else f" ({row['ratio']:.2f}×)")


def _absent(frame: pl.DataFrame) -> str:
    """Points without a value by variant, with the engine's words where they are all the same."""
    holes = frame.filter(pl.col("throughput_tok_s").is_null())
    if holes.is_empty():
        return ""
    words = []
    for (name, outcome), rows in holes.group_by("variant", "outcome", maintain_order=True):
        words.append(f"{name} ({len(rows)} {MISSING.get(str(outcome), str(outcome))})")
    return f"Without a value: {enumeration(words)}."


def _predicted(frame: pl.DataFrame) -> bool:
    return constant(frame, "source") == "predicted"
