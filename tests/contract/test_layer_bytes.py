"""What S-MBU says a decode pass reads of a layer, against what the engine's kernels do read.

MoE-CAP A.4 has less than 1 % between its S-MBU and a profile. Here the truth is twofold: the
bytes of the running model's own tensors for the experts that its routers chose, and the pages
that the processor marked as read while vLLM's kernels ran (`tests/bench/bench_bytes.py`).
Widths are such that every expert's share of a tensor is whole pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract import tiny
from workers.contract.model import Model
from workers.contract.workload import Workload

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

WIDE = {"hidden_size": 256, "intermediate_size": 512}
NARROW = {"num_experts": 16, "moe_intermediate_size": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 64},
    "qwen2_moe": NARROW | {"shared_expert_intermediate_size": 512},
    "qwen3_moe": NARROW | {"head_dim": 64},
}
BATCHES = (1, 4, 16)
OUTPUT = 4


def test_the_marks_of_pages_are_exact() -> None:
    """What the next test relies on: 40 times some slices of a tensor, and no page more or less."""
    import torch

    from tests.bench.touched import Touched, works

    if not works():  # of a kernel that marks nothing, nothing is claimed
        return
    rng = np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.randn(8, 256, 256), requires_grad=False)
    before = weight.detach().clone()
    watch = Touched({"weight": weight})
    assert torch.equal(weight, before)
    for _ in range(40):
        chosen = rng.choice(8, size=rng.integers(1, 9), replace=False)
        watch.clear()
        for one in chosen.tolist():
            torch.nn.functional.linear(torch.ones(2, 256), weight[one])
        assert watch.bytes() == {"weight": len(chosen) * weight[0].nbytes}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_layer_are_those_that_are_read(family: str, tmp_path: Path) -> None:
    from tests.bench.bench_bytes import Ear, built, points

    changes = WIDE | FAMILIES[family]
    tiny.checkpoint(tmp_path / "model", family, dtype="bfloat16", **changes)
    largest = Workload(batch_size=max(BATCHES), input_tokens=12, output_tokens=OUTPUT)
    rng = np.random.default_rng(1)
    with built(Model(name=str(tmp_path / "model")), largest) as engine:
        ear = Ear(engine, [0, 1])
        found = [
            point
            for batch in BATCHES
            for point in points(engine, ear, rng.integers(1, 256, (batch, 12)).tolist(), OUTPUT)
        ]
    assert len(found) == 2 * len(BATCHES)
    for one in found:
        assert one.passes == OUTPUT - 1
        assert one.accounted == one.counted, "every weight, from two sides"
        assert abs(one.eq4 / one.counted - 1) < 0.01
        if one.read is not None:  # a kernel without page marks cannot be asked
            assert abs(one.eq4 / one.read - 1) < 0.01
            assert abs(one.accounted / one.read - 1) < 0.01
    alone = [one for one in found if one.batch == 1]
    assert {one.experts for one in alone} == {2.0}
    for one in alone:  # two experts of 8 or 16, and attention: MBU says more than twice as much
        assert one.all_experts > 2 * one.truth
        assert one.uniform == pytest.approx(one.eq4)
    for layer in (0, 1):
        ran = [one.experts for one in found if one.layer == layer]
        assert ran == sorted(ran) and ran[-1] > 4
