"""Distinct experts, and the rule that ends a probe, on routers whose nature is known."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.moe.activation import (
    Rule,
    Settling,
    chance,
    distance,
    distinct,
    mean_distinct,
    uniform_distinct,
)

LAYERS, EXPERTS, TOP_K, TOKENS = 6, 32, 4, 200


def zipf(exponent: float) -> np.ndarray:
    weights: np.ndarray = np.arange(1.0, EXPERTS + 1) ** -exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def drawn(p: np.ndarray, random: np.random.Generator, tokens: int = TOKENS) -> np.ndarray:
    """Counts [layers, experts] of tokens that choose TOP_K different experts each."""
    scores = np.log(p) + random.gumbel(size=(LAYERS, tokens, EXPERTS))
    chosen = np.argpartition(-scores, TOP_K, axis=-1)[..., :TOP_K]
    return np.stack([np.bincount(one.ravel(), minlength=EXPERTS) for one in chosen])


def followed(router: Callable[[int], np.ndarray], passes: int, seed: int = 0) -> Settling:
    random = np.random.default_rng(seed)
    probe = Settling(TOP_K)
    for index in range(passes):
        if probe.add(drawn(router(index), random)):
            break
    return probe


def test_an_expert_counts_once_per_pass_however_many_chose_it() -> None:
    passes = [[[9, 0, 0], [1, 1, 0]], [[1, 0, 2], [0, 0, 0]]]
    assert distinct(passes).tolist() == [[1, 2], [2, 0]]
    found = mean_distinct(passes)
    assert found is not None and found.tolist() == [1.5, 1.0]
    assert mean_distinct(np.zeros((0, 2, 3))) is None
    with pytest.raises(ValueError, match="3 axes, not 2"):
        mean_distinct([[1, 2]])


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 40))
def test_uniform_is_the_count_of_choices_that_leave_an_expert_out(e: int, k: int, n: int) -> None:
    k = min(e, k)
    exact = e * (1 - (comb(e - 1, k) / comb(e, k)) ** n)
    assert float(uniform_distinct(e, k, n)) == pytest.approx(exact, abs=1e-9)


def test_uniform_keeps_the_shape_of_the_sizes() -> None:
    assert uniform_distinct(8, 2, [[1], [0]]).tolist() == [[2.0], [0.0]]


def test_chance_is_what_a_still_router_gives() -> None:
    random = np.random.default_rng(1)
    for p in (zipf(0), zipf(1)):
        pairs = [(drawn(p, random), drawn(p, random, 3 * TOKENS)) for _ in range(20)]
        found = np.mean([distance(*pair) for pair in pairs])
        expected = np.mean([chance(*pair, TOP_K) for pair in pairs])
        assert found == pytest.approx(expected, rel=0.04)


def test_distance_has_its_ends_and_no_value_without_tokens() -> None:
    assert distance([[4, 0]], [[0, 9]]).tolist() == [1.0]
    assert distance([[4, 2]], [[2, 1]]).tolist() == [0.0]
    assert np.isnan(distance([[0, 0]], [[2, 1]])).all()


@pytest.mark.parametrize("exponent", [0, 0.8, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_still_router_settles(exponent: float, seed: int) -> None:
    probe = followed(lambda _: zipf(exponent), passes=60, seed=seed)
    assert probe.settled
    last, before = probe.checks[-1], probe.checks[-2]
    assert last.passed and before.passed
    assert last.tokens >= 1.25 * before.tokens
    assert last.by_chance <= 0.05  # not before the halves could tell


@pytest.mark.parametrize("seed", range(4))
def test_a_drifting_router_never_settles(seed: int) -> None:
    """Favourites move on by one expert per pass, so the halves never look alike."""
    probe = followed(lambda index: np.roll(zipf(1), index), passes=28, seed=seed)
    assert not probe.settled
    fine = [check for check in probe.checks if check.by_chance <= 0.05]
    assert fine and not any(check.passed for check in fine)


def test_a_router_that_turns_from_even_to_skewed_never_settles() -> None:
    passes = 60
    probe = followed(
        lambda i: (1 - i / passes) * zipf(0) + i / passes * zipf(1.5), passes=passes, seed=5
    )
    assert not probe.settled
    assert probe.checks[-1].distance > 4 * probe.checks[-1].by_chance


def test_too_few_tokens_are_no_evidence() -> None:
    probe = followed(lambda _: zipf(0), passes=3)
    assert probe.checks and not probe.settled
    assert not any(check.passed for check in probe.checks)


def test_the_same_pass_again_and_again_settles_by_the_tolerance() -> None:
    probe = Settling(1)
    answers = [probe.add([[3, 1], [0, 4]]) for _ in range(5)]
    assert answers[-1]
    assert probe.checks[0].distance == 0.0
    assert probe.counts is not None and probe.counts.tolist() == [[15, 5], [0, 20]]


def test_a_settled_probe_that_moves_is_unsettled_again() -> None:
    probe = Settling(1)
    for _ in range(8):
        probe.add([[50, 50]])
    assert probe.settled
    for _ in range(8):
        probe.add([[100, 0]])
    assert not probe.settled


def test_memory_does_not_grow_with_passes_and_no_token_is_lost() -> None:
    probe = Settling(1)
    for index in range(500):
        probe.add([[index % 3, 1]])
    assert probe.counts is not None
    assert probe.counts.tolist() == [[sum(index % 3 for index in range(500)), 500]]
    assert len(probe._chunks) <= 65
    assert len(probe.checks) < 40
    one, other = (half.sum() for half in probe._halves())
    assert abs(one - other) < 0.1 * (one + other)


def test_layers_and_passes_without_tokens_do_not_count() -> None:
    probe = Settling(2)
    assert probe.add([[0, 0], [0, 0]]) is False
    assert probe.counts is None
    for _ in range(6):
        probe.add([[2, 2], [0, 0]])
    assert probe.settled  # the layer that was never used has no say
    with pytest.raises(ValueError, match="not those of this model"):
        probe.add([[1, 1]])
    with pytest.raises(ValueError, match="must be at least 1"):
        Settling(0)


@pytest.mark.parametrize("wrong", [{"tolerance": 0}, {"factor": 0.5}, {"growth": 1}])
def test_a_rule_without_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="are"):
        Rule(**wrong)  # type: ignore[arg-type]
