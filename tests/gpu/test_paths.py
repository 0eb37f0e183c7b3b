"""Paths of the vLLM engine that only GPUs take, one short engine each; see `test_engine.py`.

Fork server, counted experts with and without graphs, drafts, quantised skeletons, forced routing,
and what the MoE kernels were tuned by. Not run so far: no GPU was at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.contract.engine import EngineSettings, Speculative
from workers.contract.model import Model
from workers.contract.trace import Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.hardware.host import describe, device_class
from workers.moe.accounting import kv_cache_bytes, weight_bytes
from workers.moe.architecture import resolve
from workers.moe.precision import precision
from workers.moe.skew import inclusion, parse, probabilities
from workers.prompts import random_ids

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(300)]

MODEL = Model(name="mixtral-8x7b", weights="dummy", scale=0.25, num_layers=2, top_k=2)
WORKLOAD = Workload(batch_size=8, input_tokens=128, output_tokens=17)
TRITON = ("TritonExperts", "BatchedTritonExperts")


@contextmanager
def _engine(folder: Path, model: Model = MODEL, **settings: object) -> Iterator[VllmEngine]:
    values = {"eager": True} | settings
    trial = Trial(model=model, workload=WORKLOAD, engine=EngineSettings(**values))  # type: ignore[arg-type]
    engine = VllmEngine(trial, [WORKLOAD], Site(scratch=folder, device=device_class(describe())))
    try:
        yield engine
    finally:
        engine.close()


def _prompts(engine: VllmEngine) -> list[list[int]]:
    return random_ids(WORKLOAD, vocab_size=engine.loaded.architecture.vocab_size, index=0)


def test_imports_touch_no_device_and_a_fork_of_them_may() -> None:
    """What a fork server has imported opened no device, else no fork of it could use CUDA."""
    code = (
        "import os, sys, workers.engines.preload_vllm, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "files = [os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')]\n"
        "assert not [one for one in files if one.startswith('/dev/nvidia')], files\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert torch.ones(4, device='cuda').sum().item() == 4\n"
        "    os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_counted_experts_are_the_same_with_graphs_and_without(tmp_path: Path) -> None:
    traces: list[Trace] = []
    for eager in (True, False):
        with _engine(tmp_path, eager=eager) as engine:
            plain = engine.generate(_prompts(engine), 17, kind="timed", repeat=0)
            traces.append(engine.trace(_prompts(engine), 17))
            again = engine.generate(_prompts(engine), 17, kind="timed", repeat=1)
            print("eager" if eager else "graphs", plain.e2e_s, again.e2e_s)
    for phase in ("prefill", "decode"):
        one, other = (getattr(trace, phase) for trace in traces)
        assert one.sum() == other.sum()
        # Experts that are level within rounding may differ, and what follows from them.
        assert np.abs(one - other).sum() <= 0.1 * one.sum()


def test_another_model_drafts(tmp_path: Path) -> None:
    target = Model(name="qwen3-1.7b", weights="dummy", num_layers=4)
    draft = Speculative(model="qwen3-0.6b", tokens=3)
    for eager in (True, False):
        with _engine(tmp_path, target, speculative=draft, eager=eager) as engine:
            done = engine.generate(_prompts(engine), 17, kind="timed", repeat=0)
            assert [len(row) for row in done.token_s] == [17] * 8
            assert done.drafted is not None and done.drafted.proposed > 0
            used = engine.memory()
        with _engine(tmp_path, target, eager=eager) as engine:
            alone = engine.memory()
        assert used.weights is not None and alone.weights is not None
        assert used.weights > 1.2 * alone.weights, "the draft's weights count"


@pytest.mark.parametrize("quantization", ["gptq", "awq", "compressed-tensors", "fp8"])
def test_quantised_skeletons_run_and_route_to_more_than_one_pair(
    quantization: str, tmp_path: Path
) -> None:
    """Codes that were zero, or scales that were not numbers, would send every token one way."""
    with _engine(tmp_path, replace(MODEL, quantization=quantization)) as engine:
        prompts = _prompts(engine)
        assert engine.generate(prompts, 4, kind="timed", repeat=0).output_tokens == 32
        print(quantization, engine.loaded.moe_kernel, engine.loaded.moe_config)
        trace = engine.trace(prompts, 4)
    assert ((trace.prefill > 0).sum(axis=1) > 4).all()


@pytest.mark.parametrize("eager", [True, False])
def test_forced_routing_holds_with_graphs(eager: bool, tmp_path: Path) -> None:
    with _engine(tmp_path, routing="zipf:1.2", eager=eager) as engine:
        trace = engine.trace(_prompts(engine), 17)
    chances = inclusion(probabilities(parse("zipf:1.2"), 8), 2).chances
    count = 8 * (128 + 16)
    shares = (trace.prefill + trace.decode) / count
    assert (np.abs(shares - chances) <= 5 * np.sqrt(chances * (1 - chances) / count)).all()


def test_a_record_can_say_what_its_kernel_was_tuned_by(tmp_path: Path) -> None:
    with _engine(tmp_path) as engine:
        kernel, config = engine.loaded.moe_kernel, engine.loaded.moe_config
    print(kernel, config)
    assert (config is not None) == (kernel in TRITON)
    folder = os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
    assert folder or config is None or "@" not in config


def test_a_batch_beyond_the_kv_cache_is_out_of_memory_and_a_small_one_runs(tmp_path: Path) -> None:
    """64 prompts of 32,000 tokens need some 4 GiB of cache; the limit leaves less than 2."""
    structure = resolve(MODEL)
    assert structure is not None
    limit_gib = weight_bytes(structure, precision(structure, MODEL)) / 2**30 + 2
    large = Workload(batch_size=64, input_tokens=32_000, output_tokens=17)
    assert (
        kv_cache_bytes(
            structure, precision(structure, MODEL), large.tokens_per_request, 64, block=16
        )
        > 3 * 2**30
    )
    settings = EngineSettings(eager=True, memory_limit_gib=limit_gib)
    trial = Trial(model=MODEL, workload=large, engine=settings)
    site = Site(scratch=tmp_path, device=device_class(describe()))
    engine = VllmEngine(trial, [large, WORKLOAD], site)
    try:
        assert set(engine.loaded.too_large) == {large}
        assert engine.loaded.too_large[large].stage == "kv_cache"
        done = engine.generate(_prompts(engine), 17, kind="timed", repeat=0)
        assert done.output_tokens == 8 * 17
        print("limit", limit_gib, "used", engine.memory())
    finally:
        engine.close()


def test_a_limit_close_to_the_size_of_the_card_is_no_reason_to_fail(tmp_path: Path) -> None:
    """CUDA's total is less than NVML's, and a context is on the card before vLLM looks."""
    total_gib = describe().memory_gib
    with _engine(tmp_path, memory_limit_gib=total_gib - 0.25) as engine:
        assert engine.generate(_prompts(engine), 4, kind="timed", repeat=0).output_tokens == 32
        print("of", total_gib, "GiB used", engine.memory())


def test_stamps_are_those_of_the_passes_that_the_probe_counts(tmp_path: Path) -> None:
    """Asynchronous scheduling takes one more call than there are passes."""
    with _engine(tmp_path) as engine:
        done = engine.generate(_prompts(engine), 17, kind="timed", repeat=0)
        trace = engine.trace(_prompts(engine), 17)
    assert len(done.step_s) == len(trace.steps)
