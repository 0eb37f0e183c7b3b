"""Routing that a sweep forces on the real engine, against the probabilities that it asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.moe.skew import inclusion, parse, probabilities
from workers.prompts import random_ids

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

MODEL = Model(
    name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584, top_k=2
)
WORKLOAD = Workload(batch_size=8, input_tokens=128, output_tokens=17)


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2", "all-to-one"])
def test_experts_are_chosen_as_the_sweep_says(routing: str, tmp_path: Path) -> None:
    trial = Trial(
        model=MODEL, workload=WORKLOAD, engine=EngineSettings(eager=True, routing=routing)
    )
    engine = VllmEngine(trial, [WORKLOAD], Site(scratch=tmp_path, device="cpu"))
    try:
        prompts = random_ids(WORKLOAD, vocab_size=engine.loaded.architecture.vocab_size, index=0)
        trace = engine.trace(prompts, WORKLOAD.output_tokens, routes=True)
        assert engine.become(replace(trial, model=replace(MODEL, top_k=1)))
        single = engine.trace(prompts, 2)
    finally:
        engine.close()
    assert trace.routes is not None
    rows = np.concatenate(trace.routes)  # tokens, layers, top-k
    assert (rows[..., 0] != rows[..., 1]).all(), "no token takes an expert twice"
    tokens = len(rows)
    assert tokens == 8 * (128 + 16)
    for top_k, counts, count in (
        (2, trace.prefill + trace.decode, tokens),
        (1, single.prefill, 8 * 128),
    ):
        chances = inclusion(probabilities(parse(routing), 8), top_k).chances
        shares = counts / count
        # Five standard errors of a binomial share.
        allowed = 5 * np.sqrt(chances * (1 - chances) / count) + 1e-9
        assert (np.abs(shares - chances) <= allowed).all(), (shares, chances)


@pytest.mark.slow
def test_an_engine_after_it_has_its_own_router_again(tmp_path: Path) -> None:
    prompts = random_ids(WORKLOAD, vocab_size=500, index=0)
    found = []
    for routing in (None, "all-to-one", None):
        settings = EngineSettings(eager=True, routing=routing)
        trial = Trial(model=MODEL, workload=WORKLOAD, engine=settings)
        engine = VllmEngine(trial, [WORKLOAD], Site(scratch=tmp_path, device="cpu"))
        try:
            found.append(engine.trace(prompts, 2).prefill)
        finally:
            engine.close()
    assert (found[0] == found[2]).all() and not (found[0] == found[1]).all()


def test_what_is_no_routing_is_refused() -> None:
    settings = EngineSettings(routing="pareto")
    told = VllmEngine.refuses(Trial(model=MODEL, workload=WORKLOAD, engine=settings))
    assert told is not None and "zipf:A" in told
