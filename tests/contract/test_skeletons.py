"""Skeletons of quantised models on the real CPU engine: every stored tensor holds random codes.

Read after vLLM's loader is done and before vLLM packs weights into forms of its own. Dense layers
are quantised here, since experts would need AMX. Where the processor, or this build, lacks the
kernel itself, the engine ends in its first pass, after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.contract.engine import EngineSettings
from workers.contract.errors import Crashed, Unsupported
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.prompts import random_ids

pytestmark = pytest.mark.timeout(240)

WORKLOAD = Workload(batch_size=2, input_tokens=16, output_tokens=4)
STORED: Mapping[str, tuple[torch.dtype, int]] = {
    "compressed-tensors": (torch.int8, 150),
    "gptq": (torch.int32, 200),
    "awq": (torch.int32, 200),
}
"""Type of the codes, and distinct bytes that they have at least."""
SCALES = ("proj.scales", "proj.weight_scale")


@pytest.mark.parametrize("quantization", STORED)
def test_what_is_stored_is_random(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.engines.vllm_skeleton import SkeletonLoader

    loaded: dict[str, torch.Tensor] = {}
    load: Callable[..., None] = SkeletonLoader.load_weights

    def load_and_keep(self: Any, model: torch.nn.Module, config: Any) -> None:
        load(self, model, config)
        loaded.update({name: one.detach().clone() for name, one in model.state_dict().items()})

    monkeypatch.setattr(SkeletonLoader, "load_weights", load_and_keep)
    model = Model(name="qwen3-0.6b", weights="dummy", num_layers=1, quantization=quantization)
    trial = Trial(model=model, workload=WORKLOAD, engine=EngineSettings(eager=True))
    with suppress(Crashed, Unsupported):  # of the first pass: `loaded` is full by then
        engine = VllmEngine(trial, [WORKLOAD], Site(scratch=tmp_path, device="cpu"))
        prompts = random_ids(WORKLOAD, vocab_size=1000, index=0)
        try:
            assert engine.generate(prompts, 4, kind="timed", repeat=0).output_tokens == 8
        finally:
            engine.close()

    dtype, distinct = STORED[quantization]
    codes = {name: one for name, one in loaded.items() if one.dtype == dtype and "zero" not in name}
    assert len(codes) == 4  # attention's two and the FFN's two
    for name, tensor in codes.items():
        found = torch.bincount(tensor.contiguous().view(-1).view(torch.uint8).int(), minlength=256)
        assert (found > 0).sum() >= distinct, name
        assert found.max() < 0.05 * found.sum(), name
    scales = {name: one for name, one in loaded.items() if name.endswith(SCALES)}
    assert len(scales) == 4
    for name, tensor in scales.items():
        assert (tensor > 0).all() and tensor.isfinite().all(), name
    first, second = list(codes.values())[:2]
    assert not first.flatten()[:1000].equal(second.flatten()[:1000])
