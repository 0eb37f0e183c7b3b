"""vLLM's CPU worker with a memory limit that holds, in every rank.

The limit begins where the model does: after the rank has its libraries, its thread pools
and its process group, and before the first weight. So it bounds weights, KV cache and
activations, which is what a device's memory means, and a rank of its own process has the
same allowance as one inside the actor.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from workers import memory

LIMIT_KEY = "memory_limit_bytes"
"""Key of vLLM's `additional_config` that carries the limit of one rank."""


class LimitedCPUWorker(CPUWorker):
    """`CPUWorker` that bounds and measures what the model adds to its process."""

    idle_bytes = 0

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        memory.trim()
        memory.reset_peak()
        self.idle_bytes = memory.status("VmRSS")
        limit = self.vllm_config.additional_config.get(LIMIT_KEY)
        if limit is not None:
            memory.limit(limit)
        super().load_model(*args, **kwargs)
