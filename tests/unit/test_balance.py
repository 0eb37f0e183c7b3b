"""Load imbalance: its bounds, its ends, what it does not depend on, and ranks as vLLM deals."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.moe.balance import MEASURES, balance, dense_counts, expert_ranks, rank_loads

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)
SOME = COUNTS.filter(lambda counts: sum(counts) > 0)


def figures(counts: list[int]) -> list[float]:
    found = balance(counts)
    return [float(getattr(found, name)) for name in MEASURES]


@settings(deadline=None)
@given(SOME)
def test_every_figure_stays_within_its_bounds(counts: list[int]) -> None:
    e = len(counts)
    highest, variation, entropy, gini = figures(counts)
    near = 1e-9
    assert 1 - near <= highest <= e + near
    assert -near <= variation <= math.sqrt(e - 1) + near
    assert -near <= entropy <= 1 + near
    assert -near <= gini <= (e - 1) / e + near


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 10**9))
def test_even_and_all_in_one_are_the_ends(experts: int, tokens: int) -> None:
    assert figures([tokens] * experts) == pytest.approx([1, 0, 1, 0], abs=1e-9)
    alone = [0] * (experts - 1) + [tokens]
    ends = [experts, math.sqrt(experts - 1), 0 if experts > 1 else 1, (experts - 1) / experts]
    assert figures(alone) == pytest.approx(ends, abs=1e-9)


@settings(deadline=None)
@given(SOME, st.integers(1, 1000), st.randoms(use_true_random=False))
def test_order_and_length_of_the_trace_do_not_matter(
    counts: list[int], factor: int, random: Random
) -> None:
    mixed = list(counts)
    random.shuffle(mixed)
    want = pytest.approx(figures(counts), abs=1e-9)
    assert figures(mixed) == want
    assert figures([factor * count for count in counts]) == want


@settings(deadline=None)
@given(SOME)
def test_gini_is_the_mean_difference_of_all_pairs(counts: list[int]) -> None:
    pairs = sum(abs(one - other) for one in counts for other in counts)
    assert figures(counts)[3] == pytest.approx(pairs / (2 * len(counts) * sum(counts)), abs=1e-9)


def test_a_layer_without_tokens_has_no_balance() -> None:
    found = balance([[4, 4], [0, 0], [3, 1]])
    assert np.isnan(found.gini).tolist() == [False, True, False]
    even, none, uneven = found.rows()
    assert even == {"max_over_mean": 1.0, "variation": 0.0, "entropy": 1.0, "gini": 0.0}
    assert none == dict.fromkeys(MEASURES)
    assert uneven["max_over_mean"] == 1.5
    assert uneven["variation"] == pytest.approx(0.5)
    assert uneven["gini"] == pytest.approx(0.25)
    assert balance([[0]]).rows() == [dict.fromkeys(MEASURES)]


@pytest.mark.parametrize("counts", [[], 3, [1, -1], [1, float("nan")]])
def test_what_is_no_count_is_refused(counts: object) -> None:
    with pytest.raises(ValueError, match=r"at least one|not negative"):
        balance(counts)  # type: ignore[arg-type]


def test_experts_are_dealt_as_vllm_deals_them() -> None:
    assert expert_ranks(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert expert_ranks(10, 4).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert expert_ranks(10, 4, "round_robin").tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert expert_ranks(2, 4).tolist() == [0, 1]
    for bad in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="cannot be dealt"):
            expert_ranks(*bad)
    with pytest.raises(ValueError, match="no placement 'snake'"):
        expert_ranks(4, 2, "snake")  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from(["linear", "round_robin"]))
def test_ranks_hold_every_expert_once_and_differ_by_one_at_most(
    experts: int, ranks: int, placement: str
) -> None:
    held = expert_ranks(experts, ranks, placement)  # type: ignore[arg-type]
    sizes = np.bincount(held, minlength=ranks)
    assert (held.size, sizes.sum()) == (experts, experts)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()  # the first ranks have the one more


def test_rank_loads_add_up_and_can_be_even_where_experts_are_not() -> None:
    counts = [[9, 1, 5, 5], [10, 10, 0, 0]]
    assert rank_loads(counts, 2).tolist() == [[10, 10], [20, 0]]
    assert rank_loads(counts, 2, "round_robin").tolist() == [[14, 6], [10, 10]]
    assert balance(rank_loads(counts, 2)).max_over_mean.tolist() == [1, 2]
    passes = np.arange(24).reshape(3, 2, 4)
    assert rank_loads(passes, 3).sum(axis=-1).tolist() == passes.sum(axis=-1).tolist()


def test_rows_of_the_table_become_counts() -> None:
    layers, counts = dense_counts([(3, 0, 5), (1, 2, 1), (3, 0, 2)], experts=4)
    assert layers == [1, 3]
    assert counts.tolist() == [[0, 0, 1, 0], [7, 0, 0, 0]]
    assert dense_counts([])[1].shape == (0, 0)
    with pytest.raises(ValueError, match="expert 4 of a layer of 4"):
        dense_counts([(0, 4, 1)], experts=4)
