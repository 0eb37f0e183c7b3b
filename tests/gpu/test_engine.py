"""The vLLM engine on a real GPU: the contract of `tests/contract`, and what CUDA alone has.

Graphs, compiled code, memory that the driver counts, and the texts of its allocator's
failures have no counterpart on a CPU. Models are skeletons with a head of the published
size, because attention kernels know only those.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from workers.contract.engine import UNFUSED, EngineSettings
from workers.contract.errors import OutOfMemory, Unsupported
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.hardware.host import describe, device_class, gpu_memory_used
from workers.moe.accounting import kv_cache_bytes, weight_bytes
from workers.moe.architecture import resolve
from workers.moe.precision import precision
from workers.prompts import random_ids

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(300)]

MODEL = Model(name="mixtral-8x7b", weights="dummy", scale=0.25, num_layers=2, top_k=2)
LARGE = Workload(batch_size=8, input_tokens=100, output_tokens=12)
SMALL = Workload(batch_size=3, input_tokens=20, output_tokens=6)


def _trial(*, eager: bool, model: Model = MODEL, **engine: object) -> Trial:
    settings = EngineSettings(eager=eager, **engine)  # type: ignore[arg-type]
    return Trial(model=model, workload=LARGE, engine=settings)


def _build(trial: Trial, folder: Path, *workloads: Workload) -> VllmEngine:
    site = Site(scratch=folder, device=device_class(describe()))
    return VllmEngine(trial, workloads or (LARGE, SMALL), site)


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    built = _build(_trial(eager=request.param), tmp_path_factory.mktemp("scratch"))
    yield built
    built.close()


def test_it_runs_the_structure_that_was_asked_for(engine: VllmEngine) -> None:
    asked = resolve(MODEL)
    assert asked is not None
    runs = engine.loaded.architecture
    for name in ("hidden_size", "ffn_dim", "num_experts", "top_k", "num_layers", "params_total"):
        assert getattr(runs, name) == getattr(asked, name), name
    assert engine.loaded.version == describe().engine_version
    assert engine.loaded.threads is None


@pytest.mark.parametrize("workload", [LARGE, SMALL], ids=["large", "small"])
def test_lengths_are_exact_and_stamps_are_in_order(engine: VllmEngine, workload: Workload) -> None:
    prompts = random_ids(workload, vocab_size=engine.loaded.architecture.vocab_size, index=0)
    one = engine.generate(prompts, workload.output_tokens, kind="timed", repeat=4)
    assert [len(row) for row in one.token_s] == [workload.output_tokens] * workload.batch_size
    assert all(0 < early < late for row in one.token_s for early, late in pairwise(row))
    assert one.e2e_s == max(row[-1] for row in one.token_s)
    assert len(one.step_s) >= workload.output_tokens


def test_memory_is_that_of_the_structure(engine: VllmEngine) -> None:
    used, a = engine.memory(), engine.loaded.architecture
    stored = precision(a, MODEL)
    assert used.weights == weight_bytes(a, stored)
    needs = kv_cache_bytes(a, stored, LARGE.tokens_per_request, LARGE.batch_size, block=16)
    assert used.kv_cache is not None and used.kv_cache >= needs
    assert used.peak is not None and used.limit is not None
    assert used.weights + used.kv_cache <= used.peak <= used.limit


def test_only_what_the_workloads_need_is_captured(engine: VllmEngine) -> None:
    config = engine._vllm.engine.vllm_config
    eager = config.model_config.enforce_eager
    sizes = config.compilation_config.cudagraph_capture_sizes
    assert sizes == ([] if eager else [3, 8])
    assert config.scheduler_config.max_num_batched_tokens == 1024


def test_an_engine_with_graphs_keeps_its_top_k(engine: VllmEngine) -> None:
    eager = engine._vllm.engine.vllm_config.model_config.enforce_eager
    other = replace(engine._trial, model=replace(MODEL, top_k=1))
    assert engine.become(other) is eager
    prompts = random_ids(SMALL, vocab_size=1000, index=0)
    assert engine.generate(prompts, 3, kind="timed", repeat=0).output_tokens == 9
    if eager:
        assert engine.loaded.architecture.top_k == 1
        assert engine.become(replace(engine._trial, model=MODEL))


@pytest.mark.parametrize("eager", [True, False])
def test_experts_run_one_by_one_where_that_is_asked_for(eager: bool, tmp_path: Path) -> None:
    engine = _build(_trial(eager=eager, moe_backend=UNFUSED), tmp_path)
    try:
        assert engine.loaded.moe_kernel == "UnfusedExperts"
        assert engine._vllm.engine.vllm_config.compilation_config.cudagraph_mode.name == "NONE"
        prompts = random_ids(SMALL, vocab_size=1000, index=0)
        assert engine.generate(prompts, 4, kind="timed", repeat=0).output_tokens == 12
        assert engine.become(replace(engine._trial, model=replace(MODEL, top_k=1))) is eager
    finally:
        engine.close()


@pytest.mark.parametrize(
    "name",
    ["mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite"],
)
def test_weights_are_what_the_engine_allocates(name: str, tmp_path: Path) -> None:
    model = Model(name=name, weights="dummy", num_layers=2)
    engine = _build(_trial(eager=True, model=model, memory_limit_gib=24.0), tmp_path)
    try:
        a = engine.loaded.architecture
        assert engine.memory().weights == weight_bytes(a, precision(a, model))
        prompts = random_ids(SMALL, vocab_size=a.vocab_size, index=0)
        assert engine.generate(prompts, 4, kind="timed", repeat=0).output_tokens == 12
    finally:
        engine.close()


def test_a_model_that_does_not_fit_runs_out_of_device_memory(tmp_path: Path) -> None:
    model = Model(name="mixtral-8x7b", weights="dummy", num_experts=64)
    with pytest.raises(OutOfMemory) as caught:
        _build(_trial(eager=True, model=model), tmp_path)
    assert (caught.value.stage, caught.value.scope) == ("load", "device")
    assert caught.value.requested_bytes is not None
    # Gate and up of one layer; the message is rounded to hundredths of GiB.
    assert caught.value.requested_bytes == pytest.approx(64 * 2 * 4096 * 14336 * 2, rel=1e-3)
    import torch

    assert torch.cuda.memory_reserved() < 2**28


@pytest.mark.parametrize("limit_gib", [1.2, 2.5])
def test_a_limit_too_small_for_the_cache_is_out_of_memory(limit_gib: float, tmp_path: Path) -> None:
    long = Workload(batch_size=4, input_tokens=30_000, output_tokens=8)
    model = Model(name="mixtral-8x7b", weights="dummy", num_layers=1, num_experts=2, ffn_dim=14336)
    with pytest.raises(OutOfMemory) as caught:
        _build(_trial(eager=True, model=model, memory_limit_gib=limit_gib), tmp_path, long)
    assert (caught.value.stage, caught.value.scope) == ("kv_cache", "device")


def test_arguments_that_the_engine_does_not_know_are_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no_such_argument"):
        _build(_trial(eager=True, args={"no_such_argument": 1}), tmp_path)


def test_nothing_stays_on_the_gpu_when_the_process_is_gone() -> None:
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = "import torch, time; x = torch.ones(2**31, dtype=torch.uint8, device='cuda'); "
    command += "print('held', flush=True); time.sleep(60)"
    before = gpu_memory_used(device)
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert gpu_memory_used(device) - before > 2**31
        holder.kill()
    deadline = time.monotonic() + 10
    while gpu_memory_used(device) > before + 2**20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gpu_memory_used(device) <= before + 2**20
