"""How fast the machine was around each trial, and figures as if it had always been equally fast.

Before and after the trials of a group a short load of fixed work runs on the engine's threads
(`workers.hardware.reference`). Its rate over the median of all that was loaded, on the same device
with as many threads, says how fast the machine was just then: 0.8 is a fifth slower than usual.
Differences count where they are larger than the noise of the loads themselves, that is than the
quartiles of one load's repeats are apart, or the load before from the load after.

`corrected` scales times on request: what belongs to prompts by the rate of multiplying matrices,
what belongs to decoding by the rate of reading memory, end-to-end time by both parts. That is the
roofline's word for what bounds which phase. Models that fit into caches, or spend their time in
launches, are bound by neither, so the correction is never made unasked, and whoever shows corrected
figures says so. Utilisations, predictions and memory stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

ALIKE = ("device", "device_digest", "device_count", "threads")
"""Loads that may be compared: on one kind of device, with as many ranks and threads."""
LOADS = {
    "bandwidth": ("reference_bandwidth_gb_s", "GB/s", "memory was read"),
    "tflops": ("reference_tflops", "TFLOPS", "matrices were multiplied"),
}
"""Name in columns: column of the rates, unit, and what they are rates of."""
CARRIED = (
    "drift_bandwidth",
    "drift_tflops",
    "drift_bandwidth_noise",
    "drift_tflops_noise",
    "drift_corrected",
)
"""Derived columns that a figure of times or throughputs keeps, for `lines`."""
_PROMPTS = ("ttft_s", "ttft_paper_s")
_DECODING = ("itl_s", "itl_p90_s", "itl_p99_s", "itl_paper_s", "tpot_s")
_WHOLE = ("e2e_s", "e2e_s_ci_low", "e2e_s_ci_high", "e2e_s_std")
_PER_SECOND = (
    *("throughput_tok_s", "throughput_tok_s_ci_low", "throughput_tok_s_ci_high"),
    *("output_throughput_tok_s", "requests_s", "samples_s"),
)


def _rate(name: str) -> pl.Expr:
    """Mean of before and after; of the one that is known."""
    column = LOADS[name][0]
    return pl.mean_horizontal(f"{column}_before", f"{column}_after")


def _noise(name: str) -> pl.Expr:
    column = LOADS[name][0]
    step = (pl.col(f"{column}_after") - pl.col(f"{column}_before")).abs() / _rate(name)
    return pl.max_horizontal(f"reference_{name}_spread", step)


DRIFT: tuple[pl.Expr, ...] = (
    *((_rate(name) / _rate(name).median().over(ALIKE)).alias(f"drift_{name}") for name in LOADS),
    *(_noise(name).alias(f"drift_{name}_noise") for name in LOADS),
    pl.lit(None, dtype=pl.Boolean).alias("drift_corrected"),
)
"""How fast the machine was around a record over how fast it usually was, by reading memory and by
multiplying matrices; the noise of each, a share of the rate; whether times were scaled."""


def corrected(records: pl.LazyFrame) -> pl.LazyFrame:
    """Measured records with the columns of `DRIFT`, their times scaled to the usual speed of the
    machine, `drift_corrected` true; records without reference loads as they are."""
    known = (
        pl.col("measured")
        & pl.col("drift_bandwidth").is_not_null()
        & pl.col("drift_tflops").is_not_null()
    ).fill_null(False)
    reading, computing = (
        pl.when(known).then(pl.col(f"drift_{name}")).otherwise(1.0) for name in LOADS
    )
    whole = pl.col("e2e_s")
    prompts = pl.min_horizontal(pl.coalesce("ttft_paper_s", "ttft_s", pl.lit(0.0)), whole)
    longer = (prompts * computing + (whole - prompts) * reading) / whole
    return records.with_columns(
        *(pl.col(name) * computing for name in _PROMPTS),
        *(pl.col(name) * reading for name in _DECODING),
        *(pl.col(name) * longer for name in _WHOLE),
        *(pl.col(name) / longer for name in _PER_SECOND),
        drift_corrected=pl.when(known).then(True),
    )


def lines(frame: pl.DataFrame) -> list[str]:
    """What is to be said of drift under a title, without a full stop: where records were made on
    a machine that was not equally fast, and that their times were scaled. Needs `CARRIED`; without
    them there is nothing to say."""
    if not set(CARRIED) <= set(frame.columns):
        return []
    found = []
    if ranges := [
        f"{words} at {low:.0%} to {high:.0%}" for words, low, high in _beyond_noise(frame)
    ]:
        found.append(
            f"The machine drifted: {' and '.join(ranges)} of the usual rate of its reference loads "
            "(figure drift)"
        )
    if number := int(frame.get_column("drift_corrected").sum()):
        found.append(
            f"Times of {number} of {len(frame)} records scaled to the usual rate: prompts by "
            "multiplying matrices, decoding by reading memory"
        )
    return found


def _beyond_noise(frame: pl.DataFrame) -> Iterator[tuple[str, float, float]]:
    for name, (_, _, words) in LOADS.items():
        rates = frame.get_column(f"drift_{name}").drop_nulls()
        noise = frame.get_column(f"drift_{name}_noise").drop_nulls()
        low, high = rates.min(), rates.max()
        if not (isinstance(low, float) and isinstance(high, float) and len(noise)):
            continue
        if high - low > float(noise.max()):  # type: ignore[arg-type]
            yield words, low, high


def between(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Reference loads of two records that differ by more than their noise: their name in words,
    and both rates."""
    both = pl.DataFrame(
        [{name: side.get(name) for name in _COLUMNS} for side in (one, other)],
        schema=dict.fromkeys(_COLUMNS, pl.Float64),
    ).select(
        *(_rate(name).alias(name) for name in LOADS),
        *(_noise(name).alias(f"{name}_noise") for name in LOADS),
    )
    found = []
    for name, (_, unit, words) in LOADS.items():
        first, second = both.get_column(name)
        noise = both.get_column(f"{name}_noise").drop_nulls()
        if first is None or second is None or not len(noise):
            continue
        if abs(second - first) / ((first + second) / 2) > float(noise.max()):  # type: ignore[arg-type]
            found.append((f"{words}, {unit}", first, second))
    return found


_COLUMNS = tuple(
    column
    for name, (rate, _, _) in LOADS.items()
    for column in (f"{rate}_before", f"{rate}_after", f"reference_{name}_spread")
)
