"""Columns that follow from a record, as named polars expressions.

They are computed on reading and never stored: a formula that is mended here is mended for
every old dataset too. Each is null where one of its inputs is.

Figures divide by times and rates and draw them on logarithmic axes. So a time that cannot be one
(0, below 0, no number) is taken for what it is, unknown, before anything is computed from it.
"""

from __future__ import annotations

import polars as pl

from analysis.conditions import CONDITIONS
from analysis.drift import DRIFT, corrected
from analysis.tuned import UNTUNED
from workers.contract.shares import AGAINST, CALIBRATED

ABOVE_ZERO: tuple[str, ...] = (
    *("ttft_s", "ttft_paper_s", "itl_s", "itl_p90_s", "itl_p99_s", "itl_paper_s", "tpot_s"),
    *("e2e_s", "e2e_s_ci_low", "e2e_s_ci_high"),
    *("throughput_tok_s", "throughput_tok_s_ci_low", "throughput_tok_s_ci_high"),
    *("output_throughput_tok_s", "requests_s", "samples_s"),
    *("predicted_e2e_s", "predicted_ttft_s", "predicted_tpot_s"),
    *("peak_bandwidth_gb_s", "peak_tflops", "calibrated_bandwidth_gb_s", "calibrated_tflops"),
    *("mbu", "mfu", "s_mbu", "s_mbu_paper", "s_mfu", "s_mbu_uniform"),
    *("prefill_s_mbu", "prefill_s_mfu", "activated_experts_decode", "activated_experts_prefill"),
    *("memory_limit_gib", "peak_memory_gib", "weights_gib", "accepted_length"),
    *("reference_bandwidth_gb_s_before", "reference_bandwidth_gb_s_after"),
    *("reference_tflops_before", "reference_tflops_after"),
)
"""Stored figures that are above 0 wherever there is one at all."""

_BETWEEN_TOKENS = ("itl_s", "itl_p90_s", "itl_p99_s", "itl_paper_s", "tpot_s")


def _sound(name: str) -> pl.Expr:
    """The column where it can be true; else null."""
    value = pl.col(name)
    possible = value.is_finite() & (value > 0)
    for shares in AGAINST:
        if name in shares.columns:  # version 0.1.0 kept what is taken against a peak that is none
            beyond = pl.any_horizontal(pl.col(bounded) > 1 for bounded in shares.bounded)
            measured = pl.col("peak_source").str.starts_with(CALIBRATED)
            possible &= ~(beyond & measured).fill_null(False)
    if name in _BETWEEN_TOKENS:  # version 0.1.0 had some for requests of a single token
        possible &= pl.col("output_tokens").ne_missing(1)
    return pl.when(possible).then(value).alias(name)


SOUND: tuple[pl.Expr, ...] = tuple(map(_sound, ABOVE_ZERO))
"""Stored columns with null in place of what cannot be."""

ACTIVE_SHARE = (pl.col("params_active") / pl.col("params_total")).alias("active_share")
"""Share of the parameters that one token uses, 0 to 1."""

CI_WIDTH = (
    (pl.col("throughput_tok_s_ci_high") - pl.col("throughput_tok_s_ci_low"))
    / pl.col("throughput_tok_s")
).alias("ci_width")
"""Width of the throughput's confidence interval as a share of its median."""

THROUGHPUT_PER_DEVICE = (pl.col("throughput_tok_s") / pl.col("device_count")).alias(
    "throughput_per_device_tok_s"
)
"""Tokens (input + output) per second and device: what a device-second buys."""

PREDICTION_RATIO = (pl.col("e2e_s") / pl.col("predicted_e2e_s")).alias("prediction_ratio")
"""End-to-end time as measured, over the roofline's; 1 where the prediction held."""

DEVICES_LABEL = pl.format("{} × {}", "device_count", "device").alias("devices_label")
"""What the engine ran on, for people: `4 × NVIDIA H100`."""

LAYOUT = ("tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel")
"""What says how an engine is spread over devices."""
OTHERWISE: tuple[str, ...] = (
    *(name for name in CONDITIONS if name not in (*LAYOUT, "device_count", "threads", "source")),
    "measured",
    "routing",
    "dataset",
)
"""What trials of one layout study have in common."""

LAYOUT_LABEL = (
    pl.when(pl.col("device_count") == 1)
    .then(pl.lit("one device"))
    .when(pl.col("device_count") > 1)
    .then(
        pl.concat_str(
            *(
                pl.when(pl.col(f"{name}_parallel") > 1).then(
                    pl.format(f"{short} {{}}", f"{name}_parallel")
                )
                for name, short in (("tensor", "TP"), ("pipeline", "PP"), ("data", "DP"))
            ),
            pl.when("expert_parallel").then(pl.lit("EP")),
            separator=" + ",
            ignore_nulls=True,
        )
    )
    .alias("layout_label")
)
"""How an engine is spread, for people: `TP 2 + PP 2 + EP`."""

MOE_PATH = (
    pl.when(pl.col("num_experts") > 0)
    .then(pl.col("moe_backend").fill_null("fused"))
    .alias("moe_path")
)
"""`unfused`, one expert after the other; `fused`, the kernel of the engine's choice; or the one
that the sweep chose. Null for a model without experts."""

_ALONE = pl.col("device_count") == 1


def _alone(column: str) -> pl.Expr:
    """What the trial has on one device that is the same otherwise; null where none was measured."""
    measured = pl.col(column).filter(_ALONE & (pl.col("outcome") == "ok"))
    return measured.median().over(OTHERWISE)


RELATIVE_THROUGHPUT = (pl.col("throughput_tok_s") / _alone("throughput_tok_s")).alias(
    "relative_throughput"
)
"""Throughput over that of the same trial on one device; 1 for that device itself."""

PARALLEL_EFFICIENCY = (
    pl.col("throughput_tok_s")
    / _alone("throughput_tok_s")
    / (pl.col("device_count") * (pl.col("threads") / _alone("threads")).fill_null(1.0))
).alias("parallel_efficiency")
"""Relative throughput over how many times as much hardware it took: devices, and on CPUs, where
one machine is cut into ranks, their threads. 1 is perfect scaling."""

SOURCE = (
    pl.when(pl.col("outcome") == "ok")
    .then(pl.col("measured").replace_strict({True: "measured", False: "predicted"}))
    .alias("source")
)
"""`measured` on a machine or `predicted` by a model of one; null where there are no figures."""

DERIVED: tuple[pl.Expr, ...] = (
    ACTIVE_SHARE,
    CI_WIDTH,
    THROUGHPUT_PER_DEVICE,
    PREDICTION_RATIO,
    DEVICES_LABEL,
    LAYOUT_LABEL,
    MOE_PATH,
    RELATIVE_THROUGHPUT,
    PARALLEL_EFFICIENCY,
    SOURCE,
    UNTUNED,
)
"""Every derived column, in the order in which `load` appends them."""


def derived(records: pl.DataFrame, *, correct_drift: bool = False) -> pl.LazyFrame:
    """Records as they are stored, made sound, with every derived column.

    Args:
        records: as the files have them.
        correct_drift: scale times to the usual speed of the machine (`analysis.drift`).
    """
    frame = records.lazy().with_columns(SOUND).with_columns(DRIFT)
    if correct_drift:
        frame = corrected(frame)
    return frame.with_columns(DERIVED)
