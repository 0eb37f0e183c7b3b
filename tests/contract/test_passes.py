"""A forward pass is stamped where it ends, and replicas run as many of them as one another.

With batches in flight a call of vLLM's `step()` is not a pass: asynchronous scheduling, which is
what runs on CUDA, and pipeline stages both have calls in which none ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.contract import tiny
from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trace import Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.engines.vllm_replicas import Replicas
from workers.engines.vllm_stepper import Batch, Stepper
from workers.usage import tokens_per_pass

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=3, input_tokens=24, output_tokens=8)
BUDGET = 32
"""Most tokens of a pass: a batch's prompts take three."""
AHEAD = {"worker_cls": "tests.contract.asynchronous.AsynchronousCPUWorker"}
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}}
"""Without a traced model vLLM's CPU build has no stages."""
ALIKE = [[7 * i + j for j in range(24)] for i in range(3)]
ONE = Batch(prompts=[[5, 6, 7]], lengths=[5], temperature=0.0)
UNEVEN = Batch(
    prompts=[[3 * i + 1 for i in range(70)], [9] * 5, [4] * 11], lengths=[3, 6, 1], temperature=0.0
)
"""Of two replicas one has prompts for three passes, the other for one."""


def _engine(
    folder: Path, checkpoint: Path, layout: Layout, args: Mapping[str, object]
) -> VllmEngine:
    trial = Trial(
        model=Model(name=str(checkpoint), dtype="float32"),
        workload=WORKLOAD,
        layout=layout,
        engine=EngineSettings(
            eager=args is not TRACED, args={"max_num_batched_tokens": BUDGET, **args}
        ),
    )
    longest = Workload(batch_size=3, input_tokens=70, output_tokens=8)
    return VllmEngine(trial, [WORKLOAD, longest], Site(scratch=folder, device="cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")


@dataclass(frozen=True, slots=True)
class Alone:
    """What an engine of one device does, one pass after the other."""

    said: dict[str, list[list[int]]]
    """Tokens of `ONE` and `UNEVEN`."""
    counted: Trace
    """Of `ONE`."""


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    engine = _engine(tmp_path_factory.mktemp("alone"), checkpoint, Layout(), {})
    try:
        _check_stamps(engine)
        said = {"one": engine._send(ONE).tokens, "uneven": engine._send(UNEVEN).tokens}
        return Alone(said, engine.trace(ONE.prompts, 5))
    finally:
        engine.close()


def _check_stamps(engine: VllmEngine) -> None:
    """As many as a batch has passes, in each of several batches."""
    for output_tokens in (1, 5):
        trace = engine.trace(ALIKE, output_tokens)
        for _ in range(2):  # what a batch leaves in the queue ends in the next one's first call
            one = engine.generate(ALIKE, output_tokens, kind="timed", repeat=0)
            assert len(one.step_s) == len(trace.steps)
            assert one.step_s[-1] == one.e2e_s
            assert one.preempted == 0
            if output_tokens == 1:
                assert tokens_per_pass([one], "prefill") == 24  # 72 in three passes


def test_what_is_scheduled_ahead_has_as_many_stamps_as_passes(
    alone: Alone, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.contract.asynchronous import schedule_ahead

    schedule_ahead(monkeypatch)
    engine = _engine(tmp_path, checkpoint, Layout(), {})
    try:
        assert isinstance(engine._vllm, Stepper)
        assert engine._vllm.engine.engine_core.engine_core.async_scheduling
        _check_stamps(engine)
        assert engine._send(UNEVEN).tokens == alone.said["uneven"]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("layout", "args"),
    [
        (Layout(data=2), AHEAD),
        pytest.param(Layout(data=2, pipeline=2), TRACED, marks=pytest.mark.slow),
    ],
    ids=["ahead", "of two stages"],
)
def test_replicas_with_unlike_numbers_of_passes_end(
    layout: Layout, args: Mapping[str, object], alone: Alone, checkpoint: Path, tmp_path: Path
) -> None:
    replicas = _engine(tmp_path, checkpoint, layout, args)
    try:
        assert isinstance(replicas._vllm, Replicas)
        assert replicas._send(ONE).tokens == alone.said["one"]
        assert replicas._send(UNEVEN).tokens == alone.said["uneven"]
        trace = replicas.trace(ONE.prompts, 5)
        assert len(replicas._send(ONE).steps) == len(trace.steps) == len(alone.counted.steps)
        assert trace.decode.tolist() == alone.counted.decode.tolist()
    finally:
        replicas.close()


def test_a_cache_that_is_too_small_is_told_and_what_is_put_back_is_counted(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Room for five blocks: each request begins in one and ends in two."""
    workload = Workload(batch_size=4, input_tokens=24, output_tokens=24)
    block = 2 * 2 * 2 * 32 * 32 * 4  # layers, keys and values, heads, width, tokens, bytes
    settings = EngineSettings(
        eager=True, args={"block_size": 32, "kv_cache_memory_bytes": 6 * block}
    )
    trial = Trial(
        model=Model(name=str(checkpoint), dtype="float32"), workload=workload, engine=settings
    )
    engine = VllmEngine(trial, [workload], Site(scratch=tmp_path, device="cpu"))
    try:
        prompts = [[7 * i + j for j in range(24)] for i in range(4)]
        one = engine.generate(prompts, 24, kind="timed", repeat=0)
        assert one.preempted and [len(row) for row in one.token_s] == [24] * 4
        assert engine.generate(prompts[:2], 24, kind="timed", repeat=1).preempted == 0

        assert isinstance(engine._vllm, Stepper)
        told = engine._vllm.engine.vllm_config.cache_config
        assert (told.num_gpu_blocks, told.kv_cache_max_concurrency) == (6, 3.0)
        assert [engine._vllm.holds(tokens) for tokens in (24, 33, 34, 48)] == [5, 5, 2, 2]
        # The sweep asked for such a cache. Where it did not, the batch is out of memory.
        assert not engine.loaded.too_large
        unasked = replace(trial, engine=EngineSettings(eager=True))
        halves = replace(workload, batch_size=2)
        found = engine._crowded(unasked, [workload, halves])
        assert found["too_large"].keys() == {workload} and not found["too_tight"]
        assert found["too_large"][workload].stage == "kv_cache"
    finally:
        engine.close()
