"""A CPU engine that schedules as a GPU's does, one pass ahead of what it knows.

vLLM's CPU platform turns asynchronous scheduling off; its queue of batches, its scheduler and the
model runner's part of it run on any device. The configuration is still open when a worker of the
engine's own process is made, before the scheduler.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from workers.engines.vllm_cpu_worker import LimitedCPUWorker


class AsynchronousCPUWorker(LimitedCPUWorker):
    """For engines of one device per replica."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        vllm_config.scheduler_config.async_scheduling = True
        super().__init__(vllm_config, *args, **kwargs)


ARGS = {"worker_cls": f"{__name__}.{AsynchronousCPUWorker.__name__}"}
"""Arguments of an engine that has it."""
