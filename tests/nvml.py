"""GPUs that a test makes up; see `tests/fakes/nvml/pynvml.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "fakes" / "nvml"
"""On the path of Python, processes that are started see those GPUs too."""


def gpu(uuid: str = "GPU-0a", **facts: Any) -> dict[str, Any]:
    """An H100, as the fake takes it."""
    told = {"name": "NVIDIA H100 80GB HBM3", "total_mib": 80 * 1024, "used_mib": 4, "mig": 0}
    return {"uuid": uuid} | told | facts


class FakeNvml:
    """The fake library in place of pynvml, for this process and those that it starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        self._file = file
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)
        monkeypatch.syspath_prepend(FOLDER)
        monkeypatch.setenv("FAKE_NVML", str(file))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def tell(self, *gpus: dict[str, Any], **system: Any) -> None:
        """From now on these are the GPUs, and this is their driver's."""
        told = {"driver": "580.65.06", "cuda": 13000, "gpus": gpus} | system
        self._file.write_text(json.dumps(told))
