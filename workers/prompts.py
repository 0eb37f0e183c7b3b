"""Prompts with exact lengths.

Random token ids need no tokenizer and cannot be shortened or lengthened by one. The
seed, the index of the pass and nothing else decide them, so a probe can replay exactly
what a timed pass saw, and no two passes share a prefix that a cache could reuse.
"""

from __future__ import annotations

import numpy as np

from workers.contract.workload import Workload

RESERVED = 3
"""The lowest ids are padding and sentence marks in most vocabularies."""


def random_ids(workload: Workload, *, vocab_size: int, index: int) -> list[list[int]]:
    """`batch_size` prompts of `input_tokens` ids below `vocab_size`."""
    generator = np.random.default_rng([workload.seed, index])
    low = RESERVED if vocab_size > RESERVED else 0
    shape = (workload.batch_size, workload.input_tokens)
    ids: list[list[int]] = generator.integers(low, vocab_size, size=shape).tolist()
    return ids
