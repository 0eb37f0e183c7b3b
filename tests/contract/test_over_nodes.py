"""What vLLM would take from the host of an engine to ranks on other nodes."""

from __future__ import annotations

import pytest

from workers import given
from workers.contract.layout import Layout
from workers.engines import vllm_engine


def test_names_of_a_hosts_own_folders_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars

    for name in given.OF_ONE_NODE:
        monkeypatch.setenv(name, "/only/here")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert get_driver_env_vars(set())["TMPDIR"] == "/only/here", "as vLLM does by itself"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert vllm_engine._executor(Layout(pipeline=2), on_cpu=False) == "ray"
    carried = get_driver_env_vars(set())
    assert carried["NCCL_DEBUG"] == "INFO" and "/only/here" not in carried.values()
