"""What only the process that holds the model can tell.

vLLM mixes this class into its worker (`worker_extension_cls`), so the methods run in
every rank, in-process or not, on CPU and on CUDA, and answer through `collective_rpc` by
name: no code travels between processes.
"""

from __future__ import annotations

from typing import Any

import torch

from workers import memory


class Report:
    """Mixed into `vllm.v1.worker.*Worker`."""

    model_runner: Any
    device: torch.device
    idle_bytes: int
    """Of `LimitedCPUWorker`: resident size before the first weight."""

    def report_memory(self) -> dict[str, int]:
        """Bytes of this rank: `weights`, `kv_cache` and `peak`."""
        counted_as_loaded: int | None = getattr(self, "weights_bytes", None)
        if counted_as_loaded is None:
            counted_as_loaded = distinct_bytes(list(self.model_runner.get_model().parameters()))
        return {
            "weights": counted_as_loaded,
            "kv_cache": distinct_bytes(_flatten(self.model_runner.kv_caches)),
            "peak": (
                torch.cuda.max_memory_reserved(self.device)
                if self.device.type == "cuda"
                else max(0, memory.status("VmHWM") - self.idle_bytes)
            ),
        }


def _flatten(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        return [caches]
    members = caches.values() if isinstance(caches, dict) else caches
    return [tensor for one in members for tensor in _flatten(one)]


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
