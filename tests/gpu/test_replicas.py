"""Data-parallel replicas on GPUs of their own. Two are needed: NCCL takes no two ranks on one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.hardware.host import describe, device_class
from workers.moe.accounting import weight_bytes
from workers.moe.precision import precision
from workers.prompts import random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

MIXTRAL = Model(name="mixtral-8x7b", weights="dummy", scale=0.25, num_layers=2, top_k=2)
DENSE = Model(name="qwen3-0.6b", weights="dummy", num_layers=4)
WORKLOAD = Workload(batch_size=5, input_tokens=100, output_tokens=12)
ALONE = Workload(batch_size=1, input_tokens=100, output_tokens=12)
"""One replica has nothing to do and must still meet the other in every layer of experts."""


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (MIXTRAL, Layout(data=2)),
        (MIXTRAL, Layout(data=2, expert=True)),
        (DENSE, Layout(data=2)),
    ],
    ids=["experts cut", "experts spread", "dense"],
)
def test_a_batch_is_shared(model: Model, layout: Layout, eager: bool, tmp_path: Path) -> None:
    trial = Trial(model=model, workload=WORKLOAD, engine=EngineSettings(eager=eager), layout=layout)
    engine = VllmEngine(
        trial, [WORKLOAD, ALONE], Site(scratch=tmp_path, device=device_class(describe()))
    )
    try:
        a = engine.loaded.architecture
        prompts = random_ids(WORKLOAD, vocab_size=a.vocab_size, index=0)
        one = engine.generate(prompts, 12, kind="timed", repeat=0)
        assert [len(row) for row in one.token_s] == [12] * 5
        assert all(0 < early < late for row in one.token_s for early, late in pairwise(row))
        assert engine.memory().weights == weight_bytes(a, precision(a, model), layout)
        single = random_ids(ALONE, vocab_size=a.vocab_size, index=0)
        assert engine.generate(single, 12, kind="timed", repeat=1).output_tokens == 12
        if a.moe is not None:
            trace = engine.trace(prompts, 12)
            assert trace.decode.sum(axis=1).tolist() == [5 * 11 * 2] * len(trace.layers)
    finally:
        engine.close()
