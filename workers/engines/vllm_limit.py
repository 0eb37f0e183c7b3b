"""How a memory limit reaches the ranks of a vLLM, and what it means on a GPU.

vLLM takes a share of what CUDA calls the total of a GPU, and refuses to start where less than that
is free. Both fail a limit near the size of the card: NVML, from which the size is known
beforehand, also counts what the driver keeps for itself, and when vLLM looks, its own CUDA context
and NCCL's buffers have been taken already. So a limit travels to each rank in bytes, and a rank
that asks for a little more than is free gets what is free. Where more is missing, another program
holds it: vLLM then refuses as it always does.

Read in vLLM 0.32: `request_memory` in `v1/worker/utils.py`, called by `v1/worker/gpu_worker.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LIMIT_KEY = "memory_limit_bytes"
"""Key of vLLM's `additional_config` that carries the limit of one rank."""
OWN_BYTES = 2 * 2**30
"""Most that the CUDA context and the communicators of a rank take before its model is loaded."""


def granted(asked: int, *, free: int, total: int) -> int:
    """Bytes that a rank may use of a GPU.

    Args:
        asked: what it was told to use.
        free, total: of the device, as CUDA counts them.

    Returns:
        `asked`; what is free, where the rank itself has taken the rest.
    """
    asked = min(asked, total)
    return free if free < asked and total - free <= OWN_BYTES else asked


def granting(request_memory: Callable[..., int], limit: Callable[[], int | None]) -> Any:
    """vLLM's `request_memory` under a limit.

    Args:
        request_memory: that of vLLM, which takes a snapshot of the device and a configuration of
            the cache, computes a share and raises ValueError where less is free.
        limit: of this rank, in bytes; null where vLLM's own share stands.
    """

    def request(snapshot: Any, cache_config: Any, *more: Any) -> int:
        free, total = snapshot.free_memory, snapshot.total_memory
        asked = limit()
        if asked is None:
            asked = int(total * cache_config.gpu_memory_utilization)
        given = granted(asked, free=free, total=total)
        if given < asked:
            print(f"{asked} bytes of a GPU were asked for; {given} are there to be had")
        # vLLM multiplies by the total again and rounds up.
        cache_config.gpu_memory_utilization = (given - 1) / total
        return request_memory(snapshot, cache_config, *more)

    return request


def take_over() -> None:
    """Has the GPU worker of this process keep to a limit in bytes; nothing changes where vLLM has
    no GPUs."""
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return
    from vllm.v1.worker import gpu_worker

    def limit() -> int | None:
        found: int | None = get_current_vllm_config().additional_config.get(LIMIT_KEY)
        return found

    gpu_worker.request_memory = granting(gpu_worker.request_memory, limit)
