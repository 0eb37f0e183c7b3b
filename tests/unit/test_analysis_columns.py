"""Derived columns, value by value."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from analysis.columns import DERIVED
from analysis.columns import derived as add_derived
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
        ("layout_label", {"device_count": 1, "tensor_parallel": 1}, "one device"),
        (
            "layout_label",
            {
                "device_count": 8,
                "tensor_parallel": 2,
                "pipeline_parallel": 4,
                "data_parallel": 1,
                "expert_parallel": True,
            },
            "TP 2 + PP 4 + EP",
        ),
        ("source", {"outcome": "ok", "measured": True}, "measured"),
        ("source", {"outcome": "ok", "measured": False}, "predicted"),
        ("source", {"outcome": "oom", "measured": False}, None),
    ],
)
def test_derived_columns(name: str, columns: dict[str, Any], value: object) -> None:
    assert derived(**columns)[name] == pytest.approx(value)


def test_what_is_unknown_stays_null() -> None:
    assert set(derived(outcome="crashed", measured=False).values()) == {None}


def several(*records: dict[str, Any]) -> pl.DataFrame:
    """Derived columns of several records in one frame."""
    schema = pl.Schema(RECORDS)
    rows = [{name: one.get(name) for name in schema} for one in records]
    return pl.DataFrame(rows, schema=schema).with_columns(DERIVED)


def _layout(tensor: int, throughput: float | None, **more: Any) -> dict[str, Any]:
    return {
        "outcome": "ok" if throughput else "oom",
        "measured": bool(throughput),
        "model": "mixtral-8x7b",
        "batch_size": 16,
        "device_count": tensor,
        "tensor_parallel": tensor,
        "throughput_tok_s": throughput,
    } | more


def test_scaling_is_over_the_same_trial_on_one_device() -> None:
    frame = several(
        _layout(1, 100.0),
        _layout(2, 180.0),
        _layout(4, 240.0),
        _layout(4, None),
        _layout(1, 10.0, batch_size=1),
        _layout(2, 15.0, batch_size=1),
        _layout(2, 15.0, batch_size=4),
        _layout(2, 200.0, moe_backend="unfused"),
    )
    relative = frame.get_column("relative_throughput").to_list()
    assert relative == [1.0, 1.8, 2.4, None, 1.0, 1.5, None, None]
    efficiency = frame.get_column("parallel_efficiency").to_list()
    assert efficiency == pytest.approx([1.0, 0.9, 0.6, None, 1.0, 0.75, None, None])


def test_ranks_that_share_the_cores_of_one_cpu_took_no_more_hardware() -> None:
    frame = several(_layout(1, 100.0, threads=8), _layout(2, 90.0, threads=4))
    assert frame.get_column("relative_throughput").to_list() == [1.0, 0.9]
    assert frame.get_column("parallel_efficiency").to_list() == [1.0, 0.9]


def test_without_one_device_there_is_nothing_to_be_relative_to() -> None:
    frame = several(_layout(1, None), _layout(2, 90.0), _layout(4, 150.0))
    assert frame.get_column("parallel_efficiency").to_list() == [None] * 3


def test_shares_of_a_measured_peak_that_was_none_are_unknown_in_old_records_too() -> None:
    """An S-MBU of 1.28 against a peak that was calibrated in noise, as 0.1.0 kept it."""
    schema = pl.Schema(RECORDS)
    shares = {"mbu": 1.9, "s_mbu": 1.28, "prefill_s_mbu": 0.4, "s_mfu": 0.2, "mfu": 3.0}
    rows = [
        {name: one.get(name) for name in schema}
        for one in (
            {"peak_source": "calibrated", **shares},
            {"peak_source": "catalogue", **shares},
            {"peak_source": "calibrated", **shares, "s_mbu": 0.9},
        )
    ]
    told = add_derived(pl.DataFrame(rows, schema=schema)).select(*shares).collect().rows()
    assert told == [
        (None, None, None, 0.2, 3.0),
        (1.9, 1.28, 0.4, 0.2, 3.0),
        (1.9, 0.9, 0.4, 0.2, 3.0),
    ]
