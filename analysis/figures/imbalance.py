"""How unevenly experts are loaded, layer by layer, and what that costs.

Two figures. `imbalance` shows the four figures of `workers.moe.balance` over the layers.
`routing-cost` sets the throughput of trials that differ in routing against the imbalance that
their probes counted: timed passes carry no probe, so speed and imbalance come from different
passes of the same prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, TracedFigure
from analysis.keys import enumeration
from analysis.traces import PHASES, SHOWN, balances, counts, series, under_title
from workers.moe.balance import MEASURES

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Load imbalance over experts by layer"
_COST = "Throughput against load imbalance"
_WORDS = {
    "max_over_mean": "Fullest expert over mean",
    "variation": "Coefficient of variation",
    "entropy": "Entropy (1 is even)",
    "gini": "Gini coefficient",
}


def prepare(records: pl.LazyFrame, activations: pl.LazyFrame) -> pl.DataFrame:
    """A row per series, phase and MoE layer: the figures, `tokens`, ranks where experts are
    spread over them, and the conditions.

    Raises:
        SelectionError: see `analysis.traces.counts`.
    """
    return _chosen(balances(counts(records, activations)))


def _chosen(frame: pl.DataFrame, *more: str) -> pl.DataFrame:
    figures = ("tokens", *MEASURES, "ranks", "rank_max_over_mean")
    shown = ["series", "phase", "layer", *figures, *more]
    conditions = [one for one in SHOWN if one not in shown]
    return frame.select(*shown, *conditions, "devices_label", "memory_limit_gib", "trial_id")


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series and phase, a row per layer."""
    tables = []
    for (name, phase), one in frame.group_by("series", "phase", maintain_order=True):
        spread = one.get_column("ranks").count() > 0
        columns = (*MEASURES, "rank_max_over_mean") if spread else MEASURES
        rows = tuple(
            (f"layer {row['layer']}", *(_number(row[column]) for column in columns))
            for row in one.iter_rows(named=True)
        )
        words = [_WORDS.get(column, "Fullest rank over mean") for column in columns]
        tables.append(
            Pivot(title=f"{name}, {phase}", corner="layer", columns=tuple(words), rows=rows)
        )
    return tables


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def insight(frame: pl.DataFrame) -> str:
    """Of each series and phase the mean over layers and the worst layer; ranks beside them."""
    sentences = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        words = [_phase(phase, one.filter(pl.col("phase") == phase)) for phase in PHASES]
        if found := list(filter(None, words)):
            sentences.append(f"{name}: {'; '.join(found)}.")
    return " ".join(sentences) or "No layer saw a token."


def _phase(phase: str, rows: pl.DataFrame) -> str:
    used = rows.drop_nulls("max_over_mean")
    if used.is_empty():
        return ""
    worst = used.sort("max_over_mean").row(-1, named=True)
    mean = _mean(used, "max_over_mean")
    words = (
        f"in {phase} the fullest expert has {mean:.2f} times the mean "
        f"(worst in layer {worst['layer']}, {worst['max_over_mean']:.2f}), "
        f"Gini {_mean(used, 'gini'):.2f}"
    )
    ranks = used.get_column("ranks").max()
    if isinstance(ranks, int):
        words += f", the fullest of {ranks} ranks {_mean(used, 'rank_max_over_mean'):.2f} times"
    return words


def _mean(rows: pl.DataFrame, column: str) -> float:
    """Mean over layers that saw tokens; not a mean over dense ones."""
    found = rows.get_column(column).mean()
    assert isinstance(found, float)
    return found


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    long = (
        frame.select(
            line="series",
            dash="phase",
            x="layer",
            **{words: column for column, words in _WORDS.items()},
        )
        .unpivot(
            list(_WORDS.values()),
            index=["line", "dash", "x"],
            variable_name="panel",
            value_name="y",
        )
        .drop_nulls("y")
    )
    return draw(
        long,
        title=_TITLE,
        subtitle=under_title(frame),
        notes=[insight(frame)],
        x=Axis(title="Layer", whole=True, low=None),
        y=Axis(title=""),
        shared=False,
        dashes="Phase",
    )


def prepare_cost(records: pl.LazyFrame, activations: pl.LazyFrame) -> pl.DataFrame:
    """A row per trial with a throughput: its routing, the means over MoE layers of the figures
    of its decode passes (of prefill where it has no other), and the conditions.

    `series` names all but the routing.

    Raises:
        SelectionError: see `analysis.traces.counts`; or no trial has a throughput.
    """
    figures = [*MEASURES, "rank_max_over_mean"]
    frame = balances(counts(records, activations, varied=("batch_size",)))
    frame = frame.drop_nulls("throughput_tok_s").drop_nulls("max_over_mean")
    if frame.is_empty():
        raise SelectionError("no record with expert counts has a throughput")
    phases = pl.col("phase").unique().over("run_id", "trial_id", mapping_strategy="join")
    frame = frame.filter((pl.col("phase") == "decode") | phases.list.contains("decode").not_())
    name = series(frame, without=("routing",))
    if frame.get_column("batch_size").n_unique() > 1:
        name = pl.format("{}, batch {}", name, "batch_size")
    means = frame.group_by("run_id", "trial_id", maintain_order=True).agg(
        pl.col(figures).mean(), layers=pl.len()
    )
    rest = frame.with_columns(series=name).drop(*figures, "layer", "tokens")
    one = rest.unique(["run_id", "trial_id"], keep="first", maintain_order=True).join(
        means, on=["run_id", "trial_id"], how="left", maintain_order="left"
    )
    ends = [f"throughput_tok_s{end}" for end in ("", "_ci_low", "_ci_high")]
    shown = ["series", "routing", "phase", "layers", *figures, "ranks", *ends]
    conditions = [one for one in SHOWN if one not in shown]
    return one.select(*shown, *conditions, "devices_label", "memory_limit_gib", "trial_id").sort(
        "batch_size", "series", "max_over_mean"
    )


def pivots_cost(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series, a row per routing."""
    return [
        Pivot(
            title=str(name),
            corner="routing",
            columns=("tokens/s", *_WORDS.values()),
            rows=tuple(
                (
                    _routing(row),
                    f"{row['throughput_tok_s']:,.0f}",
                    *(_number(row[column]) for column in MEASURES),
                )
                for row in one.iter_rows(named=True)
            ),
        )
        for (name,), one in frame.group_by("series", maintain_order=True)
    ]


def _routing(row: dict[str, Any]) -> str:
    return str(row["routing"] or "own router")


def insight_cost(frame: pl.DataFrame) -> str:
    """The change of throughput from the most even routing to the least, by series."""
    sentences = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        first, last = one.row(0, named=True), one.row(-1, named=True)
        words = (
            f"{_routing(first)} (fullest expert {first['max_over_mean']:.2f} times the mean): "
            f"{first['throughput_tok_s']:,.0f} tokens/s"
        )
        if len(one) == 1:
            sentences.append(f"{name}, {words}; one routing is no comparison.")
            continue
        change = last["throughput_tok_s"] / first["throughput_tok_s"] - 1
        apart = _apart(first, last)
        sentences.append(
            f"{name}, from {words}, to {_routing(last)} ({last['max_over_mean']:.2f} times): "
            f"{last['throughput_tok_s']:,.0f}, {100 * change:+.1f} %{apart}."
        )
    phases = frame.get_column("phase").unique().sort().to_list()
    sentences.append(f"Imbalance is the mean over MoE layers, counted in {enumeration(phases)}.")
    return " ".join(sentences)


def _apart(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Whether the two intervals are apart; nothing where there are none."""
    ends = [row[f"throughput_tok_s_ci_{end}"] for row in (first, last) for end in ("low", "high")]
    if None in ends:
        return ""
    low, high, other_low, other_high = ends
    apart = other_high < low or other_low > high
    return f", {'more' if apart else 'no more'} than the confidence intervals"


def _chart_cost(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    predicted = frame.get_column("source").eq("predicted").all()
    long = frame.select(
        panel=pl.lit(""),
        line="series",
        dash=pl.lit(""),
        x="max_over_mean",
        y="throughput_tok_s",
        label=pl.col("routing").fill_null("own router"),
    )
    return draw(
        long,
        title=_COST,
        subtitle=[
            *under_title(frame),
            "Speed from timed passes, imbalance from a probe of the same prompts",
        ],
        notes=[insight_cost(frame)],
        x=Axis(
            title="Fullest expert over mean, mean of MoE layers (1 is even)", form="~g", low=1.0
        ),
        y=Axis(
            title=f"{'Predicted throughput' if predicted else 'Throughput'} (tokens/s)",
            form=",~f",
        ),
    )


IMBALANCE = TracedFigure(
    name="imbalance",
    aliases=(),
    title=_TITLE,
    paper="MoE-Inference-Bench §8.3, as figures of each layer",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
ROUTING_COST = TracedFigure(
    name="routing-cost",
    aliases=(),
    title=_COST,
    paper="neither paper; what imbalance costs",
    prepare=prepare_cost,
    chart=_chart_cost,
    pivots=pivots_cost,
    insight=insight_cost,
)
