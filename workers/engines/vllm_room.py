"""How many requests vLLM's KV cache holds at once.

vLLM builds an engine if its cache has room for one request of the model's length. What does not
fit of a batch waits, or is put back in the middle and computed anew, and nothing says so: the
figure would be that of a smaller batch. On a GPU the cache is what the weights and the largest
pass have left, so how much it holds is known only when it is there.

All groups of layers take their blocks from one pool, each as many as its kind of attention needs.
Full attention keeps every token; of a sliding window's, those that have left it are given back, so
that beside the windows of all requests there are only the tokens that are in a pass just now.
vLLM's own count (`get_max_concurrency_for_kv_cache_config`) takes every request at the pass of its
prompt, and at the model's length. One block of the pool is vLLM's own (`BlockPool.null_block`).
"""

from __future__ import annotations

from copy import copy
from typing import Any


def requests_held(cache: Any, config: Any, tokens: int) -> int | None:
    """Requests that fit in together to their last token; null where they take no cache.

    Args:
        cache: vLLM's `KVCacheConfig`, as the scheduler has it: the smallest of all ranks.
        config: vLLM's `VllmConfig`.
        tokens: of each request, prompt and output together.
    """
    drafted = config.num_speculative_tokens + config.num_lookahead_tokens
    # The last token goes through no pass. Drafted ones do, and drafting has slots of its own.
    stored = max(1, min(tokens - 1 + drafted, config.model_config.max_model_len))
    feeding = _of_length(config, stored, config.scheduler_config.max_num_batched_tokens)
    decoding = _of_length(config, stored, 1 + drafted)
    pools = {False: cache.num_blocks - 1, True: getattr(cache, "hisparse_host_num_blocks", None)}
    held = []
    for host, pool in pools.items():
        specs = [one.kv_cache_spec for one in cache.kv_cache_groups if one.host_resident is host]
        if pool is None or not specs:
            continue
        most = sum(_blocks(one, feeding) for one in specs)
        least = sum(_blocks(one, decoding) for one in specs)
        passing = sum(
            -(-config.max_in_flight_tokens // one.block_size)
            for one in specs
            if _blocks(one, feeding) > _blocks(one, decoding)
        )
        held.append(max(pool // most, (pool - passing) // least))
    return min(held, default=None)


def _of_length(config: Any, tokens: int, in_a_pass: int) -> Any:
    """The configuration of an engine for requests of that length and passes of so many tokens."""
    changed = copy(config)
    changed.model_config = copy(config.model_config)
    changed.model_config.max_model_len = tokens
    changed.scheduler_config = copy(config.scheduler_config)
    changed.scheduler_config.max_num_batched_tokens = in_a_pass
    return changed


def _blocks(spec: Any, config: Any) -> int:
    """Of one request."""
    blocks: int = -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
    return blocks
