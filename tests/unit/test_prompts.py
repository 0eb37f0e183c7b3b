"""Prompts have exact lengths, repeat with their seed, and share nothing between passes."""

from __future__ import annotations

from workers.contract.workload import Workload
from workers.prompts import RESERVED, random_ids

WORKLOAD = Workload(batch_size=4, input_tokens=50, output_tokens=1, seed=3)


def test_shape_and_range() -> None:
    ids = random_ids(WORKLOAD, vocab_size=100, index=0)
    assert [len(row) for row in ids] == [50] * 4
    assert all(RESERVED <= token < 100 for row in ids for token in row)


def test_same_seed_and_index_give_the_same_prompts() -> None:
    assert random_ids(WORKLOAD, vocab_size=100, index=1) == random_ids(
        WORKLOAD, vocab_size=100, index=1
    )


def test_passes_and_seeds_differ() -> None:
    first = random_ids(WORKLOAD, vocab_size=10_000, index=0)
    assert first != random_ids(WORKLOAD, vocab_size=10_000, index=1)
    other = Workload(batch_size=4, input_tokens=50, output_tokens=1, seed=4)
    assert first != random_ids(other, vocab_size=10_000, index=0)


def test_a_tiny_vocabulary_still_has_ids() -> None:
    assert all(0 <= t < 2 for row in random_ids(WORKLOAD, vocab_size=2, index=0) for t in row)
