"""Bandwidth utilisation by batch: what vanilla MBU overstates where few experts run.

MoE-CAP A.4 and A.5 (its Figures 8 and 9) set the memory that vanilla MBU and S-MBU account for
against what a profiler saw, layer by layer. Here the same two accounts stand over one measured
time, so their ratio is that of the bytes: MBU counts every weight, S-MBU those of the experts
that ran, Eq 4 exactly or with every byte of a pass. Above 1 an account says more than
the device can deliver, and so is refuted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from analysis.conditions import constant, refuse_mixed, refuse_repeated
from analysis.drift import CARRIED
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import percent
from analysis.keys import enumeration
from analysis.marks import COLUMNS as MARKED
from analysis.marks import mark
from analysis.traces import SHOWN, VARIED, series, under_title, with_optional

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Bandwidth utilisation of decoding against batch size"
LINES = {
    "mbu": "MBU, every weight",
    "s_mbu": "S-MBU, every byte that is read",
    "s_mbu_paper": "S-MBU, MoE-CAP Eq 4",
}
_SOURCES = {
    "traced": "Experts as traced by a probe",
    "routing": "Experts as expected of the routing that the sweep forced",
    "sheet": "Experts of activation sheets, as an earlier probe traced them",
    "sheet-interpolated": "Experts interpolated between two batches of activation sheets",
    "uniform": "Experts as under uniform routing, an upper bound for independent tokens",
    "dense": "No routed experts: all weights are always read",
}


def prepare(records: pl.LazyFrame) -> pl.DataFrame:
    """A row per series and batch: the three utilisations (0 to 1 and above), `overstated`
    (MBU over S-MBU, less 1), the experts behind them, and the conditions.

    Raises:
        SelectionError: no record has them, conditions differ, or several share a point.
    """
    frame = with_optional(records).drop_nulls([*LINES, "batch_size"]).collect()
    if frame.is_empty():
        raise SelectionError(f"no records yet that have mbu, s_mbu and s_mbu_paper{_why(records)}")
    refuse_mixed(frame, varied=(*VARIED, "batch_size"))
    refuse_repeated(frame, [*VARIED, "batch_size"])
    drawn = [
        "activation_source",
        "activated_experts_decode",
        "peak_bandwidth_gb_s",
        "peak_source",
        "devices_label",
        "memory_limit_gib",
        *MARKED,
        *CARRIED,
        "trial_id",
    ]
    conditions = [one for one in SHOWN if one != "batch_size"]
    overstated = pl.col("mbu") / pl.col("s_mbu") - 1
    return (
        frame.with_columns(series=series(frame))
        .select("series", "batch_size", *LINES, overstated.alias("overstated"), *drawn, *conditions)
        .sort("series", "batch_size")
    )


def _why(records: pl.LazyFrame) -> str:
    """The first reason for which a measured trial has none; empty without one."""
    told = pl.col("outcome_reason").is_not_null() & pl.col("mbu").is_not_null()
    found = records.filter(told).select("outcome_reason").first().collect()
    return "" if found.is_empty() else f": {found.item()}"


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series, a column per batch."""
    tables = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        rows = [
            (words, *(f"{row[column]:.1%}{mark(row)}" for row in one.iter_rows(named=True)))
            for column, words in LINES.items()
        ]
        rows.append(
            ("overstated by MBU", *(f"{value:+.0%}" for value in one.get_column("overstated")))
        )
        tables.append(
            Pivot(
                title=str(name),
                corner="batch",
                columns=tuple(str(batch) for batch in one.get_column("batch_size")),
                rows=tuple(rows),
            )
        )
    return tables


def insight(frame: pl.DataFrame) -> str:
    """What MBU overstates at the smallest and the largest batch, and where it exceeds 1."""
    sentences = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        ends = one.rows(named=True)
        ends = [ends[0], ends[-1]] if len(ends) > 1 else ends
        words = [
            f"{100 * row['s_mbu']:.1f} % of the peak by S-MBU and {100 * row['mbu']:.1f} % by MBU, "
            f"{_more(row['overstated'])}, at batch {row['batch_size']}"
            for row in ends
        ]
        sentences.append(f"{name} reaches {'; '.join(words)}.")
        above = one.filter(pl.col("mbu") > 1).get_column("batch_size").to_list()
        if above:
            sentences.append(
                f"Its MBU at batch {enumeration([str(batch) for batch in above])} is more than the "
                "device can deliver."
            )
    sentences.append(f"{enumeration(_behind(frame))}.")
    return " ".join(sentences)


def _more(overstated: float) -> str:
    if abs(overstated) < 0.005:
        return "the same"
    return f"{percent(overstated)} {'more' if overstated > 0 else 'less'}"


def _behind(frame: pl.DataFrame) -> list[str]:
    """Where the number of experts comes from, in words."""
    found = frame.get_column("activation_source").unique().sort().to_list()
    if len(found) == 1:
        return [_source(found[0])]
    named = frame.group_by("activation_source", maintain_order=True).agg(
        pl.col("batch_size").unique().sort()
    )
    return [
        f"{_source(source)} (batch {enumeration([str(one) for one in batches])})"
        for source, batches in named.iter_rows()
    ]


def _source(source: str | None) -> str:
    """In words; records of older versions may not say it."""
    return _SOURCES.get(source or "", f"Experts: {source or 'of an unknown source'}")


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    long = frame.select(
        panel="series",
        x="batch_size",
        ring="disturbed",
        untuned="untuned",
        **{words: column for column, words in LINES.items()},
    ).unpivot(
        list(LINES.values()),
        index=["panel", "x", "ring", "untuned"],
        variable_name="line",
        value_name="y",
    )
    predicted = constant(frame, "source") == "predicted"
    peak = {
        "calibrated": "calibrated",
        "calibrated-disturbed": "calibrated while disturbed",
        "catalogue": "data sheet",
    }.get(str(constant(frame, "peak_source")), "peak")
    return draw(
        long.with_columns(dash=pl.lit("")),
        title=_TITLE,
        subtitle=[*under_title(frame), *_behind(frame)],
        notes=[insight(frame)],
        x=Axis(title="Batch size", doublings=True),
        y=Axis(
            title=f"{'Predicted share' if predicted else 'Share'} of peak bandwidth ({peak})",
            form=".0%",
        ),
    )


S_MBU_BATCH = RecordsFigure(
    name="s-mbu-batch",
    aliases=("cap-fig8", "cap-fig9"),
    title=_TITLE,
    paper="MoE-CAP, Figures 8 and 9",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
