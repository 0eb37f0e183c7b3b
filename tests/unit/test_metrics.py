"""Figures from stamps, against arithmetic done by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.contract.measurement import Drafted, Measurement, Pass, PassKind
from workers.metrics import figures, interval


def _pass(kind: PassKind, *rows: tuple[float, ...], length: int = 3, repeat: int = 0) -> Pass:
    return Pass(
        kind=kind,
        repeat=repeat,
        started_at=0.0,
        e2e_s=max(row[-1] for row in rows),
        input_tokens=length,
        token_s=rows,
        step_s=tuple(sorted({stamp for row in rows for stamp in row})),
    )


def test_figures_of_one_pass() -> None:
    one = _pass("one_token", (0.5,), (0.7,))
    timed = _pass("timed", (1.0, 1.5, 3.0), (2.0, 2.5, 4.0))
    got = figures(Measurement(passes=(one, timed)), output_tokens=3)
    assert got["repeats"] == 1
    assert got["ttft_s"] == 1.5
    assert got["ttft_paper_s"] == 0.7
    assert got["e2e_s"] == 4.0
    assert got["itl_paper_s"] == pytest.approx((4.0 - 0.7) / (2 * 3 - 1))
    assert got["tpot_s"] == 1.0
    assert got["itl_s"] == 0.5
    assert got["itl_p90_s"] == 1.5
    assert got["throughput_tok_s"] == pytest.approx(2 * (3 + 3) / 4.0)
    assert got["output_throughput_tok_s"] == pytest.approx(6 / 4.0)
    assert got["requests_s"] == 0.5
    assert got["e2e_s_ci_low"] is None and got["ci_level"] is None and got["e2e_s_std"] is None


def test_the_paper_s_own_example_of_equation_2() -> None:
    """MoE-Inference-Bench: batch 16, 2048 tokens in all per request, 4.1798 s."""
    rows = tuple((0.1, 4.1798) for _ in range(16))
    got = figures(Measurement(passes=(_pass("timed", *rows, length=2046),)), output_tokens=2)
    assert got["throughput_tok_s"] == pytest.approx(7839.6, abs=0.05)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("ttft_s", [0.9, 1.0, 1.1])
def test_a_single_token_has_no_inter_token_latency(batch: int, ttft_s: float) -> None:
    """However many requests there are: a pass of one token is the one that gives the TTFT, and
    what noise leaves between the two is no latency, above 0, at 0 or below."""
    passes = (
        _pass("one_token", *[(ttft_s,)] * batch),
        _pass("timed", *[(1.0,)] * batch),
    )
    got = figures(Measurement(passes=passes), output_tokens=1)
    assert got["ttft_paper_s"] == ttft_s and got["e2e_s"] == 1.0
    for name in ("tpot_s", "itl_s", "itl_p90_s", "itl_p99_s", "itl_paper_s"):
        assert got[name] is None


def test_a_first_token_that_took_longer_than_all_leaves_no_inter_token_latency() -> None:
    passes = (_pass("one_token", (1.2,)), _pass("timed", (0.9, 1.0)))
    got = figures(Measurement(passes=passes), output_tokens=2)
    assert got["itl_paper_s"] is None
    assert got["tpot_s"] == pytest.approx(0.1)


def test_tokens_that_came_together_had_no_time_between_them() -> None:
    got = figures(Measurement(passes=(_pass("timed", (1.0, 1.0, 1.0)),)), output_tokens=3)
    assert got["tpot_s"] is None and got["itl_s"] is None


def test_drafts_that_no_step_checked_have_no_length() -> None:
    drafted = Drafted(steps=0, proposed=3, accepted=0)
    one = replace(_pass("timed", (1.0, 2.0)), drafted=drafted)
    got = figures(Measurement(passes=(one,)), output_tokens=2)
    assert "accepted_length" not in got and "acceptance_rate" not in got


@given(
    rows=st.lists(
        st.lists(st.floats(min_value=1e-6, max_value=1e3), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    others=st.lists(st.floats(min_value=1e-6, max_value=1e3), max_size=2),
    repeats=st.integers(min_value=1, max_value=3),
)
def test_every_figure_is_a_number_above_zero_or_null(
    rows: list[list[float]], others: list[float], repeats: int
) -> None:
    stamps = [tuple(sorted(row)) for row in rows]
    passes = [_pass("timed", *stamps, repeat=n) for n in range(repeats)]
    passes += [_pass("one_token", (stamp,)) for stamp in others]
    got = figures(Measurement(passes=tuple(passes)), output_tokens=max(map(len, stamps)))
    spread = got.pop("e2e_s_std")
    assert spread is None if repeats == 1 else spread == pytest.approx(0, abs=1e-9)
    for name, value in got.items():
        assert value is None or (math.isfinite(value) and value > 0), name


def test_throughput_interval_is_that_of_the_time_turned_over() -> None:
    passes = tuple(_pass("timed", (1.0, float(2 + i)), repeat=i) for i in range(6))
    got = figures(Measurement(passes=passes), output_tokens=2)
    assert (got["e2e_s_ci_low"], got["e2e_s_ci_high"]) == (2.0, 7.0)
    assert got["throughput_tok_s_ci_low"] == pytest.approx(5 / 7)
    assert got["throughput_tok_s_ci_high"] == pytest.approx(5 / 2)
    assert got["ci_level"] == pytest.approx(1 - 2 / 64)


@pytest.mark.parametrize(
    ("n", "low", "high", "level"),
    [(3, 1, 3, 0.75), (5, 1, 5, 0.9375), (6, 1, 6, 0.96875), (9, 2, 8, 0.9609375), (1, 1, 1, None)],
)
def test_order_statistic_intervals(n: int, low: int, high: int, level: float | None) -> None:
    got = interval([float(i) for i in range(1, n + 1)])
    assert (got.low, got.high) == (low, high)
    assert got.level == level


@given(st.lists(st.floats(min_value=0.1, max_value=10), min_size=1, max_size=60))
def test_an_interval_holds_its_median_and_claims_no_more_than_the_binomial(
    values: list[float],
) -> None:
    got = interval(values)
    assert min(values) <= got.low <= got.median <= got.high <= max(values)
    if got.level is None:
        assert len(values) == 1 and math.isinf(got.width)
    else:
        assert got.level <= 1 - 2 * 0.5 ** len(values)
        assert got.level >= 0.95 or len(values) < 6
