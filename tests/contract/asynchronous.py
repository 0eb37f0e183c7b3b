"""CPU engines that schedule as a GPU's do, one pass ahead of what is known.

vLLM's CPU platform turns asynchronous scheduling off; its queue of batches, its scheduler and the
model runner's part of it run on any device. One engine after another in one process needs the
platform to say so: vLLM mixes the rank's extension into the worker's class, once.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform

from workers.engines.vllm_cpu_worker import LimitedCPUWorker


class AsynchronousCPUWorker(LimitedCPUWorker):
    """For the one engine of a replica's process, which has one device: the configuration is still
    open when its worker is made."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        vllm_config.scheduler_config.async_scheduling = True
        super().__init__(vllm_config, *args, **kwargs)


def schedule_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every engine of this process schedule so."""
    check = CpuPlatform.check_and_update_config

    def check_and_schedule_ahead(cls: type[CpuPlatform], config: VllmConfig) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", classmethod(check_and_schedule_ahead)
    )
