"""The shares of peaks that measurements reached, for the planner to divide by."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from analysis.dataset import is_dataset, load
from analysis.errors import DatasetError, SelectionError
from analysis.options import Options


def reached(dataset: Path) -> Options:
    """Median `s_mbu` and `s_mfu` of the trials that ended well and were measured.

    Raises:
        DatasetError: there is no dataset.
        SelectionError: no trial has one of the two, or a median is above 1, which no
            device reaches: the peaks it was taken against were too low.
    """
    records = _measured(dataset)
    return Options(s_mbu=_median(records, "s_mbu"), s_mfu=_median(records, "s_mfu"))


def experts_behind(dataset: Path) -> list[str]:
    """Where the experts behind those `s_mbu` come from, by `activation_source`."""
    records = _measured(dataset).filter(pl.col("s_mbu").is_not_null())
    return records.get_column("activation_source").drop_nulls().unique().sort().to_list()


def _measured(dataset: Path) -> pl.DataFrame:
    if not is_dataset(dataset):
        raise DatasetError(f"no dataset in {dataset}")
    ok = (pl.col("outcome") == "ok") & pl.col("measured")
    return load(dataset).filter(ok).select("s_mbu", "s_mfu", "activation_source").collect()


def _median(records: pl.DataFrame, name: str) -> float:
    median = records.get_column(name).drop_nulls().median()
    if not isinstance(median, float):
        raise SelectionError(
            f"no measured trial has {name} there: give --s-mbu and --s-mfu yourself"
        )
    if not 0 < median <= 1:
        raise SelectionError(f"the median {name} there is {median:.3g}: no share of a peak")
    return median
