"""An engine that became another top-k is the engine built for it, to the last logit.

Random weights of vLLM's own making are so small that experts hardly matter to a logit, so
the models here are tiny checkpoints with weights of ordinary size: two families that
renormalise the chosen weights and one that does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract import tiny
from tests.contract.tiny import TOP_K
from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.message import Finished, Progress
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

WORKLOAD = Workload(batch_size=3, input_tokens=12, output_tokens=8)
SMALL = Workload(batch_size=1, input_tokens=6, output_tokens=4)
TOP_KS = (1, 2, 4)


@pytest.fixture(
    scope="module",
    params=[
        "mixtral",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_moe", "olmoe")),
    ],
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.checkpoint(folder, request.param, dtype="bfloat16")


def _trial(model: Model, top_k: int | None, **changes: Any) -> Trial:
    settings = {"model": replace(model, top_k=top_k), "engine": EngineSettings(eager=True)}
    return Trial(**{"workload": WORKLOAD, **settings, **changes})


def _engine(trial: Trial, folder: Path) -> VllmEngine:
    return VllmEngine(trial, [WORKLOAD, SMALL], Site(scratch=folder, device="cpu"))


def _said(engine: VllmEngine) -> list[tuple[Sequence[int], list[dict[int, float]]]]:
    """Greedy tokens of three prompts and the logits' logarithms behind each of them."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=20
    )
    prompts = [{"prompt_token_ids": [17 * i + j for j in range(12)]} for i in range(1, 4)]
    told = []
    for answer in engine._vllm.llm.generate(prompts, asked, use_tqdm=False):
        (one,) = answer.outputs
        rows = [{token: known.logprob for token, known in row.items()} for row in one.logprobs]
        told.append((tuple(one.token_ids), rows))
    return told


def test_after_becoming_it_speaks_as_the_engine_built_for_that_top_k(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = Model(name=str(checkpoint))
    engine = _engine(_trial(model, TOP_KS[0]), tmp_path)
    became, memory = {TOP_KS[0]: _said(engine)}, {}
    try:
        for top_k in (*TOP_KS[1:], None):
            assert engine.become(_trial(model, top_k))
            runs = top_k or TOP_K
            assert engine.loaded.architecture.top_k == runs
            asked = engine.loaded.args["hf_overrides"].get("num_experts_per_tok")
            assert asked == (None if runs == TOP_K else runs)
            became.setdefault(runs, _said(engine))
            assert became[runs] == _said(engine)
            memory[runs] = engine.memory()
    finally:
        engine.close()
    assert became[1] != became[2] != became[4], "top-k is seen in what is said"
    for top_k in TOP_KS[1:]:
        fresh = _engine(_trial(model, top_k), tmp_path)
        try:
            assert became[top_k] == _said(fresh)
            used, other = memory[top_k], fresh.memory()
            assert (used.weights, used.kv_cache) == (other.weights, other.kv_cache)
            assert fresh.loaded.args == engine.loaded.args | {
                "hf_overrides": fresh.loaded.args["hf_overrides"]
            }
        finally:
            fresh.close()


@pytest.mark.slow
def test_every_rank_of_a_tensor_layout_changes(checkpoint: Path, tmp_path: Path) -> None:
    model, layout = Model(name=str(checkpoint)), Layout(tensor=2)
    engine = _engine(_trial(model, 2, layout=layout), tmp_path)
    try:
        assert engine.become(_trial(model, 1, layout=layout))
        became = _said(engine)
    finally:
        engine.close()
    fresh = _engine(_trial(model, 1, layout=layout), tmp_path)
    try:
        assert became == _said(fresh)
    finally:
        fresh.close()


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    engine = _engine(_trial(MIXTRAL, 2), tmp_path_factory.mktemp("scratch"))
    yield engine
    engine.close()


MIXTRAL = Model(
    name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584, top_k=2
)


@pytest.mark.parametrize(
    "other",
    [
        {"model": replace(MIXTRAL, top_k=1, num_layers=3)},
        {"model": replace(MIXTRAL, top_k=1, dtype="float32")},
        {"layout": Layout(tensor=2)},
        {"engine": EngineSettings()},
        {"model": replace(MIXTRAL, top_k=9)},
    ],
)
def test_it_becomes_nothing_but_another_top_k(skeleton: VllmEngine, other: dict[str, Any]) -> None:
    before = skeleton.loaded
    assert not skeleton.become(replace(_trial(MIXTRAL, 1), **other))
    assert skeleton.loaded == before


def test_a_compiled_engine_holds_its_top_k(
    skeleton: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = skeleton._vllm.engine.vllm_config
    monkeypatch.setattr(config.model_config, "enforce_eager", False)
    assert not skeleton.become(_trial(MIXTRAL, 1))


def test_a_layer_of_an_unknown_kind_is_refused_before_any_is_changed(
    skeleton: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = skeleton._vllm.llm.llm_engine.model_executor.driver_worker.worker.get_model()
    last = model.model.layers[-1].block_sparse_moe
    monkeypatch.setattr(last.experts.routed_experts, "scoring_func", "sigmoid")
    assert not skeleton.become(_trial(MIXTRAL, 1))
    assert {one.block_sparse_moe.experts.router.top_k for one in model.model.layers} == {2}
    monkeypatch.undo()
    monkeypatch.setattr(last, "top_k", 2, raising=False)
    assert not skeleton.become(_trial(MIXTRAL, 1))


def _run(model: Model, top_ks: Sequence[int], folder: Path, kind: str = "vllm") -> tuple[Any, ...]:
    measure = Measure(warmup=1, repeats=1, extra_repeats=0)
    settings = EngineSettings(eager=True, kind=kind)  # type: ignore[arg-type]
    trials = [
        _trial(model, top_k, engine=settings, workload=workload, measure=measure)
        for top_k in top_ks
        for workload in (SMALL, WORKLOAD)
    ]
    job = Job(
        sweep="s",
        run_id="r",
        group_id="g",
        profile="cpu",
        tickets=tuple(Ticket(trial=one, trial_id=one.named_id) for one in trials),
        scratch=str(folder),
    )
    messages = list(runner.run(job))
    loads = [m for m in messages if isinstance(m, Progress) and m.stage == "load"]
    records = [
        m.record.to_pylist()[0] | {"samples": m.samples.to_pylist() if m.samples else []}
        for m in messages
        if isinstance(m, Finished)
    ]
    assert {one["outcome"] for one in records} == {"ok"}
    assert {one["trial_id"] for one in records} == {one.named_id for one in trials}
    return len(loads), records


@pytest.mark.parametrize("kind", ["vllm", "roofline"])
def test_a_group_of_several_top_ks_is_measured_on_one_engine(kind: str, tmp_path: Path) -> None:
    loads, records = _run(MIXTRAL, (4, 1, 2), tmp_path, kind)
    assert loads == 1
    assert [one["top_k"] for one in records] == [1, 1, 2, 2, 4, 4]
    assert [one["batch_size"] for one in records] == [3, 1] * 3
    assert len({one["engine_load_s"] for one in records}) == 1
    active = [one["params_active"] for one in records]
    assert active[0] < active[2] < active[4]
    assert len({one["params_total"] for one in records}) == 1
    if kind == "vllm":
        assert [_warmups(one) for one in records] == [[8], *[[4]] * 5]


def _warmups(record: dict[str, Any]) -> list[int]:
    """Tokens per request of each of a trial's warm-up passes."""
    rows = [one for one in record["samples"] if one["kind"] == "warmup"]
    return [len(one["token_s"][0]) for one in rows]


def test_experts_chosen_in_groups_need_an_engine_for_each_top_k(tmp_path: Path) -> None:
    model = Model(name="deepseek-v2-lite", weights="dummy", scale=0.0625, num_layers=2)
    loads, records = _run(model, (1, 2), tmp_path)
    assert loads == 2
    assert [one["top_k"] for one in records] == [1, 1, 2, 2]
    assert len({one["engine_load_s"] for one in records}) == 2


def test_nothing_cached_by_a_pass_serves_a_later_one(tmp_path: Path) -> None:
    """Also where a sweep turns prefix caching on: blocks are forgotten between passes."""
    for caching in (False, True):
        settings = EngineSettings(eager=True, args={"enable_prefix_caching": caching})
        long = Workload(batch_size=2, input_tokens=200, output_tokens=4)
        engine = VllmEngine(
            _trial(MIXTRAL, 2, engine=settings), [long], Site(scratch=tmp_path, device="cpu")
        )
        scheduler = engine._vllm.engine.engine_core.engine_core.scheduler
        cached: list[int] = []
        step = engine._vllm.engine.step

        def watched(step: Any = step, cached: list[int] = cached) -> Any:
            outputs = step()
            cached += [one.num_cached_tokens for one in outputs]
            return outputs

        engine._vllm.engine.step = watched
        try:
            prompts = [list(range(1, 201)), list(range(301, 501))]
            for repeat, output_tokens in enumerate((4, 4, 1)):
                engine.generate(prompts, output_tokens, kind="timed", repeat=repeat)
                assert scheduler.kv_cache_manager.usage == 0
                assert scheduler.get_num_unfinished_requests() == 0
            assert len(cached) == 2 * (4 + 4 + 1)
            assert set(cached) == {0}
        finally:
            engine.close()
        assert json.loads(json.dumps(engine.loaded.args))["enable_prefix_caching"] is caching
