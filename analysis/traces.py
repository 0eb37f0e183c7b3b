"""What probes counted, beside the records of the trials that they belong to.

Routing differs by model, by prompts and by router, so traced figures set several of them side
by side: each is a series, named by as few words as tell it from the others. All else that
moves a number must be the same, as in every figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from analysis.conditions import CONDITIONS, constant, refuse_mixed, refuse_repeated
from analysis.errors import SelectionError
from analysis.subtitle import subtitle
from workers.moe.balance import MEASURES, balance, rank_loads

PHASES = ("prefill", "decode")

SPREADS = (2, 4, 8)
"""Numbers of ranks for which imbalance is computed whatever the layout was."""
IF_SPREAD = tuple(f"if_ranks_{number}" for number in SPREADS)
"""Their columns."""

_WORDS = {
    "model": "{}",
    "revision": "{}",
    "dataset": "{}",
    "routing": "{} routing",
    "weights": "{} weights",
    "scale": "scale {}",
    "num_layers": "{} layers",
    "ffn_dim": "FFN {}",
    "num_experts": "{} experts",
    "shared_experts": "{} shared experts",
    "top_k": "top-k {}",
    "quantization": "{}",
    "prune_kind": "{}-expert pruning",
    "prune_ratio": "pruned by {}",
    "prune_criterion": "pruned {}",
}
"""What may differ between series, in the order of a label; `{}` stands for the value."""
_NOTHING = {
    "dataset": "random ids",
    "routing": "own router",
    "quantization": "unquantised",
    "prune_kind": "unpruned",
}
"""Words for no value."""
_FOLLOWS = ("hidden_size",)
"""Differs between models and needs no word of its own."""

VARIED: tuple[str, ...] = (*_WORDS, *_FOLLOWS)
"""Columns in which series may differ."""

OPTIONAL: dict[str, pl.DataType] = {"dataset": pl.String(), "routing": pl.String()}
"""Columns that records of older versions do not have."""

SHOWN: tuple[str, ...] = tuple(dict.fromkeys((*CONDITIONS, *OPTIONAL)))
"""Conditions that a prepared frame keeps."""


def series(frame: pl.DataFrame, *, without: Sequence[str] = ()) -> pl.Expr:
    """The name of each row's series: its model, and what tells apart rows of one model.

    `without` leaves out columns that are shown otherwise.
    """
    label = pl.col("model").fill_null("model")
    for column, words in _WORDS.items():
        if column == "model" or column in without:
            continue
        named = frame.select(label.alias("label"), column)
        several = named.group_by("label").agg(pl.col(column).n_unique()).get_column(column) > 1
        if several.any():
            value = pl.format(words, pl.col(column).cast(pl.String))
            label = pl.format("{}, {}", label, value.fill_null(_NOTHING.get(column, "unknown")))
    return label


def with_optional(records: pl.LazyFrame) -> pl.LazyFrame:
    """`records` with the columns of `OPTIONAL`, null where they are not there."""
    there = records.collect_schema()
    return records.with_columns(
        pl.lit(None, dtype=kind).alias(name) for name, kind in OPTIONAL.items() if name not in there
    )


def counts(
    records: pl.LazyFrame, activations: pl.LazyFrame, *, varied: Sequence[str] = ()
) -> pl.DataFrame:
    """A row per series, phase, MoE layer and expert: `tokens`, and every column of its record.

    Experts that no token chose have a row with 0. `varied` are further columns in which the
    trials may differ; those that differ in nothing are refused.

    Raises:
        SelectionError: no trial has counts, conditions differ, or several records share what
            names a series.
    """
    routed = pl.col("num_experts", "top_k") > 0
    trials = with_optional(records).filter(routed, outcome="ok").collect()
    rows = activations.join(
        trials.lazy().select("run_id", "trial_id"), on=["run_id", "trial_id"], how="semi"
    ).collect()
    trials = trials.join(rows.unique(["run_id", "trial_id"]), on=["run_id", "trial_id"], how="semi")
    if trials.is_empty():
        raise SelectionError(
            "no record has expert counts beside it: measure with measure.activation: true"
        )
    refuse_mixed(trials, varied=(*VARIED, *varied))
    refuse_repeated(trials, [*VARIED, *varied])
    trials = trials.with_columns(series=series(trials)).sort("series", *varied)
    layers = rows.select("run_id", "trial_id", "phase", "layer").unique()
    whole = (
        trials.join(layers, on=["run_id", "trial_id"])
        .with_columns(expert=pl.int_ranges(0, "num_experts"))
        .explode("expert")
        .join(rows, on=["run_id", "trial_id", "phase", "layer", "expert"], how="left")
        .with_columns(pl.col("tokens").fill_null(0))
    )
    order = pl.col("phase").replace_strict({name: n for n, name in enumerate(PHASES)}, default=2)
    return whole.sort("series", *varied, order, "layer", "expert", maintain_order=True)


def shares(frame: pl.DataFrame) -> pl.DataFrame:
    """`counts` with `share` (of the layer's tokens that chose the expert, 0 to 1) and
    `times_even` (over what uniform routing gives it, k/E: 1 is even). Null without tokens."""
    all_choices = pl.col("tokens").sum().over("run_id", "trial_id", "phase", "layer")
    tokens = pl.when(all_choices > 0).then(all_choices) / pl.col("top_k")
    return frame.with_columns(share=pl.col("tokens") / tokens).with_columns(
        times_even=pl.col("share") * pl.col("num_experts") / pl.col("top_k")
    )


def balances(frame: pl.DataFrame, samples: pl.LazyFrame | None = None) -> pl.DataFrame:
    """From `counts`, a row per trial, phase and layer with the figures of
    `workers.moe.balance`; with experts spread over ranks, `rank_max_over_mean` beside them.

    `if_ranks_N` for N in `SPREADS` is the fullest of N ranks over the mean, computed from the
    counts as if experts were dealt to so many; null where there are fewer experts.
    `pass_max_over_mean` is that of `pass_loads`, null without `samples`.

    `ranks` is null where experts are not spread. Layers without tokens have nulls.
    """
    keys = ["run_id", "trial_id", "phase", "layer"]
    found = []
    for _, one in frame.group_by(keys, maintain_order=True):
        first = one.row(0, named=True)
        tokens = one.sort("expert").get_column("tokens").to_numpy()
        (figures,) = balance(tokens).rows()
        ranks = _ranks(first)
        over = None
        if ranks is not None:
            over = balance(rank_loads(tokens, ranks)).rows()[0]["max_over_mean"]
        found.append(
            {name: first[name] for name in keys}
            | figures
            | {"tokens": int(tokens.sum()) // first["top_k"], "ranks": ranks}
            | {"rank_max_over_mean": over}
            | {
                f"if_ranks_{number}": balance(rank_loads(tokens, number)).rows()[0]["max_over_mean"]
                if number <= len(tokens)
                else None
                for number in SPREADS
            }
        )
    kinds = frame.schema
    schema: dict[str, pl.DataType] = {name: kinds[name] for name in keys}
    schema |= dict.fromkeys((*MEASURES, "rank_max_over_mean", *IF_SPREAD), pl.Float64())
    schema |= {"tokens": pl.Int64(), "ranks": pl.Int64()}
    conditions = frame.drop("expert", "tokens").unique(keys, keep="first", maintain_order=True)
    whole = conditions.join(
        pl.DataFrame(found, schema=schema), on=keys, how="left", maintain_order="left"
    )
    if samples is None:
        return whole.with_columns(pass_max_over_mean=pl.lit(None, dtype=pl.Float64))
    return whole.join(pass_loads(samples, frame), on=keys, how="left", maintain_order="left")


def pass_loads(samples: pl.LazyFrame, trials: pl.DataFrame) -> pl.DataFrame:
    """A row per trial, phase and MoE layer with `pass_max_over_mean`: the fullest expert of each
    forward pass over the mean, ratio of sums over the passes of all replays.

    Passes that hold prompts and decoding requests belong to neither phase. Trials whose samples
    do not tell the fullest expert (older versions) have no rows.

    Args:
        samples: as `load.samples` gives them.
        trials: rows of `counts`, which know the positions of the MoE layers.
    """
    keys = ["run_id", "trial_id"]
    places = (
        trials.select(*keys, "layer", "num_experts", "top_k")
        .unique()
        .with_columns(index=pl.col("layer").rank("ordinal").over(keys).cast(pl.Int64) - 1)
    )
    fullest = (
        samples.filter(pl.col("kind") == "probe", pl.col("pass_busiest").is_not_null())
        .select(*keys, "pass_new", "pass_decoding", "pass_busiest")
        .join(places.lazy().select(keys).unique(), on=keys, how="semi")
        .explode("pass_new", "pass_decoding", "pass_busiest")
        .with_columns(
            mean=pl.col("pass_new").list.sum(),
            index=pl.int_ranges(pl.col("pass_busiest").list.len()),
            phase=pl.when(pl.col("pass_decoding").list.all())
            .then(pl.lit("decode"))
            .when(pl.col("pass_decoding").list.any().not_())
            .then(pl.lit("prefill")),
        )
        .drop_nulls("phase")
        .explode("pass_busiest", "index")
        .group_by(*keys, "phase", "index")
        .agg(pl.col("pass_busiest", "mean").sum())
        .collect()
    )
    even = pl.col("mean") * pl.col("top_k") / pl.col("num_experts")
    return fullest.join(places, on=[*keys, "index"]).select(
        *keys, "phase", "layer", pass_max_over_mean=pl.col("pass_busiest") / even
    )


def _ranks(row: dict[str, object]) -> int | None:
    degrees = (row["tensor_parallel"], row["data_parallel"])
    if not row["expert_parallel"]:
        return None
    ranks = 1
    for degree in degrees:
        ranks *= degree if isinstance(degree, int) else 1
    return ranks if ranks > 1 else None


def under_title(frame: pl.DataFrame) -> list[str]:
    """The lines of `analysis.subtitle`, and where the prompts and the routing come from."""
    lines = [line.strip() for line in subtitle(frame)]
    words = []
    for column, word in (("dataset", "prompts of {}"), ("routing", "routing {}")):
        value = constant(frame, column) if column in frame.columns else None
        if value is not None and frame.get_column(column).null_count() == 0:
            words.append(word.format(value))
    if words:
        text = ", ".join(words)
        lines.append(text[0].upper() + text[1:])
    return lines
