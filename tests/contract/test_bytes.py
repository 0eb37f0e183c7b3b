"""Bytes as counted, against what the engine really allocates, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site, engine_class
from workers.hardware.roofline import CPU_BLOCK
from workers.moe.accounting import kv_cache_bytes, weight_bytes
from workers.moe.precision import precision
from workers.prompts import random_ids

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=3, input_tokens=150, output_tokens=4)


@pytest.mark.parametrize(
    "name",
    ["mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite"],
)
def test_weights_and_cache_are_what_the_engine_allocates(name: str, tmp_path: Path) -> None:
    model = Model(name=name, weights="dummy", scale=0.125, num_layers=2)
    trial = Trial(model=model, workload=WORKLOAD, engine=EngineSettings(eager=True))
    engine = engine_class("vllm")(trial, [WORKLOAD], Site(scratch=tmp_path, device="cpu"))
    try:
        a = engine.loaded.architecture
        stored = precision(a, model)
        used = engine.memory()
        assert a.exact
        assert used.weights == weight_bytes(a, stored)
        asked = kv_cache_bytes(
            a, stored, WORKLOAD.tokens_per_request, WORKLOAD.batch_size, block=CPU_BLOCK
        )
        spare = kv_cache_bytes(a, stored, CPU_BLOCK, WORKLOAD.batch_size + 1, block=CPU_BLOCK)
        assert used.kv_cache == asked + spare  # a whole number of blocks: nothing is lost
        prompts = random_ids(WORKLOAD, vocab_size=a.vocab_size, index=0)
        one = engine.generate(prompts, WORKLOAD.output_tokens, kind="timed", repeat=0)
        assert one.output_tokens == WORKLOAD.batch_size * WORKLOAD.output_tokens
    finally:
        engine.close()
