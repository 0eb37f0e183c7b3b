"""What the probe costs while it is in: TTFT and TPOT of the same passes with and without it.

    PYTHONPATH=. python tests/bench/bench_probe.py [--pairs 20] [--batch-size 8] …

One engine, the same prompts twice, once bare and once with the probe in place, in turns of
alternating order; so each pair differs by the probe and by what the machine did meanwhile.
Printed are the medians, and of the paired ratios the median with the 95 % interval of a
bootstrap over pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workers.contract.engine import EngineSettings
from workers.contract.measurement import Pass
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.prompts import random_ids

WARMUP = 2
RESAMPLES = 10_000


def latencies(one: Pass) -> dict[str, float]:
    """Medians over requests, seconds."""
    return {
        "TTFT": statistics.median(row[0] for row in one.token_s),
        "TPOT": statistics.median((row[-1] - row[0]) / (len(row) - 1) for row in one.token_s),
    }


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Runs the pairs and prints medians and paired ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {
        "pairs": 20,
        "batch-size": 8,
        "input-tokens": 128,
        "output-tokens": 32,
        "num-layers": 4,
        "ffn-dim": 7168,
        "num-experts": 8,
        "top-k": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    workload = Workload(
        batch_size=options.batch_size,
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
    )
    model = Model(
        name="mixtral-8x7b",
        weights="dummy",
        scale=0.125,
        num_layers=options.num_layers,
        ffn_dim=options.ffn_dim,
        num_experts=options.num_experts,
        top_k=options.top_k,
    )
    trial = Trial(model=model, workload=workload, engine=EngineSettings(eager=True))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        engine = VllmEngine(trial, [workload], Site(scratch=Path(name), device="cpu"))
        runs = engine.loaded.architecture

        def measured(index: int, *, probed: bool) -> dict[str, float]:
            prompts = random_ids(workload, vocab_size=runs.vocab_size, index=index)
            if probed:
                engine._vllm.llm.collective_rpc(
                    "start_probe", args=(runs.num_experts, runs.top_k, False)
                )
            try:
                done = engine.generate(prompts, workload.output_tokens, kind="timed", repeat=index)
                if probed:
                    (account,) = engine._vllm.llm.collective_rpc("read_probe")
                    assert account.failure is None
                    assert len(account.steps) == len(done.step_s)
            finally:
                engine._vllm.llm.collective_rpc("stop_probe")
            return latencies(done)

        for index in range(WARMUP):
            measured(index, probed=True)
            measured(index, probed=False)
        rows: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for index in range(WARMUP, WARMUP + options.pairs):
            for probed in (True, False) if index % 2 else (False, True):
                rows[probed].append(measured(index, probed=probed))
        engine.close()
    print(vars(options))
    for figure in ("TTFT", "TPOT"):
        with_probe = [one[figure] for one in rows[True]]
        bare = [one[figure] for one in rows[False]]
        ratios = [a / b for a, b in zip(with_probe, bare, strict=True)]
        low, high = bootstrap(ratios)
        print(
            f"{figure}: bare {statistics.median(bare) * 1e3:.2f} ms, "
            f"with the probe {statistics.median(with_probe) * 1e3:.2f} ms, "
            f"paired ratio {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]"
        )


if __name__ == "__main__":
    main()
