"""Experts one after the other say what the fused kernels say.

The same tiny checkpoint, with random weights of ordinary size, on two engines in float32: one
as vLLM builds it, one with `moe_backend: unfused`. Greedy tokens are equal and the logits'
logarithms differ by no more than the order of additions makes them differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract import tiny
from workers.contract.engine import UNFUSED, EngineSettings
from workers.contract.errors import Unsupported
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
}
FAMILIES = (*tiny.FAMILIES, *OTHERS)
IN_PLACE = ("mixtral", "qwen3_moe", "olmoe")
"""Families that change their top-k where they stand (`tests/contract/test_top_k.py`)."""
ARGUMENTS = {"deepseek_v2": {"attention_backend": "CPU_MLA"}}
"""The latent attention that vLLM's CPU build prefers (AMX) has no float32."""
WORKLOAD = Workload(batch_size=3, input_tokens=24, output_tokens=8)
FUSED = EngineSettings(eager=True)
ONE_BY_ONE = EngineSettings(eager=True, moe_backend=UNFUSED)
PROMPTS = [[17 * i + j for j in range(length)] for i, length in ((1, 24), (2, 7), (3, 15))]

Said = list[tuple[Sequence[int], list[dict[int, float]]]]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")


def _trial(folder: Path, settings: EngineSettings, **changes: Any) -> Trial:
    model = Model(name=str(folder), dtype="float32")
    given: dict[str, Any] = {"model": model, "workload": WORKLOAD, "engine": settings}
    return Trial(**given | changes)


def _engine(trial: Trial, folder: Path) -> VllmEngine:
    return VllmEngine(trial, [WORKLOAD], Site(scratch=folder, device="cpu"))


def _said(engine: VllmEngine) -> Said:
    """Greedy tokens of every prompt and the logits' logarithms behind each of them."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=20
    )
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    told: Said = []
    for answer in engine._vllm.llm.generate(prompts, asked, use_tqdm=False):
        (one,) = answer.outputs
        rows = [{token: known.logprob for token, known in row.items()} for row in one.logprobs]
        told.append((tuple(one.token_ids), rows))
    return told


def _of(trial: Trial, folder: Path) -> tuple[Said, str | None]:
    engine = _engine(trial, folder)
    try:
        return _said(engine), engine.loaded.moe_kernel
    finally:
        engine.close()


def _apart(one: Said, other: Said) -> float:
    """Largest difference of a logarithm that both tell; tokens are asserted to be equal."""
    most = 0.0
    for (tokens, rows), (others, theirs) in zip(one, other, strict=True):
        assert tokens == others
        for row, their in zip(rows, theirs, strict=True):
            shared = row.keys() & their.keys()
            assert len(shared) >= 19
            most = max(most, *(abs(row[token] - their[token]) for token in shared))
    return most


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "mixtral"),
    ],
)
def test_one_by_one_is_what_the_fused_kernel_says(family: str, tmp_path: Path) -> None:
    """The probe hears the same choices around either, and both become another top-k."""
    folder = tiny.checkpoint(tmp_path / "model", family, **OTHERS.get(family, {}))
    said, became, traces, kernels = [], [], [], []
    for settings in (FUSED, ONE_BY_ONE):
        trial = _trial(folder, replace(settings, args=ARGUMENTS.get(family, {})))
        engine = _engine(trial, tmp_path)
        try:
            said.append(_said(engine))
            traces.append(engine.trace(PROMPTS, 6, routes=True))
            kernels.append(engine.loaded.moe_kernel)
            if engine.become(replace(trial, model=replace(trial.model, top_k=3))):
                became.append(_said(engine))
        finally:
            engine.close()
    fused, ours = kernels
    assert fused is not None and fused.endswith("CPUUnquantizedExperts")
    assert ours == "UnfusedExperts"
    assert _apart(*said) < 1e-4
    assert traces[0].tokens == traces[1].tokens
    assert traces[0].layers == traces[1].layers
    assert traces[0].routes is not None and traces[1].routes is not None
    for one, other in zip(traces[0].routes, traces[1].routes, strict=True):
        assert (np.sort(one, axis=-1) == np.sort(other, axis=-1)).all()
    assert len(became) == 2 or family not in IN_PLACE
    if became:
        assert _apart(*became) < 1e-4
        assert became[1] != said[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=2, expert=True)])
def test_ranks_have_their_share(mixtral: Path, layout: Layout, tmp_path: Path) -> None:
    alone, _ = _of(_trial(mixtral, FUSED), tmp_path)
    spread, kernel = _of(_trial(mixtral, ONE_BY_ONE, layout=layout), tmp_path)
    assert kernel == "UnfusedExperts"
    assert _apart(alone, spread) < 1e-4


@pytest.mark.slow
def test_compiled_code_meets_it_as_one_operator(mixtral: Path, tmp_path: Path) -> None:
    eager, _ = _of(_trial(mixtral, FUSED), tmp_path)
    compiled, kernel = _of(_trial(mixtral, EngineSettings(moe_backend=UNFUSED)), tmp_path)
    assert kernel == "UnfusedExperts"
    assert _apart(eager, compiled) < 1e-4


def test_what_it_does_not_cover_is_refused(tmp_path: Path) -> None:
    quantised = Model(name="mixtral-8x7b", weights="dummy", quantization="fp8")
    trial = Trial(model=quantised, workload=WORKLOAD, engine=ONE_BY_ONE)
    assert "model.quantization is fp8" in (VllmEngine.refuses(trial) or "")
    dense = Model(name="qwen3-0.6b", weights="dummy", scale=0.125, num_layers=2)
    with pytest.raises(Unsupported, match="a model without experts"):
        _engine(Trial(model=dense, workload=WORKLOAD, engine=ONE_BY_ONE), tmp_path)


@pytest.mark.parametrize("backend", ["triton", "marlin"])
def test_kernels_that_a_build_does_not_have_are_unsupported(
    mixtral: Path, backend: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match="not support"):
        _engine(_trial(mixtral, EngineSettings(eager=True, moe_backend=backend)), tmp_path)
