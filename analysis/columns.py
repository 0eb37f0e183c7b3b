"""Columns that follow from a record, as named polars expressions.

They are computed on reading and never stored: a formula that is mended here is mended for
every old dataset too. Each is null where one of its inputs is.
"""

from __future__ import annotations

import polars as pl

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
    SOURCE,
)
"""Every derived column, in the order in which `load` appends them."""
