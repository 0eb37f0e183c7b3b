"""How fast the machine was over the minutes of each run, by its reference loads.

A line per run, so a line that is not level shows drift within a run, and lines at different
heights show drift between runs. A rate is drawn over the median of all loads on the same device
with as many threads; the bars are the quartiles of a load's own repeats, which is its noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.drift import ALIKE, LOADS
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import percent
from analysis.keys import enumeration

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Speed of the machine over a run, by loads of fixed work"
_WORDS = {"bandwidth": "Reading memory", "tflops": "Multiplying matrices"}


def prepare(records: pl.LazyFrame) -> pl.DataFrame:
    """A row per load: `load` (bandwidth, tflops), `run_id`, `line` (the run, and what its engine
    ran on where that differs), `minutes` since the first load of the run, `rate` and `unit`,
    `relative` to the median of `ALIKE` loads, `low` and `high` (quartiles of its repeats), `spread`
    of these, `trial_id` of the first record that tells of it, and `ALIKE`.

    Raises:
        SelectionError: no record has a reference load.
    """
    frame = records.collect()
    keys = ["run_id", "group_id", "trial_id", *ALIKE]
    parts = [
        frame.select(
            *keys,
            load=pl.lit(name),
            unit=pl.lit(unit),
            at=pl.col(at),
            rate=pl.col(f"{column}_{moment}"),
            spread=pl.col(f"reference_{name}_spread"),
        )
        for name, (column, unit, _) in LOADS.items()
        for moment, at in (("before", "started_at"), ("after", "finished_at"))
    ]
    loads = pl.concat(parts).drop_nulls(["rate", "at"]).sort("at", maintain_order=True)
    if loads.is_empty():
        raise SelectionError(
            "no record has a reference load: they were made by version 0.1.0, or predicted"
        )
    # Records of a round share their loads.
    loads = loads.unique(["run_id", "group_id", "load", "rate"], keep="first", maintain_order=True)
    several = loads.select(ALIKE).n_unique() > 1
    named = pl.format("{}, {} × {}, {} threads", "run_id", "device_count", "device", "threads")
    half = pl.col("spread").fill_null(0.0) / 2
    relative = pl.col("rate") / pl.col("rate").median().over("load", *ALIKE)
    return (
        loads.with_columns(
            line=pl.coalesce(named, "run_id") if several else pl.col("run_id"),
            minutes=(pl.col("at") - pl.col("at").min().over("run_id")).dt.total_milliseconds()
            / 60_000,
            relative=relative,
            low=relative * (1 - half),
            high=relative * (1 + half),
        )
        .select(
            *("load", "run_id", "line", "minutes", "rate", "unit", "relative", "low", "high"),
            *("spread", "trial_id", *ALIKE),
        )
        .sort("load", "line", "minutes")
    )


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per load, a row per line: how many loads, median, lowest, highest."""
    tables = []
    for name, words in _WORDS.items():
        rows = frame.filter(pl.col("load") == name)
        if rows.is_empty():
            continue
        lines = rows.group_by("line", maintain_order=True).agg(
            pl.len(), median=pl.col("rate").median(), low=pl.col("rate").min(), high=_MOST
        )
        tables.append(
            Pivot(
                title=f"{words}, {rows['unit'][0]}",
                corner="run",
                columns=("loads", "median", "lowest", "highest"),
                rows=tuple(
                    (row["line"], str(row["len"]), *(f"{row[one]:.3g}" for one in _ENDS))
                    for row in lines.iter_rows(named=True)
                ),
            )
        )
    return tables


_MOST, _ENDS = pl.col("rate").max(), ("median", "low", "high")


def insight(frame: pl.DataFrame) -> str:
    """How far the machine went from its usual speed, within runs and between them, against the
    noise of a load."""
    sentences = []
    for name, words in _WORDS.items():
        rows = frame.filter(pl.col("load") == name)
        if rows.is_empty():
            continue
        lines = rows.group_by("line", maintain_order=True).agg(
            within=pl.col("relative").max() - pl.col("relative").min(),
            median=pl.col("relative").median(),
        )
        noise = rows.get_column("spread").median()
        within = lines.sort("within", descending=True).row(0, named=True)
        clauses = [f"up to {percent(within['within'])} within a run ({within['line']})"]
        if len(lines) > 1:
            medians = lines.get_column("median")
            apart: Any = medians.max() - medians.min()  # type: ignore[operator]
            clauses.append(f"{percent(apart)} between runs")
        told = "" if noise is None else f"; the quartiles of one load are {percent(noise)} apart"  # type: ignore[arg-type]
        sentences.append(f"{words} drifted by {enumeration(clauses)}{told}.")
    return " ".join(sentences)


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    devices = frame.get_column("device").drop_nulls().unique(maintain_order=True).to_list()
    long = frame.select(
        panel=pl.col("load").replace_strict(_WORDS),
        line="line",
        dash=pl.lit(""),
        x="minutes",
        y="relative",
        low="low",
        high="high",
    ).sort(pl.col("panel") != _WORDS["bandwidth"], maintain_order=True)
    return draw(
        long,
        title=_TITLE,
        subtitle=[", ".join(map(str, devices))] if devices else [],
        notes=[insight(frame), "Bars: quartiles of a load's own repeats."],
        x=Axis(title="Minutes since the run's first load", form=",~r"),
        y=Axis(title="Rate over the usual rate", form=",~r"),
        lines="Run",
    )


DRIFT = RecordsFigure(
    name="drift",
    aliases=(),
    title=_TITLE,
    paper="none; for judging all others",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
