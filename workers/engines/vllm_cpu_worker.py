"""vLLM's CPU worker with a memory limit that holds, in every rank.

The limit begins where the model does: after the rank has its libraries, its thread pools
and its process group, and before the first weight. So it bounds weights, KV cache and
activations, which is what a device's memory means, and a rank of its own process has the
same allowance as one inside the actor.

Weights are counted as loaded: afterwards vLLM packs most of them into forms of oneDNN that
are no tensors any more, and empties the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader import base_loader
from vllm.v1.worker.cpu_worker import CPUWorker

from workers import memory
from workers.engines.vllm_worker import distinct_bytes

LIMIT_KEY = "memory_limit_bytes"
"""Key of vLLM's `additional_config` that carries the limit of one rank."""


_PARALLEL = 2**20
"""Elements that torch shares out among threads."""


class LimitedCPUWorker(CPUWorker):
    """`CPUWorker` that bounds and measures what the model adds to its process."""

    idle_bytes = 0
    weights_bytes: int | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        torch.ones(_PARALLEL).mul_(2)  # threads that torch starts when it first needs them
        memory.reset_peak()
        self.idle_bytes = memory.status("VmRSS")
        limit = self.vllm_config.additional_config.get(LIMIT_KEY)
        if limit is not None:
            memory.limit(limit)
        pack = base_loader.process_weights_after_loading

        def count_then_pack(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            # Called again for a draft model.
            self.weights_bytes = (self.weights_bytes or 0) + distinct_bytes(
                list(model.parameters())
            )
            pack(model, *args, **kwargs)

        base_loader.process_weights_after_loading = count_then_pack
        try:
            super().load_model(*args, **kwargs)
        finally:
            base_loader.process_weights_after_loading = pack
