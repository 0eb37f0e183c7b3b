"""How many requests a KV cache holds, of groups of layers with unlike needs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from workers.engines.vllm_room import requests_held

BUDGET = 1024
"""Tokens of a pass."""


@dataclass
class _Full:
    """As vLLM's `FullAttentionSpec`."""

    block_size: int = 16
    page_size_bytes: int = 1000

    def max_memory_usage_bytes(self, config: Any) -> int:
        return -(-config.model_config.max_model_len // self.block_size) * self.page_size_bytes


@dataclass
class _Window(_Full):
    """As vLLM's `SlidingWindowSpec`: what leaves the window is given back."""

    window: int = 32

    def max_memory_usage_bytes(self, config: Any) -> int:
        tokens = self.window - 1 + config.max_in_flight_tokens
        tokens = min(config.model_config.max_model_len, tokens)
        return (-(-tokens // self.block_size) + 1) * self.page_size_bytes


@dataclass
class _Config:
    """As vLLM's `VllmConfig`, with two batches in flight."""

    model_config: Any
    scheduler_config: Any
    num_speculative_tokens: int
    num_lookahead_tokens: int = 0

    @property
    def max_in_flight_tokens(self) -> int:
        return 2 * int(self.scheduler_config.max_num_batched_tokens)


def _cache(blocks: int, *specs: _Full, host: bool = False) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=one, host_resident=False) for one in specs]
    if host:
        groups.append(SimpleNamespace(kv_cache_spec=_Full(), host_resident=True))
    return SimpleNamespace(num_blocks=blocks, kv_cache_groups=groups, hisparse_host_num_blocks=20)


def _config(longest: int = 4096, drafted: int = 0) -> Any:
    return _Config(
        model_config=SimpleNamespace(max_model_len=longest),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=BUDGET),
        num_speculative_tokens=drafted,
    )


@pytest.mark.parametrize(
    ("blocks", "specs", "tokens", "held"),
    [
        (101, (_Full(),), 160, 10),
        (100, (_Full(),), 160, 9),  # a block is vLLM's own
        (101, (_Full(),), 161, 10),  # the last token is not stored
        (101, (_Full(),), 162, 9),
        (401, (_Full(), _Window()), 1024, 4),  # 64 + 4 blocks each, and 128 in passes
        (201, (_Full(), _Window()), 1024, 1),  # 64 + 65: no more is to spare
        (401, (_Window(),), 1024, 68),
        (401, (_Window(),), 17, 200),  # shorter than the window
        (5, (_Full(),), 1024, 0),
        (101, (), 1024, None),
    ],
)
def test_what_all_groups_take_comes_from_one_pool(
    blocks: int, specs: tuple[_Full, ...], tokens: int, held: int | None
) -> None:
    config = _config()
    assert requests_held(_cache(blocks, *specs), config, tokens) == held
    assert config.model_config.max_model_len == 4096


def test_drafted_tokens_take_room_up_to_the_model_s_length() -> None:
    cache = _cache(101, _Full())
    assert requests_held(cache, _config(drafted=4), 160) == 9
    assert requests_held(cache, _config(longest=160, drafted=4), 160) == 10


def test_the_smaller_pool_decides() -> None:
    assert requests_held(_cache(101, _Full(), host=True), _config(), 160) == 2
