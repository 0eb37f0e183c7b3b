"""Throughput by number of devices, a line for each way of spreading an engine over them.

MoE-Inference-Bench, Figure 13. One device belongs to every way, so each line begins there; where
the model does not fit on one device, it begins where it does. With pipeline stages alone there
are no tensor ranks to spread experts over, so `PP + EP` is what `PP` is (vLLM's rule).
"""

from __future__ import annotations

import polars as pl

from analysis.figures.scaling import scaling
from analysis.growth import with_devices, without_value
from analysis.keys import DEVICES, MODEL, STRATEGY, Axes

_WAYS = (("tensor", "TP"), ("pipeline", "PP"), ("data", "DP"))


def strategies(records: pl.LazyFrame) -> pl.LazyFrame:
    """Records with `strategy`: `TP`, `PP`, `TP + EP`; where kernels of experts differ, with theirs:
    `TP + EP, unfused`. Those of one device once per strategy that others of their model and kernel
    have."""
    kernel = (
        pl.when(pl.col("moe_backend").n_unique() > 1)
        .then(pl.format(", {}", "moe_backend"))
        .fill_null("")
    )
    records = records.with_columns(kernel=kernel)
    named = pl.concat_str(
        *(pl.when(pl.col(f"{name}_parallel") > 1).then(pl.lit(short)) for name, short in _WAYS),
        pl.when("expert_parallel").then(pl.lit("EP")),
        separator=" + ",
        ignore_nulls=True,
    )
    several = records.filter(pl.col("device_count") > 1).with_columns(
        strategy=named + pl.col("kernel")
    )
    alike = ["model", "kernel"]
    found = several.filter(pl.col("outcome") != "infeasible").select(*alike, "strategy").unique()
    one = records.filter(pl.col("device_count") == 1)
    alone = one.join(found, on=alike, how="left").with_columns(
        pl.col("strategy").fill_null("one device" + pl.col("kernel"))
    )
    return pl.concat([alone, several])


PARALLELISM = scaling(
    name="parallelism",
    aliases=("fig13",),
    title="Throughput against devices, by layout",
    paper="MoE-Inference-Bench, Figure 13",
    axes=Axes(x=DEVICES, panel=MODEL, line=STRATEGY),
    parts=(with_devices, without_value),
    shape=strategies,
)
