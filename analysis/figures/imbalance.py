"""How unevenly experts are loaded, layer by layer, and what that costs.

Two figures. `imbalance` shows the figures of `workers.moe.balance` over the layers, of all
passes together, and beside them the fullest expert of each forward pass, which is what a pass
waits for: experts that take turns in being full are even over all and uneven in every pass. A
pass of few tokens cannot be even, whatever the router does (one token alone has E/k). What
ranks would have if experts were dealt to 2, 4 or 8 of them is computed from the counts of all
passes, so it is a lower bound of what single passes would wait for.

`routing-cost` sets the throughput of trials that differ in routing against the imbalance that
their probes counted: timed passes carry no probe, so speed and imbalance come from different
passes of the same prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.keys import enumeration
from analysis.marks import COLUMNS as MARKED
from analysis.traces import IF_SPREAD, PHASES, SHOWN, SPREADS, balances, counts, series, under_title
from workers.moe.balance import MEASURES

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Load imbalance over experts by layer"
_COST = "Throughput against load imbalance"
_MOST_TOLD = 4
"""Series of which each has a sentence; of more, only the most and the least even."""
_WORDS = {
    "pass_max_over_mean": "Fullest expert over mean, in each pass",
    "max_over_mean": "Fullest expert over mean, of all passes",
    "variation": "Coefficient of variation",
    "entropy": "Entropy (1 is even)",
    "gini": "Gini coefficient",
    **{
        column: f"Fullest of {number} ranks over mean, computed"
        for column, number in zip(IF_SPREAD, SPREADS, strict=True)
    },
}


def prepare(
    records: pl.LazyFrame, activations: pl.LazyFrame, samples: pl.LazyFrame
) -> pl.DataFrame:
    """A row per series, phase and MoE layer: the figures, `pass_max_over_mean`, `tokens`, ranks
    where experts are spread over them, and the conditions. Batches may differ.

    Raises:
        SelectionError: see `analysis.traces.counts`.
    """
    frame = balances(counts(records, activations, varied=("batch_size",)), samples)
    return _chosen(frame.with_columns(series=_by_batch(frame, pl.col("series"))))


def _by_batch(frame: pl.DataFrame, name: pl.Expr) -> pl.Expr:
    several = frame.get_column("batch_size").n_unique() > 1
    batch = pl.col("batch_size").cast(pl.String).fill_null("unknown")
    return pl.format("{}, batch {}", name, batch) if several else name


def _chosen(frame: pl.DataFrame, *more: str) -> pl.DataFrame:
    figures = ("tokens", *_WORDS, "ranks", "rank_max_over_mean")
    shown = ["series", "phase", "layer", *figures, *more]
    conditions = [one for one in SHOWN if one not in shown]
    return frame.select(
        *shown,
        *conditions,
        "devices_label",
        "memory_limit_gib",
        *MARKED,
        "trial_id",
    )


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series and phase, a row per layer."""
    tables = []
    for (name, phase), one in frame.group_by("series", "phase", maintain_order=True):
        spread = one.get_column("ranks").count() > 0
        known = [column for column in _WORDS if one.get_column(column).count()]
        columns = [*known, *(["rank_max_over_mean"] if spread else [])]
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
    if frame.get_column("series").n_unique() > _MOST_TOLD:
        sentences = list(filter(None, (_ends(frame, phase) for phase in PHASES)))
        frame_told = frame.clear()
    else:
        sentences, frame_told = [], frame
    for (name,), one in frame_told.group_by("series", maintain_order=True):
        words = [_phase(phase, one.filter(pl.col("phase") == phase)) for phase in PHASES]
        if found := list(filter(None, words)):
            sentences.append(f"{name}: {'; '.join(found)}.")
    if not sentences:
        return "No layer saw a token."
    if frame.get_column("pass_max_over_mean").count():
        sentences.append("A pass of few tokens is uneven under any router: one token has E/k.")
    sentences.append("Ranks are computed as if experts were dealt to so many: not measured.")
    return " ".join(sentences)


def _ends(frame: pl.DataFrame, phase: str) -> str:
    """The most and the least even of many series, by the mean over layers."""
    clauses = []
    for column, words in (
        ("pass_max_over_mean", "in each pass"),
        ("max_over_mean", "over all passes"),
    ):
        means = (
            frame.filter(pl.col("phase") == phase)
            .group_by("series", maintain_order=True)
            .agg(pl.col(column).mean())
            .drop_nulls()
            .sort(column, maintain_order=True)
        )
        if len(means) > 1:
            (low, least), (high, most) = means.row(0), means.row(-1)
            clauses.append(f"{words} {least:.2f} ({low}) to {most:.2f} ({high}) times the mean")
    return f"In {phase} the fullest expert has {enumeration(clauses)}." if clauses else ""


def _phase(phase: str, rows: pl.DataFrame) -> str:
    used = rows.drop_nulls("max_over_mean")
    if used.is_empty():
        return ""
    worst = used.sort("max_over_mean").row(-1, named=True)
    mean = _mean(used, "max_over_mean")
    words = f"in {phase} the fullest expert has "
    if used.get_column("pass_max_over_mean").count():
        words += f"{_mean(used, 'pass_max_over_mean'):.2f} times the mean in each pass and "
    words += f"{mean:.2f} times the mean over all"
    if worst["max_over_mean"] > mean + 0.005:
        words += f" (worst in layer {worst['layer']}, {worst['max_over_mean']:.2f})"
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
    of its decode passes (of prefill where it has no other), `relative` (throughput over that of
    uniform routing, or of the most even one where there is no uniform), and the conditions.

    `series` names all but the routing.

    Raises:
        SelectionError: see `analysis.traces.counts`; or no trial has a throughput.
    """
    figures = [*MEASURES, "rank_max_over_mean"]
    frame = balances(counts(records, activations, varied=("batch_size", "expert_parallel")))
    frame = frame.drop_nulls("throughput_tok_s").drop_nulls("max_over_mean")
    if frame.is_empty():
        raise SelectionError("no record with expert counts has a throughput")
    phases = pl.col("phase").unique().over("run_id", "trial_id", mapping_strategy="join")
    frame = frame.filter((pl.col("phase") == "decode") | phases.list.contains("decode").not_())
    name = _by_batch(frame, series(frame, without=("routing",)))
    if frame.get_column("expert_parallel").n_unique() > 1:
        spread = pl.when("expert_parallel").then(pl.lit("spread")).otherwise(pl.lit("not spread"))
        name = pl.format("{}, experts {}", name, spread)
    means = frame.group_by("run_id", "trial_id", maintain_order=True).agg(
        pl.col(figures).mean(), layers=pl.len()
    )
    rest = frame.with_columns(series=name).drop(*figures, "layer", "tokens")
    one = rest.unique(["run_id", "trial_id"], keep="first", maintain_order=True).join(
        means, on=["run_id", "trial_id"], how="left", maintain_order="left"
    )
    ends = [f"throughput_tok_s{end}" for end in ("", "_ci_low", "_ci_high")]
    shown = ["series", "routing", "phase", "layers", *figures, "ranks", *ends]
    shown += ["relative", "relative_ci_low", "relative_ci_high", "activated_experts_decode"]
    conditions = [one for one in SHOWN if one not in shown]
    # Against uniform routing, or the most even one where there is none.
    one = one.with_columns(even=pl.col("routing").eq("uniform").fill_null(False)).sort(
        "batch_size", "series", "max_over_mean"
    )
    base = pl.col(ends[0]).sort_by("even", descending=True, maintain_order=True).first()
    return one.with_columns(
        (pl.col(end) / base.over("series")).alias(end.replace("throughput_tok_s", "relative"))
        for end in ends
    ).select(
        *shown,
        *conditions,
        "devices_label",
        "memory_limit_gib",
        *MARKED,
        "trial_id",
    )


def pivots_cost(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series, a row per routing."""
    return [
        Pivot(
            title=str(name),
            corner="routing",
            columns=("tokens/s", "of even", "experts run", *(_WORDS[name] for name in MEASURES)),
            rows=tuple(
                (
                    _routing(row),
                    f"{row['throughput_tok_s']:,.0f}",
                    f"{row['relative']:.0%}",
                    _number(row["activated_experts_decode"]),
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
        first = one.filter(pl.col("relative") == 1).row(0, named=True)
        last = one.row(-1, named=True)
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
            f"{last['throughput_tok_s']:,.0f}, {100 * change:+.1f} %{apart}{_fewer(first, last)}."
        )
    phases = frame.get_column("phase").unique().sort().to_list()
    sentences.append(f"Imbalance is the mean over MoE layers, counted in {enumeration(phases)}.")
    sentences.append(
        "Each routing had an engine of its own, one after the other, so drift of the machine "
        "between them is in the difference."
    )
    return " ".join(sentences)


def _fewer(first: dict[str, Any], last: dict[str, Any]) -> str:
    """How many experts a decode pass read, where that is what may explain the change."""
    ran = [row["activated_experts_decode"] for row in (first, last)]
    if None in ran or abs(ran[1] - ran[0]) < 0.005:
        return ""
    return f", with {ran[1]:.2f} instead of {ran[0]:.2f} experts read per layer and decode pass"


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
        y="relative",
        low="relative_ci_low",
        high="relative_ci_high",
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
            title="Fullest expert over mean of all passes, mean of MoE layers (1 is even)",
            form="~g",
            low=1.0,
        ),
        y=Axis(
            title=f"{'Predicted throughput' if predicted else 'Throughput'} over even routing's",
            form=".0%",
        ),
    )


IMBALANCE = RecordsFigure(
    name="imbalance",
    aliases=(),
    title=_TITLE,
    paper="MoE-Inference-Bench §8.3, as figures of each layer",
    beside=("activations", "samples"),
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
ROUTING_COST = RecordsFigure(
    name="routing-cost",
    aliases=(),
    title=_COST,
    paper="neither paper; what imbalance costs",
    beside=("activations",),
    prepare=prepare_cost,
    chart=_chart_cost,
    pivots=pivots_cost,
    insight=insight_cost,
)
