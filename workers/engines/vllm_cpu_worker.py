"""vLLM's CPU worker with a memory limit that holds, in every rank.

The limit begins where the model does: after the rank has its libraries, its thread pools
and its process group, and before the first weight. So it bounds weights, KV cache and
activations, which is what a device's memory means, and a rank of its own process has the
same allowance as one inside the actor.

Replicas that share experts gather each other's tokens before them and sum up behind them, any
number of tokens each. vLLM 0.32 has that for its other devices; its CPU build announces it and
raises NotImplementedError, so it is made here of what gloo has. Compiled code then meets the
layer as one opaque operator, as it does on CUDA: how many tokens come is not known beforehand.

Weights are counted as loaded: afterwards vLLM packs most of them into forms of oneDNN that
are no tensors any more, and empties the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import distributed, nn
from vllm.config import VllmConfig
from vllm.distributed.device_communicators.base_device_communicator import (
    DeviceCommunicatorBase,
)
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader import base_loader
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.cpu_worker import CPUWorker

from workers import memory
from workers.engines.reference_load import ReferenceLoad
from workers.engines.vllm_limit import LIMIT_KEY
from workers.engines.vllm_worker import distinct_bytes

REQUESTS_KEY = "kv_cache_requests"
"""Key there of the number of requests that the KV cache must hold at their longest, where how
many bytes that takes is not known before the model is loaded."""


_PARALLEL = 2**20
"""Elements that torch shares out among threads."""


def all_gatherv(
    self: CpuCommunicator,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Rows of all ranks, one rank after the other.

    Args:
        self: the ranks.
        input_: this rank's rows; of a list each tensor by itself.
        dim: 0.
        sizes: rows of each rank; null where all have as many.
    """
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    assert dim == 0, "tokens are rows"
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """This rank's rows of the sum over all ranks; arguments as of `all_gatherv`."""
    assert dim == 0, "tokens are rows"
    total = input_.clone()
    distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes or len(total) // self.world_size)[self.rank_in_group]


def opaque_between_replicas(self: MoERunner) -> Callable[..., Any]:
    """How compiled code calls a layer of experts: on a CPU as part of itself, unless the number
    of rows in it is another than outside."""
    if self.moe_config.moe_parallel_config.dp_size == 1:
        return _select_forward(self)
    ops = torch.ops.vllm
    return ops.moe_forward if self.shared_experts is None else ops.moe_forward_shared


for _exchange in (all_gatherv, reduce_scatterv):
    _name = _exchange.__name__
    if getattr(CpuCommunicator, _name) is getattr(DeviceCommunicatorBase, _name):
        setattr(CpuCommunicator, _name, _exchange)
_select_forward = MoERunner._select_forward
MoERunner._select_forward = opaque_between_replicas


class LimitedCPUWorker(CPUWorker):
    """`CPUWorker` that bounds and measures what the model adds to its process."""

    idle_bytes = 0
    weights_bytes: int | None = None
    reference_load: ReferenceLoad | None = None

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if REQUESTS_KEY in vllm_config.additional_config:
            vllm_config.cache_config.kv_cache_memory_bytes = 1  # no share of the machine's memory
        super().__init__(vllm_config, *args, **kwargs)

    def determine_available_memory(self) -> int:
        requests = self.vllm_config.additional_config.get(REQUESTS_KEY)
        if requests is not None:
            specs = deepcopy(self.get_kv_cache_spec())  # sorting them into groups changes them
            groups = kv_cache_utils.get_kv_cache_groups(self.vllm_config, specs)
            each = kv_cache_utils._max_memory_usage_bytes_from_groups(self.vllm_config, groups)
            # One more, for the block that vLLM keeps for itself.
            self.cache_config.kv_cache_memory_bytes = (requests + 1) * each
        return super().determine_available_memory()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        torch.ones(_PARALLEL).mul_(2)  # threads that torch starts when it first needs them
        self.reference_load = ReferenceLoad(torch.device("cpu"))
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
