"""Expert weights that a decode pass reads of one layer, by batch, beside what MBU takes.

MoE-CAP A.4 (its Figures 8 and 9) draws this for the first and a late layer, since layers differ:
some route a batch to half of their experts, others to all. The probes' own passes have the
experts of every layer. An expert's size follows from the record alone: total less active
parameters are those of the experts that a token does not use, in all MoE layers. Attention,
router and shared experts are read whole in every pass and are left out, being no question of
routing; so the picture is of routed experts only. That the accounting of a whole layer is what
an engine reads, `tests/bench/bench_bytes.py` measures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from analysis.conditions import refuse_mixed, refuse_repeated
from analysis.errors import SelectionError
from analysis.figures.figure import Pivot, RecordsFigure
from analysis.insights import percent
from analysis.marks import COLUMNS as MARKED
from analysis.traces import SHOWN, VARIED, series, under_title, with_optional
from workers.moe.accounting import distinct_experts
from workers.moe.architecture import DTYPE_BYTES

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Expert weights that a decode pass reads of one layer"
_UNIFORM, _ALL = "uniform routing", "all experts (MBU)"


def prepare(records: pl.LazyFrame, samples: pl.LazyFrame) -> pl.DataFrame:
    """A row per series, batch and one of the first, middle and last MoE layer.

    `moe_layer` (from 1, of `moe_layers`), `experts` (distinct per decode pass, in the mean over
    the probes' decode passes), `experts_uniform` (the expectation for the same passes),
    `traced_mb`, `uniform_mb` and `all_mb` (10⁶ bytes), and the conditions. Passes that also fed
    prompts are left out.

    Raises:
        SelectionError: no unquantised trial has decode passes that were traced, conditions
            differ, or several records share a point.
    """
    needed = ("num_experts", "top_k", "params_total", "params_active", "batch_size", "dtype")
    trials = (
        with_optional(records)
        .drop_nulls(needed)
        .filter(
            pl.col("num_experts") > pl.col("top_k"),
            pl.col("quantization").is_null(),
            pl.col("dtype").is_in(list(DTYPE_BYTES)),
        )
        .collect()
    )
    keys = ["run_id", "trial_id"]
    passes = (
        samples.filter(kind="probe")
        .join(trials.lazy().select(keys), on=keys, how="semi")
        .select(*keys, "pass_new", "pass_decoding", "pass_experts")
        .explode("pass_new", "pass_decoding", "pass_experts")
        .filter(pl.col("pass_decoding").list.all())
        .with_columns(
            tokens=pl.col("pass_new").list.sum(), moe_layers=pl.col("pass_experts").list.len()
        )
        .collect()
    )
    if passes.is_empty():
        raise SelectionError(
            "no unquantised trial has traced decode passes: measure with measure.activation: true"
        )
    chosen = pl.concat_list(pl.lit(1), (pl.col("moe_layers") + 1) // 2, "moe_layers").list.unique()
    layers = (
        passes.with_columns(moe_layer=chosen.list.sort())
        .explode("moe_layer")
        .with_columns(experts=pl.col("pass_experts").list.get(pl.col("moe_layer") - 1))
    )
    trials = trials.join(passes.select(keys).unique(), on=keys, how="semi")
    refuse_mixed(trials, varied=(*VARIED, "batch_size"))
    refuse_repeated(trials, [*VARIED, "batch_size"])
    uniform = pl.struct("num_experts", "top_k", "tokens").map_elements(
        lambda row: distinct_experts(row["num_experts"], row["top_k"], row["tokens"]),
        return_dtype=pl.Float64,
    )
    spare = pl.col("params_total") - pl.col("params_active")
    size = pl.col("dtype").replace_strict(DTYPE_BYTES, return_dtype=pl.Float64)
    unused = (pl.col("num_experts") - pl.col("top_k")) * pl.col("moe_layers")
    conditions = [one for one in SHOWN if one != "batch_size"]
    also = (
        "devices_label",
        "memory_limit_gib",
        *MARKED,
        "trial_id",
    )
    kept = ("num_experts", "top_k", "expert_mb", *conditions, *also)
    return (
        trials.with_columns(series=series(trials))
        .join(layers.drop("pass_new", "pass_decoding", "pass_experts"), on=keys)
        .with_columns(experts_uniform=uniform, expert_mb=spare / unused * size / 1e6)
        .group_by("series", "batch_size", "moe_layer", "moe_layers")
        .agg(
            pl.col("experts").mean(),
            pl.col("experts_uniform").mean(),
            pl.len().alias("passes"),
            pl.col(list(dict.fromkeys(kept))).first(),
        )
        .with_columns(
            traced_mb=pl.col("experts") * pl.col("expert_mb"),
            uniform_mb=pl.col("experts_uniform") * pl.col("expert_mb"),
            all_mb=pl.col("num_experts") * pl.col("expert_mb"),
        )
        .sort("series", "moe_layer", "batch_size")
    )


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """A table per series and layer, a column per batch."""
    tables = []
    for (name, layer, layers), one in frame.group_by(
        "series", "moe_layer", "moe_layers", maintain_order=True
    ):
        rows = [
            (words, *(form.format(value) for value in one.get_column(column)))
            for column, words, form in (
                ("traced_mb", "MB, traced", "{:.3f}"),
                ("uniform_mb", "MB, uniform routing", "{:.3f}"),
                ("all_mb", "MB, all experts", "{:.3f}"),
                ("experts", "experts, traced", "{:.2f}"),
            )
        ]
        tables.append(
            Pivot(
                title=f"{name}, MoE layer {layer} of {layers}",
                corner="batch",
                columns=tuple(str(batch) for batch in one.get_column("batch_size")),
                rows=tuple(rows),
            )
        )
    return tables


def insight(frame: pl.DataFrame) -> str:
    """What MBU takes too much at both ends, and where layers differ most."""
    sentences = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        batches = one.get_column("batch_size")
        for batch in sorted({batches.to_list()[0], batches.to_list()[-1]}):
            at = one.filter(pl.col("batch_size") == batch)
            read, every = at.get_column("traced_mb").mean(), at.get_column("all_mb").mean()
            assert isinstance(read, float) and isinstance(every, float)
            over = f", {percent(every / read - 1)} more" if every > 1.005 * read else ""
            sentences.append(
                f"At batch {batch} a layer of {name} reads {read:.1f} MB of experts; MBU takes "
                f"{every:.1f} MB{over}."
            )
        spread = (
            one.group_by("batch_size", maintain_order=True)
            .agg(
                low=pl.col("experts").min(),
                high=pl.col("experts").max(),
                lowest=pl.col("moe_layer").sort_by("experts").first(),
                highest=pl.col("moe_layer").sort_by("experts").last(),
            )
            .with_columns(gap=pl.col("high") - pl.col("low"))
            .sort("gap", "batch_size", descending=[True, False])
            .row(0, named=True)
        )
        if spread["gap"] > 0:
            sentences.append(
                f"Layers differ most at batch {spread['batch_size']}: {spread['low']:.2f} experts "
                f"in MoE layer {spread['lowest']}, {spread['high']:.2f} in {spread['highest']}."
            )
    return " ".join(sentences)


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.lines_chart import Axis, draw  # altair is slow to import

    traced = frame.select(
        panel="series",
        line=pl.format("layer {}, traced", "moe_layer"),
        x="batch_size",
        y="traced_mb",
    )
    first = frame.filter(pl.col("moe_layer") == 1)
    others = [
        first.select(panel="series", line=pl.lit(words), x="batch_size", y=column)
        for words, column in ((_UNIFORM, "uniform_mb"), (_ALL, "all_mb"))
    ]
    return draw(
        pl.concat([traced, *others]).with_columns(dash=pl.lit("")),
        title=_TITLE,
        subtitle=[*under_title(frame), "Mean of traced decode passes; routed experts only"],
        notes=[insight(frame)],
        x=Axis(title="Batch size", doublings=True),
        y=Axis(title="Expert weights read per pass and layer, MB"),
        shared=False,
    )


LAYER_BYTES = RecordsFigure(
    name="layer-bytes",
    aliases=(),
    title=_TITLE,
    paper="MoE-CAP, Figures 8 and 9",
    beside=("samples",),
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
