"""Speculative decoding on the real engine: the same tokens, whoever drafts them.

The models are tiny, with random weights of ordinary size in float32, so that no two tokens are
level within rounding. The dense model computes what the MoE made of it does, which makes it a
draft that is always right; a perturbed one is right now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workers.contract.engine import EngineSettings, Speculative
from workers.contract.measurement import Measurement, Memory, Pass
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.engines.vllm_stepper import Batch
from workers.metrics import figures
from workers.moe.architecture import resolve
from workers.moe.upcycle import Recipe, upcycle
from workers.prompts import random_ids

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "dtype": "float32",
}
WORKLOAD = Workload(batch_size=3, input_tokens=24, output_tokens=13)
TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One engine, and what it said."""

    tokens: list[list[int]]
    timed: Pass
    memory: Memory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG)).save_pretrained(
        folder / "source"
    )
    source = str(folder / "source")
    upcycle(source, folder / "target", Recipe(experts=4, top_k=2))
    upcycle(source, folder / "equal", Recipe())
    upcycle(source, folder / "other", Recipe(perturb=0.5))
    upcycle(source, folder / "short", Recipe(layers=2))
    return folder


def _engine(models: Path, **speculative: Any) -> VllmEngine:
    asked = Speculative(**{"tokens": TOKENS, **speculative}) if speculative else None
    trial = Trial(
        model=Model(name=str(models / "target"), dtype="float32"),
        workload=WORKLOAD,
        engine=EngineSettings(eager=True, speculative=asked),
    )
    return VllmEngine(trial, [WORKLOAD], Site(scratch=models / "scratch", device="cpu"))


def _ran(models: Path, **speculative: Any) -> Ran:
    engine = _engine(models, **speculative)
    try:
        prompts = random_ids(WORKLOAD, vocab_size=256, index=0)
        # The second half of each is its first again, so that n-grams are found.
        prompts = [row[:12] + row[:12] for row in prompts]
        batch = Batch(prompts=prompts, lengths=[13] * 3, temperature=0.0)
        return Ran(
            tokens=engine._send(batch).tokens,
            timed=engine.generate(prompts, 13, kind="timed", repeat=0),
            memory=engine.memory(),
        )
    finally:
        engine.close()


@pytest.fixture(scope="module")
def plain(models: Path) -> Ran:
    return _ran(models)


@pytest.fixture(scope="module")
def equal(models: Path) -> Ran:
    return _ran(models, model=str(models / "equal"))


@pytest.fixture(scope="module")
def other(models: Path) -> Ran:
    return _ran(models, model=str(models / "other"))


def test_greedy_tokens_are_those_of_the_target_alone(plain: Ran, equal: Ran, other: Ran) -> None:
    assert equal.tokens == plain.tokens
    assert other.tokens == plain.tokens
    assert plain.timed.drafted is None


def test_a_draft_that_computes_what_the_target_does_is_always_right(equal: Ran) -> None:
    drafted = equal.timed.drafted
    assert drafted is not None
    assert drafted.accepted == drafted.proposed > 0
    # One token of the prompt's pass, then three drafted and one of the target's own a step.
    assert len(equal.timed.step_s) == 1 + 3
    assert drafted.steps == 3 * 3  # a batch of three
    got = figures(Measurement(passes=(equal.timed,)), output_tokens=13)
    assert (got["acceptance_rate"], got["accepted_length"]) == (1.0, 1.0 + TOKENS)


def test_another_draft_is_right_now_and_then(other: Ran, plain: Ran) -> None:
    drafted = other.timed.drafted
    assert drafted is not None
    assert 0 < drafted.accepted < drafted.proposed
    assert 4 < len(other.timed.step_s) <= len(plain.timed.step_s)
    got = figures(Measurement(passes=(other.timed,)), output_tokens=13)
    rate, length = got["acceptance_rate"], got["accepted_length"]
    assert rate is not None and 0 < rate < 1
    assert length is not None and 1 < length < 1 + TOKENS


def test_tokens_of_one_step_have_the_stamp_of_that_step(equal: Ran) -> None:
    for row in equal.timed.token_s:
        assert len(row) == 13
        assert [row.count(stamp) for stamp in sorted(set(row))] == [1, 4, 4, 4]
        assert set(row) <= set(equal.timed.step_s)
    got = figures(Measurement(passes=(equal.timed,)), output_tokens=13)
    steps = [late - early for early, late in pairwise(equal.timed.step_s)]
    assert got["itl_s"] == pytest.approx(sorted(steps)[1])
    assert got["tpot_s"] == pytest.approx(sum(steps) / 12)


def test_the_draft_is_in_the_memory(models: Path, plain: Ran, equal: Ran) -> None:
    draft = resolve(Model(name=str(models / "equal")))
    assert draft is not None and draft.params_total is not None
    assert plain.memory.weights is not None and equal.memory.weights is not None
    assert equal.memory.weights - plain.memory.weights == draft.params_total * 4
    assert plain.memory.kv_cache is not None and equal.memory.kv_cache is not None
    assert equal.memory.kv_cache == 2 * plain.memory.kv_cache  # as many layers again


@pytest.mark.parametrize(
    "speculative",
    [
        {"model": "ngram", "args": {"prompt_lookup_min": 1, "prompt_lookup_max": 3}},
        pytest.param({"model": "short"}, marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_draft(models: Path, plain: Ran, speculative: dict[str, Any]) -> None:
    if speculative["model"] == "short":
        speculative = {"model": str(models / "short")}
    ran = _ran(models, **speculative)
    assert ran.tokens == plain.tokens
    assert ran.timed.drafted is not None and ran.timed.drafted.proposed > 0
