"""Arguments that a CUDA engine gets from its group's own workloads; no engine is built."""

from __future__ import annotations

from typing import Any

import pytest

from workers.contract.engine import UNFUSED, EngineSettings, Speculative
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.vllm_engine import LEAST_TOKEN_BUDGET, cuda_economy

SHAPES = [(1, 512, 128), (12, 256, 64), (16, 128, 128), (16, 64, 16)]


def _workloads(shapes: list[tuple[int, int, int]]) -> list[Workload]:
    return [Workload(batch_size=b, input_tokens=i, output_tokens=o) for b, i, o in shapes]


def _arguments(
    shapes: list[tuple[int, int, int]], weights: str = "dummy", **engine: Any
) -> dict[str, Any]:
    model = Model(name="mixtral-8x7b", weights=weights)  # type: ignore[arg-type]
    return cuda_economy(
        Trial(model=model, engine=EngineSettings(**engine)), list(_workloads(shapes))
    )


def test_graphs_are_captured_for_the_batches_that_occur() -> None:
    assert _arguments(SHAPES)["cudagraph_capture_sizes"] == [1, 12, 16]


def test_a_draft_widens_every_decode_pass() -> None:
    draft = Speculative(model="ngram", tokens=3)
    assert _arguments(SHAPES, speculative=draft)["cudagraph_capture_sizes"] == [4, 48, 64]


def test_a_model_that_drafts_has_passes_of_its_own() -> None:
    sizes = [1, 4, 5, 12, 16, 48, 60, 64, 80]
    draft = Speculative(model="qwen3-0.6b", tokens=3)
    assert _arguments(SHAPES, speculative=draft)["cudagraph_capture_sizes"] == sizes
    head = Speculative(model="a-lab/head", method="eagle3", tokens=3)
    assert _arguments(SHAPES, speculative=head)["cudagraph_capture_sizes"] == [1, 4, 12, 16, 48, 64]


@pytest.mark.parametrize(
    "given",
    [
        {"cudagraph_capture_sizes": [8]},
        {"max_cudagraph_capture_size": 8},
        {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    ],
)
def test_what_the_sweep_says_of_graphs_stands_alone(given: dict[str, Any]) -> None:
    assert "cudagraph_capture_sizes" not in _arguments(SHAPES, args=given)


def test_an_eager_engine_captures_nothing() -> None:
    assert "cudagraph_capture_sizes" not in _arguments(SHAPES, eager=True)


def test_no_graph_is_captured_around_experts_that_run_one_by_one() -> None:
    args = _arguments(SHAPES, moe_backend=UNFUSED)
    assert args["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert "cudagraph_capture_sizes" not in args
    assert "compilation_config" not in _arguments(SHAPES, moe_backend=UNFUSED, eager=True)
    assert "compilation_config" not in _arguments(SHAPES, moe_backend="triton")


@pytest.mark.parametrize(
    ("shapes", "budget"),
    [
        (SHAPES, 4096),  # 12 × 256 prompt tokens in one pass
        ([(1, 512, 1600)], 4096),  # a request of 2,112 tokens, were chunks not allowed
        ([(64, 128, 8)], 8192),
        ([(64, 129, 8)], None),  # more than one pass by default: left to vLLM
        ([(4, 1, 1)], 4),
    ],
)
def test_the_token_budget_holds_the_largest_prompt_batch(
    shapes: list[tuple[int, int, int]], budget: int | None
) -> None:
    found = _arguments(shapes).get("max_num_batched_tokens")
    assert found == budget
    for one in _workloads(shapes):
        prompts = one.batch_size * one.input_tokens
        assert prompts <= (found or prompts) <= max(LEAST_TOKEN_BUDGET, prompts)


def test_checkpoints_are_read_ahead_and_skeletons_have_nothing_to_read() -> None:
    assert _arguments(SHAPES, "checkpoint")["safetensors_load_strategy"] == "prefetch"
    assert "safetensors_load_strategy" not in _arguments(SHAPES)
