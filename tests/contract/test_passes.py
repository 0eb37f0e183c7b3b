"""A forward pass is stamped where it ends, and replicas run as many of them as one another.

With batches in flight a call of vLLM's `step()` is not a pass: asynchronous scheduling, which is
what runs on CUDA, and pipeline stages both have calls in which none ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import tiny
from tests.contract.asynchronous import ARGS
from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.engines.vllm_replicas import Replicas
from workers.engines.vllm_stepper import Batch
from workers.usage import tokens_per_pass

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=3, input_tokens=24, output_tokens=8)
BUDGET = 32
"""Most tokens of a pass: a batch's prompts take three."""
ALIKE = [[7 * i + j for j in range(24)] for i in range(3)]
ONE = Batch(prompts=[[5, 6, 7]], lengths=[5], temperature=0.0)
UNEVEN = Batch(
    prompts=[[3 * i + 1 for i in range(70)], [9] * 5, [4] * 11], lengths=[3, 6, 1], temperature=0.0
)
"""Of two replicas one has prompts for three passes, the other for one."""


def _engine(folder: Path, checkpoint: Path, layout: Layout, **args: object) -> VllmEngine:
    trial = Trial(
        model=Model(name=str(checkpoint), dtype="float32"),
        workload=WORKLOAD,
        layout=layout,
        engine=EngineSettings(eager=True, args={"max_num_batched_tokens": BUDGET, **args}),
    )
    longest = Workload(batch_size=3, input_tokens=70, output_tokens=8)
    return VllmEngine(trial, [WORKLOAD, longest], Site(scratch=folder, device="cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module", params=[{}, ARGS], ids=["one after the other", "ahead"])
def engine(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    built = _engine(tmp_path_factory.mktemp("engine"), checkpoint, Layout(), **request.param)
    ahead = built._vllm.engine.engine_core.engine_core.async_scheduling  # type: ignore[union-attr]
    assert ahead == bool(request.param)
    yield built
    built.close()


def test_as_many_stamps_as_passes(engine: VllmEngine) -> None:
    for output_tokens in (1, 5):
        trace = engine.trace(ALIKE, output_tokens)
        for _ in range(2):  # what a batch leaves in the queue ends in the next one's first call
            one = engine.generate(ALIKE, output_tokens, kind="timed", repeat=0)
            assert len(one.step_s) == len(trace.steps)
            assert one.step_s[-1] == one.e2e_s
            assert one.preempted == 0
            if output_tokens == 1:
                assert tokens_per_pass([one], "prefill") == 24  # 72 in three passes


@pytest.mark.parametrize(
    ("layout", "args"),
    [
        (Layout(data=2), ARGS),
        pytest.param(Layout(data=2, pipeline=2), {}, marks=pytest.mark.slow),
    ],
    ids=["ahead", "of two stages"],
)
def test_replicas_with_unlike_numbers_of_passes_end(
    layout: Layout,
    args: dict[str, str],
    engine: VllmEngine,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    replicas = _engine(tmp_path, checkpoint, layout, **args)
    try:
        assert isinstance(replicas._vllm, Replicas)
        for batch in (ONE, UNEVEN, ONE):
            assert replicas._send(batch).tokens == engine._send(batch).tokens
        alone = engine.trace(ONE.prompts, 5)
        trace = replicas.trace(ONE.prompts, 5)
        assert len(trace.steps) == len(alone.steps) == len(replicas._send(ONE).steps)
        assert trace.decode.tolist() == alone.decode.tolist()
    finally:
        replicas.close()
