"""How fast the machine was, from a load of fixed work: the figures, not the load."""

from __future__ import annotations

import pytest

from workers.contract.record import RECORDS
from workers.hardware.reference import Rate, Reference, columns, rate, together

FAST = Reference(
    bandwidth_gb_s=Rate(median=20.0, spread=0.02), tflops=Rate(median=0.2, spread=0.05)
)
SLOW = Reference(bandwidth_gb_s=Rate(median=8.0, spread=0.1), tflops=Rate(median=0.1, spread=0.01))


def test_a_rate_is_the_median_with_the_quartiles_around_it() -> None:
    found = rate(8.0, [1.0, 2.0, 2.0, 4.0, 1.0])  # rates 8, 4, 4, 2, 8
    assert (found.median, found.spread) == (4.0, 1.0)
    assert rate(8.0, [2.0] * 5) == Rate(median=4.0, spread=0.0)
    with pytest.raises(ValueError, match="two repeats"):
        rate(1.0, [1.0])


def test_ranks_add_up_and_the_noisiest_tells_the_noise() -> None:
    both = together([FAST, SLOW])
    assert both is not None
    assert both.bandwidth_gb_s == Rate(median=28.0, spread=0.1)
    assert both.tflops.spread == 0.05
    assert together([FAST, None]) is None  # a sum without one rank would be another figure
    assert together([]) is None


def test_its_columns_are_of_the_schema_and_without_what_is_not_known() -> None:
    assert columns(FAST, SLOW) == {
        "reference_bandwidth_gb_s_before": 20.0,
        "reference_bandwidth_gb_s_after": 8.0,
        "reference_bandwidth_spread": 0.1,
        "reference_tflops_before": 0.2,
        "reference_tflops_after": 0.1,
        "reference_tflops_spread": 0.05,
    }
    assert set(columns(FAST, SLOW)) <= set(RECORDS.names)
    assert "reference_tflops_after" not in columns(FAST, None)
    assert columns(None, None) == {}
