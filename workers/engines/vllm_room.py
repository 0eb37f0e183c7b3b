"""How many requests vLLM's KV cache holds at once.

vLLM builds an engine if its cache has room for one request of the model's length. What does not
fit of a batch waits, or is put back in the middle and computed anew, and nothing says so: the
figure would be that of a smaller batch. On a GPU the cache is what the weights and the largest
pass have left, so how much it holds is known only when it is there.

All groups of layers take their blocks from one pool, each as many as its kind of attention needs
(`get_max_concurrency_for_kv_cache_config`, which answers for the model's length). One block of the
pool is vLLM's own (`BlockPool.null_block`).
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
    # The last token goes through no pass. Drafted ones do, and drafting has slots of its own.
    drafted = config.num_speculative_tokens + config.num_lookahead_tokens
    stored = min(tokens - 1 + drafted, config.model_config.max_model_len)
    short = copy(config)
    short.model_config = copy(config.model_config)
    short.model_config.max_model_len = max(1, stored)
    pools = {False: cache.num_blocks - 1, True: getattr(cache, "hisparse_host_num_blocks", None)}
    each = {False: 0, True: 0}
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        each[group.host_resident] += -(-spec.max_memory_usage_bytes(short) // spec.page_size_bytes)
    held = [pool // each[host] for host, pool in pools.items() if each[host] and pool is not None]
    return min(held, default=None)
