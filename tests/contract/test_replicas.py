"""Data-parallel replicas say what one engine says, and fail as one.

The same tiny checkpoint in float32 on one device and on replicas, whose tokens meet before every
layer of experts: greedy tokens are equal, and so is every choice of a router.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.contract import tiny
from workers.contract.engine import UNFUSED, EngineSettings
from workers.contract.errors import Crashed, OutOfMemory, TrialError
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.engines.vllm_replicas import Replicas
from workers.engines.vllm_stepper import Batch
from workers.moe.accounting import weight_bytes
from workers.moe.precision import precision

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=3, input_tokens=24, output_tokens=8)
PROMPTS = [[17 * i + j for j in range(length)] for i, length in ((1, 24), (2, 7), (3, 15))]
LENGTHS = [6, 9, 4]
FUSED = EngineSettings(eager=True)
ONE_BY_ONE = EngineSettings(eager=True, moe_backend=UNFUSED)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")


def _engine(name: str, layout: Layout, settings: EngineSettings, folder: Path) -> VllmEngine:
    model = Model(name=name, dtype="float32")
    trial = Trial(model=model, workload=WORKLOAD, engine=settings, layout=layout)
    return VllmEngine(trial, [WORKLOAD], Site(scratch=folder, device="cpu"))


def _said(engine: VllmEngine) -> list[list[int]]:
    return engine._send(Batch(prompts=PROMPTS, lengths=LENGTHS, temperature=0.0)).tokens


@pytest.fixture(scope="module")
def alone(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("alone")
    engine = _engine(str(mixtral), Layout(), FUSED, folder)
    yield engine
    engine.close()


@pytest.fixture(
    scope="module",
    params=[
        (Layout(data=2), FUSED),
        pytest.param((Layout(data=2, expert=True), ONE_BY_ONE), marks=pytest.mark.slow),
        pytest.param((Layout(data=2, tensor=2), FUSED), marks=pytest.mark.slow),
    ],
    ids=["cut", "spread", "of two ranks"],
)
def replicas(
    request: pytest.FixtureRequest, mixtral: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    layout, settings = request.param
    engine = _engine(str(mixtral), layout, settings, tmp_path_factory.mktemp("replicas"))
    yield engine
    engine.close()


def test_tokens_are_those_of_one_device(alone: VllmEngine, replicas: VllmEngine) -> None:
    assert _said(replicas) == _said(alone)
    # One that has nothing to do keeps step.
    few = Batch(prompts=PROMPTS[:1], lengths=[5], temperature=0.0)
    assert replicas._send(few).tokens == alone._send(few).tokens


def test_a_pass_is_stamped_as_that_of_one_device(replicas: VllmEngine) -> None:
    prompts = [[7 * i + j for j in range(24)] for i in range(3)]
    one = replicas.generate(prompts, 6, kind="timed", repeat=2)
    assert (one.batch_size, one.input_tokens, one.repeat) == (3, 24, 2)
    assert [len(row) for row in one.token_s] == [6] * 3
    assert all(0 < early < late for row in one.token_s for early, late in pairwise(row))
    assert list(one.step_s) == sorted(one.step_s)
    assert len(one.step_s) >= 6
    assert one.e2e_s == max(row[-1] for row in one.token_s) <= one.step_s[-1]
    # The first and the third went to the same replica.
    assert one.token_s[0] == one.token_s[2]


def test_every_choice_of_experts_is_counted_once(alone: VllmEngine, replicas: VllmEngine) -> None:
    one, several = (engine.trace(PROMPTS, LENGTHS, routes=True) for engine in (alone, replicas))
    assert several.tokens == one.tokens
    assert several.layers == one.layers
    assert one.routes is not None and several.routes is not None
    for ours, theirs in zip(several.routes, one.routes, strict=True):
        np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
    assert len(several.steps) == len(one.steps)
    for step, other in zip(several.steps, one.steps, strict=True):
        np.testing.assert_array_equal(step.prefill, other.prefill)
        np.testing.assert_array_equal(step.decode, other.decode)
        assert dict(zip(step.request.tolist(), step.new.tolist(), strict=True)) == dict(
            zip(other.request.tolist(), other.new.tolist(), strict=True)
        )
    # What was in place for it is gone.
    assert _said(replicas) == _said(alone)


def test_a_replica_holds_its_part(alone: VllmEngine, replicas: VllmEngine) -> None:
    a, trial = replicas.loaded.architecture, replicas._trial
    stored = precision(a, trial.model)
    for engine in (alone, replicas):
        assert engine.memory().weights == weight_bytes(a, stored, engine._trial.layout)
    assert replicas.loaded.args["data_parallel_size"] == 2
    assert replicas.loaded.architecture == alone.loaded.architecture


def _spawned() -> set[int]:
    """Replicas and ranks that live; multiprocessing's own tracker stays with this process."""
    return {
        one.pid
        for one in psutil.Process(os.getpid()).children(recursive=True)
        if "spawn_main" in " ".join(one.cmdline())
    }


def _processes(engine: VllmEngine) -> list[psutil.Process]:
    assert isinstance(engine._vllm, Replicas)
    return [psutil.Process(one.pid) for one in engine._vllm._processes]


@pytest.mark.slow
def test_one_that_is_killed_ends_all(mixtral: Path, tmp_path: Path) -> None:
    engine = _engine(str(mixtral), Layout(data=2), FUSED, tmp_path)
    first, second = _processes(engine)
    second.send_signal(signal.SIGKILL)
    with pytest.raises(Crashed, match=r"^replica 1 died: SIGKILL$"):
        _said(engine)
    engine.close()
    assert not first.is_running() and not second.is_running()


@pytest.mark.slow
def test_what_does_not_fit_is_told_by_the_first(tmp_path: Path) -> None:
    model = Model(name="mixtral-8x7b", weights="dummy", scale=0.25, num_layers=4)
    settings = EngineSettings(eager=True, memory_limit_gib=0.05)
    trial = Trial(model=model, workload=WORKLOAD, engine=settings, layout=Layout(data=2))
    before = _spawned()
    with pytest.raises(OutOfMemory) as told:
        VllmEngine(trial, [WORKLOAD], Site(scratch=tmp_path, device="cpu"))
    assert (told.value.stage, told.value.scope) == ("load", "device")
    assert _spawned() <= before


@pytest.mark.slow
def test_dense_models_have_replicas_that_do_not_meet(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        name: value for name, value in tiny.SHAPE.items() if "experts" not in name
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    said, weights = [], []
    for layout in (Layout(), Layout(data=2)):
        engine = _engine(str(tmp_path / "model"), layout, FUSED, tmp_path)
        try:
            said.append(_said(engine))
            weights.append(engine.memory().weights)
            with pytest.raises(TrialError, match="without experts"):
                engine.trace(PROMPTS, 2)
        finally:
            engine.close()
    assert said[0] == said[1]
    assert weights[0] == weights[1]
