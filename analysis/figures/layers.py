"""Parameters by part, of one layer of each kind and of the whole model, all and active.

MoE-Inference-Bench's Figure 1, from the configuration instead of from a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from analysis.breakdown import PARTS, breakdown
from analysis.figures.figure import CatalogueFigure, Pivot
from analysis.insights import percent
from analysis.keys import enumeration
from analysis.options import Options
from analysis.structures import architecture
from workers.moe.architecture import catalogue_name

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Layer-wise total and active parameters"
_MOE = ("routed experts", "shared experts", "router")
_HALF = 0.5


def prepare(options: Options) -> pl.DataFrame:
    """Rows of `analysis.breakdown.breakdown`, of every model asked for."""
    return pl.concat(
        [breakdown(catalogue_name(name) or name, architecture(name)) for name in options.models]
    )


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per model: a row per part, millions of parameters in the cells."""
    tables = []
    for model, rows in _by_model(frame):
        kinds = rows.get_column("layers").unique(maintain_order=True).to_list()
        columns = [f"{kind}\n{use}" for kind in kinds for use in ("all", "active")]
        cells = {
            (row["part"], f"{row['layers']}\n{use}"): f"{row[column] / 1e6:,.3f}"
            for row in rows.iter_rows(named=True)
            for use, column in (("all", "params_total"), ("active", "params_active"))
        }
        whole = {
            use: _whole(rows, column)
            for use, column in (("all", "params_total"), ("active", "params_active"))
        }
        tables.append(
            Pivot(
                title=f"{model}: millions of parameters, of one layer of each kind",
                corner="part",
                columns=(*columns, "model\nall", "model\nactive"),
                rows=tuple(
                    (
                        part,
                        *(cells.get((part, column), "") for column in columns),
                        *(f"{whole[use].get(part, 0) / 1e6:,.3f}" for use in whole),
                    )
                    for part in PARTS
                    if part in whole["all"]
                ),
            )
        )
    return tables


def insight(frame: pl.DataFrame) -> str:
    """What holds the parameters, all and active, and whether that is the MoE layers."""
    clauses: list[str] = []
    dominated: list[str] = []
    not_dominated: list[str] = []
    for model, rows in _by_model(frame):
        total, active = _whole(rows, "params_total"), _whole(rows, "params_active")
        held, used = (
            sum(found.get(part, 0) for part in _MOE) / sum(found.values())
            for found in (total, active)
        )
        clauses.append(
            f"{percent(held)} of the {_billions(sum(total.values()))} parameters of {model} "
            f"and {percent(used)} of the {_billions(sum(active.values()))} that one token uses"
        )
        (dominated if min(held, used) > _HALF else not_dominated).append(model)
    sentences = [f"Experts and their routers hold {'; '.join(clauses)}."]
    claim = "That MoE layers dominate both (as the paper says)"
    if dominated:
        sentences.append(f"{claim} holds for {enumeration(dominated)}.")
    if not_dominated:
        claim = "It" if dominated else claim
        sentences.append(f"{claim} does not hold for {enumeration(not_dominated)}.")
    sentences.append("Counted from configurations, not measured.")
    return " ".join(sentences)


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.layers_chart import draw  # altair is slow to import

    return draw(frame, title=_TITLE, insight=insight(frame))


def _by_model(frame: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    return [(str(name), rows) for (name,), rows in frame.group_by("model", maintain_order=True)]


def _whole(rows: pl.DataFrame, column: str) -> dict[str, int]:
    """Parameters of the whole model by part."""
    sums = rows.group_by("part").agg((pl.col("count") * pl.col(column)).sum())
    found = dict(sums.iter_rows())
    return {part: found[part] for part in PARTS if part in found}


def _billions(params: int) -> str:
    return f"{params / 1e9:,.2f} billion"


LAYERS = CatalogueFigure(
    name="layer-breakdown",
    aliases=("mib-fig1",),
    title=_TITLE,
    paper="MoE-Inference-Bench, Figure 1",
    takes=("models",),
    defaults=Options(models=("mixtral-8x7b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b")),
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
