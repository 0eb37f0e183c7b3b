"""A limit of a GPU's memory near its size, in vLLM's own arithmetic (`request_memory`, 0.32)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from workers.engines.vllm_limit import OWN_BYTES, granted, granting

GIB = 2**30
TOTAL = int(79.11 * GIB)
CONTEXT = int(0.6 * GIB)


def _request_memory(snapshot: SimpleNamespace, cache_config: SimpleNamespace) -> int:
    """As vLLM's: `v1/worker/utils.py`."""
    requested = math.ceil(snapshot.total_memory * cache_config.gpu_memory_utilization)
    if snapshot.free_memory < requested:
        raise ValueError("Free memory on device is less than desired GPU memory utilization")
    return requested


def _asked(limit: int | None, free: int, share: float = 0.92) -> int:
    cache_config = SimpleNamespace(gpu_memory_utilization=share)
    request = granting(_request_memory, lambda: limit)
    found: int = request(SimpleNamespace(free_memory=free, total_memory=TOTAL), cache_config)
    assert 0 < cache_config.gpu_memory_utilization <= 1  # what vLLM allows
    return found


@pytest.mark.parametrize("limit_gib", [10.0, 40.0, 78.0])
def test_a_limit_is_kept_to_the_byte(limit_gib: float) -> None:
    limit = int(limit_gib * GIB)
    assert limit - 1 <= _asked(limit, TOTAL - CONTEXT) <= limit


@pytest.mark.parametrize("limit_gib", [79.0, 79.6, 80.0, 141.0])
def test_a_limit_near_the_size_of_the_card_or_beyond_takes_what_is_there(limit_gib: float) -> None:
    free = TOTAL - CONTEXT
    assert free - 1 <= _asked(int(limit_gib * GIB), free) <= free


def test_a_share_near_all_takes_what_is_there() -> None:
    free = TOTAL - CONTEXT
    assert free - 1 <= _asked(None, free, share=1.0) <= free
    assert _asked(None, free) == pytest.approx(0.92 * TOTAL, abs=2)


@pytest.mark.parametrize("limit", [None, 75 * GIB])
def test_what_others_hold_is_refused_in_the_engines_words(limit: int | None) -> None:
    with pytest.raises(ValueError, match="Free memory on device"):
        _asked(limit, TOTAL - 20 * GIB)


def test_what_others_hold_is_no_hindrance_below_it() -> None:
    assert granted(10 * GIB, free=TOTAL - 20 * GIB, total=TOTAL) == 10 * GIB
    assert granted(TOTAL, free=TOTAL - OWN_BYTES - 1, total=TOTAL) == TOTAL
