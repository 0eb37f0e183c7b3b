"""Time to first token, between tokens, and to the end: a panel each, a bar per model.

MoE-Inference-Bench, Figure 3. It has ITL by its Eq 1, which divides by the tokens of the whole
batch, so that it falls as the batch grows; `itl_paper_s` is that. Beside it in the tables and the
CSV stand the true median gap between tokens of one request (`itl_s`) and the time to the first
token from stamps (`ttft_s`), which the paper measures by a run of one token (`ttft_paper_s`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import polars as pl

from analysis.conditions import CONDITIONS, refuse_mixed, refuse_repeated
from analysis.drift import CARRIED
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import MISSING, feasible, percent
from analysis.keys import MODEL, enumeration
from analysis.marks import COLUMNS as MARKED
from analysis.marks import mark

if TYPE_CHECKING:
    import altair as alt

TITLE = "Latency by model"
METRICS = {
    "ttft_paper_s": ("Time to first token (ms)", 1000.0),
    "itl_paper_s": ("Inter-token latency by Eq 1 (ms)", 1000.0),
    "e2e_s": ("End-to-end time (s)", 1.0),
}
"""The paper's three, in its order: the title of the axis, and its units in a second."""
_SHORT = {
    "ttft_paper_s": "time to first token",
    "itl_paper_s": "inter-token latency",
    "e2e_s": "end-to-end time",
}
_MORE = ("ttft_s", "itl_s", "itl_p90_s", "itl_p99_s", "tpot_s", "e2e_s_ci_low", "e2e_s_ci_high")
_DRAWN = (
    "outcome",
    "outcome_reason",
    "oom_stage",
    *METRICS,
    *_MORE,
    "ci_level",
    "repeats",
    "params_total",
    "params_active",
    "memory_limit_gib",
    *MARKED,
    *CARRIED,
    "devices_label",
    "trial_id",
)


def prepare(records: pl.LazyFrame) -> pl.DataFrame:
    """One row per model: how it ended, its latencies in seconds, its conditions; by end-to-end
    time, models without one last.

    Raises:
        SelectionError: there is no feasible record, conditions differ, or several records share
            a model.
    """
    frame = feasible(records.drop_nulls("model").collect())
    if frame.is_empty():
        raise SelectionError("no records yet that have a model and are feasible")
    keys = (MODEL.column, *MODEL.follows)
    refuse_mixed(frame, varied=keys)
    refuse_repeated(frame, [MODEL.column])
    conditions = [name for name in CONDITIONS if name not in (MODEL.column, *_DRAWN)]
    return frame.select(MODEL.column, *_DRAWN, *conditions).sort(
        "e2e_s", MODEL.column, nulls_last=True
    )


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """One table: a row per model, a column per metric, milliseconds in the cells."""
    columns = {**_SHORT, "ttft_s": "the same by stamps", "itl_s": "median gap of a request"}
    rows = tuple(
        (str(row["model"]), *(_cell(row, column) for column in columns))
        for row in frame.iter_rows(named=True)
    )
    return [
        Pivot(title="Latency in ms", corner="model", columns=tuple(columns.values()), rows=rows)
    ]


def _cell(row: dict[str, object], column: str) -> str:
    value = row[column]
    if isinstance(value, float):
        shown = f"{1000 * value:,.3g}" if value < 0.1 else f"{1000 * value:,.0f}"
        return shown + mark(row)
    outcome = str(row["outcome"])
    return "OOM" if outcome == "oom" else MISSING.get(outcome, outcome)


def insight(frame: pl.DataFrame) -> str:
    """Of each metric the shortest and the longest, and how far they are apart."""
    sentences = []
    for column, words in _SHORT.items():
        ranked = frame.drop_nulls(column).sort(column)
        if len(ranked) < 2:
            continue
        first, last = ranked.row(0, named=True), ranked.row(-1, named=True)
        gap = percent(last[column] / first[column] - 1)
        sentences.append(
            f"{first['model']} has the shortest {words}, {last['model']} the longest, {gap} longer."
        )
    if not sentences:
        sentences.append("There are no two models to compare.")
    active = frame.drop_nulls(["e2e_s", "params_active"])
    differ = all(active.get_column(name).n_unique() > 1 for name in ("e2e_s", "params_active"))
    if len(active) > 2 and differ:
        rank = cast(
            float, active.select(pl.corr("e2e_s", "params_active", method="spearman")).item()
        )
        sentences.append(
            f"End-to-end time and active parameters rank alike by {rank:.2f} (Spearman)."
        )
    missing = frame.filter(pl.col("e2e_s").is_null())
    if len(missing):
        why = [
            f"{row['model']} ({MISSING.get(row['outcome'], row['outcome'])})"
            for row in missing.iter_rows(named=True)
        ]
        sentences.append(f"Without a value: {enumeration(why)}.")
    return " ".join(sentences)


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.latency_chart import draw  # altair is slow to import

    return draw(frame, title=TITLE, metrics=METRICS, insight=insight(frame))


LATENCY = RecordsFigure(
    name="latency",
    aliases=("fig3",),
    title=TITLE,
    paper="MoE-Inference-Bench, Figure 3",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
