"""What pruning of experts does to throughput, over the experts that a token uses.

MoE-Inference-Bench, Figure 11: a panel per model and kind of pruning, a line per ratio, top-k
along the axis. The unpruned model stands in both panels of its model, since both are compared
with it. Pruning changes the shape of a model, so shape is no condition here: what ran stands
in every row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.conditions import CONDITIONS, refuse_mixed, refuse_repeated
from analysis.drift import CARRIED
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import MISSING, feasible, percent
from analysis.marks import COLUMNS as MARKED
from analysis.marks import mark
from analysis.subtitle import subtitle

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Throughput with pruned experts against active experts"
_KEYS = ("model", "prune_kind", "prune_ratio", "top_k")
_SHAPE = ("num_layers", "hidden_size", "ffn_dim", "num_experts", "shared_experts")
_DRAWN = (
    "outcome",
    "throughput_tok_s",
    "throughput_tok_s_ci_low",
    "throughput_tok_s_ci_high",
    "outcome_reason",
    "params_total",
    "params_active",
    "memory_limit_gib",
    *MARKED,
    *CARRIED,
    "devices_label",
    "trial_id",
)
_WORDS = {"inter": "fewer experts", "intra": "narrower experts"}


def prepare(records: pl.LazyFrame) -> pl.DataFrame:
    """A row per panel and point: `model`, `prune_kind`, `prune_ratio` (0 is unpruned), `top_k`,
    `line` (the ratio in words), how it ended, its figures, its shape, its conditions.

    Raises:
        SelectionError: no trial was pruned, conditions differ, or several records share a
            point.
    """
    whole_or_told = pl.col("prune_kind").is_null() == pl.col("prune_ratio").is_null()
    frame = records.drop_nulls(["model", "top_k"]).filter(whole_or_told).collect()
    kinds = frame.get_column("prune_kind").drop_nulls().unique().sort().to_list()
    if not kinds:
        raise SelectionError("no record of a pruned model: sweep model.prune")
    criteria = frame.get_column("prune_criterion").drop_nulls().n_unique()
    alone = () if criteria > 1 else ("prune_criterion",)  # unpruned models have none
    refuse_mixed(frame, varied=(*_KEYS, *_SHAPE, *alone))
    refuse_repeated(frame, _KEYS)
    if feasible(frame).is_empty():
        raise SelectionError("every point is infeasible: there is nothing to draw")
    whole = frame.filter(pl.col("prune_kind").is_null()).drop("prune_kind")
    both = whole.join(pl.DataFrame({"prune_kind": kinds}), how="cross").select(frame.columns)
    shown = pl.concat([both, frame.drop_nulls("prune_kind")]).with_columns(
        pl.col("prune_ratio").fill_null(0.0)
    )
    ratio = pl.col("prune_ratio")
    conditions = [name for name in CONDITIONS if name not in (*_KEYS, *_SHAPE)]
    return (
        shown.with_columns(line=pl.when(ratio == 0).then(pl.lit("unpruned")).otherwise(_share()))
        .select(*_KEYS, "line", *_DRAWN, *_SHAPE, *conditions)
        .sort(_KEYS)
    )


def _share() -> pl.Expr:
    """`12.5 %` removed."""
    return pl.format(
        "{} % removed",
        (100 * pl.col("prune_ratio"))
        .round(2)
        .map_elements(lambda share: f"{share:g}", return_dtype=pl.String),
    )


def _panels(frame: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Feasible points, by model and kind."""
    several = frame.get_column("model").n_unique() > 1
    return [
        (f"{f'{model}, ' if several else ''}{kind} ({_WORDS[str(kind)]})", rows)
        for (model, kind), rows in feasible(frame).group_by(
            "model", "prune_kind", maintain_order=True
        )
    ]


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per panel: a row per ratio, a column per top-k, tokens per second in the cells."""
    tables = []
    for name, rows in _panels(frame):
        columns = rows.get_column("top_k").unique().sort().to_list()
        lines = []
        for (line,), one in rows.group_by("line", maintain_order=True):
            first = one.row(0, named=True)
            cells = {row["top_k"]: _cell(row) for row in one.iter_rows(named=True)}
            sizes = [first["num_experts"], first["ffn_dim"]]
            shape = "" if None in sizes else f" ({sizes[0]} × {sizes[1]})"
            lines.append((f"{line}{shape}", *(cells.get(value, "") for value in columns)))
        tables.append(
            Pivot(
                title=name,
                corner="top-k",
                columns=tuple(str(value) for value in columns),
                rows=tuple(lines),
            )
        )
    return tables


def _cell(row: dict[str, Any]) -> str:
    value = row["throughput_tok_s"]
    if value is None:
        return MISSING.get(row["outcome"], str(row["outcome"]))
    low, high = row["throughput_tok_s_ci_low"], row["throughput_tok_s_ci_high"]
    shown = f"{value:,.0f}{mark(row)}"
    if low is None or high is None:
        return shown
    return f"{shown} ±{percent((high - low) / 2 / value)}"


def insight(frame: pl.DataFrame) -> str:
    """Per panel the change that each ratio makes at the largest top-k that it shares with the
    unpruned model, and in how many points pruning is slower than no pruning."""
    sentences = [_panel_insight(name, rows) for name, rows in _panels(frame)]
    predicted = frame.get_column("source").eq("predicted").all()
    quantity = "predicted throughput" if predicted else "throughput"
    found = " ".join(filter(None, sentences))
    if not found:
        return "No pruned point has an unpruned one to compare with."
    missing = feasible(frame).filter(pl.col("throughput_tok_s").is_null())
    holes = missing.unique("trial_id").height
    words = [f"Change of {quantity} by pruning. {found}"]
    if holes:
        words.append(f"{holes} point{' has' if holes == 1 else 's have'} no value.")
    if refused := frame.filter(outcome="infeasible").unique("trial_id").height:
        are = "point is" if refused == 1 else "points are"
        words.append(f"{refused} {are} infeasible and left out.")
    return " ".join(words)


def _panel_insight(name: str, rows: pl.DataFrame) -> str:
    pairs = compared(rows)
    if pairs.is_empty():
        return ""
    most = pairs.filter(pl.col("top_k") == pl.col("top_k").max().over("prune_ratio"))
    clauses = []
    for (top_k,), one in most.group_by("top_k", maintain_order=True):
        words = [
            f"{row['change'] * 100:+.1f} % with {row['line']}{_certain(row['apart'])}"
            for row in one.sort("prune_ratio").iter_rows(named=True)
        ]
        clauses.append(f"at top-k {top_k} {', '.join(words)}")
    slower = pairs.filter(pl.col("change") < 0)
    known = int(slower.get_column("apart").fill_null(False).sum())
    share = f"{slower.height} of {pairs.height} pruned points are slower than the unpruned model"
    beyond = f", {known} by more than the confidence intervals" if slower.height else ""
    return f"{name}: {'; '.join(clauses)}; {share}{beyond}."


def _certain(apart: bool | None) -> str:
    return " (within the confidence intervals)" if apart is False else ""


def compared(rows: pl.DataFrame) -> pl.DataFrame:
    """Of one panel, a row per pruned point with the unpruned one of its top-k: `change` of
    throughput (a share) and `apart`, whether their intervals do not overlap (null without)."""
    value, low, high = (f"throughput_tok_s{end}" for end in ("", "_ci_low", "_ci_high"))
    points = rows.drop_nulls(value)
    whole = points.filter(pl.col("prune_ratio") == 0).select("top_k", value, low, high)
    return (
        points.filter(pl.col("prune_ratio") > 0)
        .join(whole, on="top_k", suffix="_whole")
        .with_columns(
            change=pl.col(value) / pl.col(f"{value}_whole") - 1,
            apart=(pl.col(high) < pl.col(f"{low}_whole")) | (pl.col(low) > pl.col(f"{high}_whole")),
        )
        .sort("prune_ratio", "top_k")
    )


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    predicted = frame.get_column("source").eq("predicted").all()
    long = pl.concat(
        rows.select(
            panel=pl.lit(name),
            line="line",
            dash=pl.lit(""),
            x="top_k",
            y="throughput_tok_s",
            ring="disturbed",
            untuned="untuned",
        )
        for name, rows in _panels(frame)
    )
    return draw(
        long,
        title=_TITLE,
        subtitle=subtitle(feasible(frame)),
        notes=[insight(frame), "Points are medians. A line breaks where a point has no value."],
        x=Axis(title="Active experts per token (top-k)", whole=True, low=None),
        y=Axis(
            title=f"{'Predicted throughput' if predicted else 'Throughput'} (tokens/s)",
            form=",~f",
        ),
        lines="Pruning",
    )


PRUNING = RecordsFigure(
    name="pruning",
    aliases=("fig11",),
    title=_TITLE,
    paper="MoE-Inference-Bench, Figure 11",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
