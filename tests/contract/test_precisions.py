"""Precisions on the real CPU engine: what runs, in the bytes foreseen, and what is refused.

Quantised experts run on CPUs with AMX tiles alone; elsewhere vLLM refuses them, and so must the
outcome. What is run is a skeleton that is stored as the published checkpoints are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workers.contract.engine import EngineSettings
from workers.contract.errors import Unsupported
from workers.contract.measurement import Memory
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.moe.accounting import stage_of
from workers.moe.architecture import resolve
from workers.moe.precision import precision
from workers.prompts import random_ids

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=2, input_tokens=16, output_tokens=4)
AMX = bool(torch.cpu._is_amx_tile_supported())


def _trial(quantization: str | None = None, cache: str | None = None) -> Trial:
    return Trial(
        model=Model(
            name="mixtral-8x7b",
            weights="dummy",
            scale=0.125,
            num_layers=2,
            num_experts=4,
            quantization=quantization,
        ),
        workload=WORKLOAD,
        engine=EngineSettings(eager=True, args={"kv_cache_dtype": cache} if cache else {}),
    )


def _run(trial: Trial, scratch: Path) -> Memory:
    engine = VllmEngine(trial, [WORKLOAD], Site(scratch=scratch, device="cpu"))
    try:
        prompts = random_ids(WORKLOAD, vocab_size=4000, index=0)
        assert engine.generate(prompts, 4, kind="timed", repeat=0).output_tokens == 8
        return engine.memory()
    finally:
        engine.close()


def _foreseen(trial: Trial) -> int:
    a = resolve(trial.model)
    assert a is not None
    return stage_of(a, precision(a, trial.model)).weight_bytes


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [
        ("awq", 0.0),
        ("compressed-tensors", 2e-6),  # a pointer here and there
        # Measured before biases of experts took the place of an order of inputs.
        pytest.param("gptq", 3e-3, marks=pytest.mark.slow),
    ],
)
def test_quantised_experts_take_the_bytes_foreseen(
    quantization: str, tolerance: float, tmp_path: Path
) -> None:
    trial = _trial(quantization)
    if not AMX:
        with pytest.raises(Unsupported):
            _run(trial, tmp_path)
        return
    used = _run(trial, tmp_path)
    assert used.weights is not None
    assert used.weights == pytest.approx(_foreseen(trial), rel=tolerance)
    assert used.weights < 0.6 * _foreseen(_trial())


def test_a_cache_in_fp8_takes_half(tmp_path: Path) -> None:
    """Or is refused in the engine's words, where the processor has no instructions for it."""
    if not (AMX or torch.cpu._is_avx512_supported()):
        with pytest.raises(Unsupported, match="FP8 KV cache on CPU requires"):
            _run(_trial(cache="fp8"), tmp_path)
        return
    plain, small = _run(_trial(), tmp_path), _run(_trial(cache="fp8"), tmp_path)
    assert plain.kv_cache is not None and small.kv_cache is not None
    assert 2 * small.kv_cache == plain.kv_cache
    assert small.weights == plain.weights == _foreseen(_trial())


@pytest.mark.parametrize(
    ("quantization", "cache", "words"),
    [
        ("fp8", None, "static_scaled_fp8_quant"),
        ("nosuch", None, "nosuch"),
        (None, "int8", "cache_dtype"),
    ],
)
def test_refusals_are_in_the_engine_s_words(
    quantization: str | None, cache: str | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=words):
        _run(_trial(quantization, cache), tmp_path)
