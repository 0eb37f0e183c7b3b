"""Share of a model that a batch activates, as traced, beside the uniform bound.

MoE-CAP §4.3 (its Figure 6) draws it from traces; the catalogue figure `sparsity` computes the
bound for models that nobody ran here. This one has both for trials that were probed. The share
follows from the record alone: what is not a routed expert is always used, so with d of E
experts per layer it is (always + d·expert)/total, and total and active parameters give both
parts. All parameters count, embedding and head included.

Where the sweep chose the routing (zipf:A, all-to-one), its expectation is known too
(`workers.moe.skew`) and stands beside the trace: it says whether the engine routed as asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.conditions import refuse_mixed, refuse_repeated
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.keys import enumeration
from analysis.marks import COLUMNS as MARKED
from analysis.traces import SHOWN, VARIED, series, under_title, with_optional
from workers.moe.accounting import distinct_experts
from workers.moe.skew import curve, parse

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Parameters that a decode pass activates, as traced"
_TRACED, _UNIFORM, _ASKED = "traced", "uniform bound", "expected of its routing"


def prepare(records: pl.LazyFrame) -> pl.DataFrame:
    """A row per series and batch.

    `experts` (distinct per MoE layer and decode pass, as traced), `experts_uniform` (the
    expectation of that batch), `experts_asked` (the expectation of the routing that the sweep
    chose; null for the model's own), `share`, `share_uniform` and `share_asked` (of all
    parameters, 0 to 1), and the conditions.

    Raises:
        SelectionError: no record was traced, conditions differ, or several share a point.
    """
    needed = ("activated_experts_decode", "num_experts", "top_k", "params_total", "params_active")
    frame = (
        with_optional(records)
        .drop_nulls([*needed, "batch_size"])
        .filter(pl.col("activation_source") == "traced", pl.col("num_experts") > pl.col("top_k"))
        .collect()
    )
    if frame.is_empty():
        raise SelectionError("no record has traced experts: measure with measure.activation: true")
    refuse_mixed(frame, varied=(*VARIED, "batch_size"))
    refuse_repeated(frame, [*VARIED, "batch_size"])
    uniform = pl.struct("num_experts", "top_k", "batch_size").map_elements(
        lambda row: distinct_experts(row["num_experts"], row["top_k"], row["batch_size"]),
        return_dtype=pl.Float64,
    )
    spare = pl.col("params_total") - pl.col("params_active")
    each = spare / (pl.col("num_experts") - pl.col("top_k"))

    def share(experts: str) -> pl.Expr:
        unused = (pl.col("num_experts") - pl.col(experts)) * each
        return 1 - unused / pl.col("params_total")

    conditions = [one for one in SHOWN if one != "batch_size"]
    return (
        frame.with_columns(
            series=series(frame),
            experts=pl.col("activated_experts_decode"),
            experts_uniform=uniform,
            experts_asked=pl.Series(
                [_asked(row) for row in frame.iter_rows(named=True)], dtype=pl.Float64
            ),
        )
        .with_columns(
            share=share("experts"),
            share_uniform=share("experts_uniform"),
            share_asked=share("experts_asked"),
        )
        .select(
            "series",
            "batch_size",
            "experts",
            "experts_uniform",
            "experts_asked",
            "share",
            "share_uniform",
            "share_asked",
            "params_total",
            "params_active",
            *conditions,
            "devices_label",
            "memory_limit_gib",
            *MARKED,
            "trial_id",
        )
        .sort("series", "batch_size")
    )


def _asked(row: dict[str, Any]) -> float | None:
    """Experts of a batch by the law that the sweep chose; null where it chose none we know."""
    if row["routing"] is None:
        return None
    try:
        skew = parse(row["routing"])
    except ValueError:
        return None
    return float(curve(skew, row["num_experts"], row["top_k"], row["batch_size"]))


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series, a column per batch."""
    tables = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        rows = [
            (words, *(form.format(value) for value in one.get_column(column)))
            for column, words, form in (
                ("share", "share traced", "{:.2%}"),
                ("share_uniform", "share, uniform bound", "{:.2%}"),
                ("experts", "experts per layer, traced", "{:.2f}"),
                ("experts_uniform", "experts per layer, uniform", "{:.2f}"),
                ("experts_asked", "experts per layer, of its routing", "{:.2f}"),
            )
            if one.get_column(column).count()
        ]
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
    """How far below the bound the traces lie, and where most."""
    sentences = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        gap = one.with_columns(gap=pl.col("share_uniform") - pl.col("share"))
        first, widest = one.row(0, named=True), gap.sort("gap").row(-1, named=True)
        words = f"{name} activates {100 * first['share']:.1f} % of its parameters at batch "
        words += f"{first['batch_size']}"
        if len(one) > 1:
            last = one.row(-1, named=True)
            words += f" and {100 * last['share']:.1f} % at batch {last['batch_size']}"
        words += (
            f"; furthest below uniform routing it is at batch {widest['batch_size']} "
            f"({100 * widest['share']:.1f} % against {100 * widest['share_uniform']:.1f} %)."
            if widest["gap"] > 0
            else "; nowhere below uniform routing."
        )
        sentences.append(words)
    asked = frame.drop_nulls("experts_asked")
    if len(asked):
        off = (pl.col("experts") / pl.col("experts_asked") - 1).abs()
        far = asked.with_columns(off=off).sort("off").row(-1, named=True)
        sentences.append(
            f"Routing that the sweep chose activates what its law expects, to within "
            f"{100 * far['off']:.1f} % ({far['series']}, batch {far['batch_size']})."
        )
    above = frame.filter(pl.col("experts") > pl.col("experts_uniform") * 1.001)
    if len(above):
        places = [
            f"{name} at batch {batch}"
            for name, batch in above.select("series", "batch_size").iter_rows()
        ]
        sentences.append(
            f"Above the bound, which holds in the mean and for independent tokens: "
            f"{enumeration(places)}."
        )
    return " ".join(sentences)


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    long = (
        frame.select(
            line="series",
            x="batch_size",
            **{_TRACED: "share", _UNIFORM: "share_uniform", _ASKED: "share_asked"},
        )
        .unpivot(
            [_TRACED, _UNIFORM, _ASKED],
            index=["line", "x"],
            variable_name="dash",
            value_name="y",
        )
        .drop_nulls("y")
        .with_columns(panel=pl.lit(""))
    )
    return draw(
        long,
        title=_TITLE,
        subtitle=[*under_title(frame), "Experts as traced by a probe; bound: uniform routing"],
        notes=[insight(frame)],
        x=Axis(title="Batch size (sequences decoded together)", doublings=True),
        y=Axis(title="Share of parameters activated", form=".0%", top=1.0),
        dashes="Experts",
        marked=_TRACED,
    )


SPARSITY_TRACED = RecordsFigure(
    name="sparsity-traced",
    aliases=(),
    title=_TITLE,
    paper="MoE-CAP, Figure 6",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
