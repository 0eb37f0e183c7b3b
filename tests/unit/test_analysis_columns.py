"""Derived columns, value by value."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from analysis.columns import DERIVED
from workers.contract.record import RECORDS


def derived(**columns: Any) -> dict[str, Any]:
    """All derived columns of one record with `columns`."""
    schema = pl.Schema(RECORDS)
    frame = pl.DataFrame([columns], schema_overrides={name: schema[name] for name in columns})
    absent = [pl.lit(None, dtype=schema[n]).alias(n) for n in schema if n not in columns]
    return frame.with_columns(absent).select(DERIVED).row(0, named=True)


@pytest.mark.parametrize(
    ("name", "columns", "value"),
    [
        ("active_share", {"params_active": 13, "params_total": 52}, 0.25),
        (
            "ci_width",
            {
                "throughput_tok_s": 200.0,
                "throughput_tok_s_ci_low": 195.0,
                "throughput_tok_s_ci_high": 203.0,
            },
            0.04,
        ),
        ("throughput_per_device_tok_s", {"throughput_tok_s": 200.0, "device_count": 4}, 50.0),
        ("prediction_ratio", {"e2e_s": 3.0, "predicted_e2e_s": 2.0}, 1.5),
        ("devices_label", {"device": "H100", "device_count": 4}, "4 × H100"),
        ("source", {"outcome": "ok", "measured": True}, "measured"),
        ("source", {"outcome": "ok", "measured": False}, "predicted"),
        ("source", {"outcome": "oom", "measured": False}, None),
    ],
)
def test_derived_columns(name: str, columns: dict[str, Any], value: object) -> None:
    assert derived(**columns)[name] == pytest.approx(value)


def test_what_is_unknown_stays_null() -> None:
    assert set(derived(outcome="crashed", measured=False).values()) == {None}
