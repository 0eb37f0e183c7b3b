"""Routing skew: the law of k different choices against enumeration, simulation and a formula."""

from __future__ import annotations

from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.moe.accounting import distinct_experts
from workers.moe.skew import (
    Skew,
    curve,
    draw,
    expected_distinct,
    inclusion,
    parse,
    probabilities,
)

UNIFORM, ONE = Skew(kind="uniform"), Skew(kind="all-to-one")


def zipf(exponent: float) -> Skew:
    return Skew(kind="zipf", exponent=exponent)


def enumerated(p: list[float], top_k: int) -> list[float]:
    """Chances by going through every ordered choice."""
    found = [0.0] * len(p)
    for order in permutations(range(len(p)), top_k):
        chance, left = 1.0, 1.0
        for expert in order:
            chance *= p[expert] / left
            left -= p[expert]
        for expert in order:
            found[expert] += chance
    return found


@pytest.mark.parametrize("text", ["uniform", "zipf:1.2", "zipf:0", "all-to-one"])
def test_values_of_the_axis_are_read_and_written(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text", ["zipf", "zipf:", "zipf:x", "zipf:-1", "zipf:nan", "zipf:21", "even", "uniform:1"]
)
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"routing|zipf"):
        parse(text)


def test_probabilities_are_what_they_are_called() -> None:
    assert probabilities(UNIFORM, 4).tolist() == [0.25] * 4
    assert probabilities(zipf(0), 4).tolist() == [0.25] * 4
    assert probabilities(ONE, 3).tolist() == [1, 0, 0]
    found = probabilities(zipf(1), 3)
    assert found.tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    with pytest.raises(ValueError, match="0 experts"):
        probabilities(UNIFORM, 0)
    with pytest.raises(ValueError, match="takes no exponent"):
        Skew(kind="uniform", exponent=1)


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-4, 1), min_size=2, max_size=6),
    st.integers(1, 6),
)
def test_chances_are_those_of_all_ordered_choices(weights: list[float], top_k: int) -> None:
    top_k = min(top_k, len(weights))
    p = [weight / sum(weights) for weight in weights]
    found = inclusion(p, top_k)
    assert found.chances.tolist() == pytest.approx(enumerated(p, top_k), abs=1e-9)
    assert found.error < 1e-9


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6), (256, 8), (16, 15)])
def test_chances_add_up_and_fall_with_the_rank(experts: int, top_k: int, exponent: float) -> None:
    found = inclusion(probabilities(zipf(exponent), experts), top_k)
    assert found.chances.sum() == pytest.approx(top_k, abs=1e-8)
    assert found.error < 1e-8
    assert (np.diff(found.chances) <= 1e-12).all()
    assert found.chances.max() <= 1


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 10), st.integers(0, 200))
def test_uniform_is_the_closed_form(e: int, k: int, n: int) -> None:
    k = min(e, k)
    closed = e * (1 - (comb(e - 1, k) / comb(e, k)) ** n)
    assert float(curve(UNIFORM, e, k, n)) == pytest.approx(closed, abs=1e-9)
    assert float(curve(zipf(0), e, k, n)) == pytest.approx(distinct_experts(e, k, n), abs=1e-9)


@pytest.mark.parametrize(("skew", "top_k"), [(zipf(1.2), 1), (zipf(1.2), 4), (zipf(3), 6)])
def test_the_curve_is_that_of_a_simulation(skew: Skew, top_k: int) -> None:
    """Within four standard errors of 400 simulated passes."""
    experts, passes = 32, 400
    for tokens in (1, 4, 16, 64):
        drawn = draw(skew, experts, top_k, passes * tokens, seed=tokens)
        counts = [len(np.unique(one)) for one in drawn.reshape(passes, -1)]
        error = np.std(counts) / passes**0.5
        expected = float(curve(skew, experts, top_k, tokens))
        assert abs(np.mean(counts) - expected) <= 4 * error + 1e-6


@settings(deadline=None)
@given(st.floats(0, 3), st.integers(1, 8))
def test_skew_touches_no_more_than_uniform_and_no_less_than_one_token(a: float, k: int) -> None:
    sizes = [1, 2, 8, 64, 512]
    skewed, even = curve(zipf(a), 24, k, sizes), curve(UNIFORM, 24, k, sizes)
    assert skewed[0] == pytest.approx(k, abs=1e-8)
    assert (np.diff(skewed) >= -1e-9).all()
    assert (skewed <= even + 1e-8).all()


def test_all_to_one_takes_the_same_experts_always() -> None:
    assert inclusion(probabilities(ONE, 5), 2).chances.tolist() == [1, 1, 0, 0, 0]
    assert curve(ONE, 5, 2, [1, 10, 1000]).tolist() == [2, 2, 2]
    assert draw(ONE, 5, 2, 3, seed=0).tolist() == [[0, 1]] * 3


def test_draws_are_seeded_and_never_twice_the_same_expert() -> None:
    one = draw(zipf(1), 16, 4, 500, seed=3)
    assert (one == draw(zipf(1), 16, 4, 500, seed=3)).all()
    assert (one != draw(zipf(1), 16, 4, 500, seed=4)).any()
    assert all(len(set(row)) == 4 for row in one.tolist())
    with pytest.raises(ValueError, match="17 of 16"):
        draw(zipf(1), 16, 17, 1, seed=0)


def test_sizes_keep_their_shape() -> None:
    assert expected_distinct([0.5, 1.0], [[0, 1], [2, 3]]).tolist() == [[0, 1.5], [1.75, 1.875]]


@pytest.mark.parametrize(
    ("p", "top_k", "message"),
    [
        ([0.5, 0.4], 1, "add up to 1"),
        ([1.5, -0.5], 1, "not negative"),
        ([[1.0]], 1, "one row"),
        ([0.5, 0.5], 3, "3 of 2 experts"),
        ([0.5, 0.5], 0, "0 of 2 experts"),
    ],
)
def test_what_is_no_distribution_is_refused(p: list[float], top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inclusion(p, top_k)
