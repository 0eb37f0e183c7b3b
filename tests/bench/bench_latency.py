"""Our timed passes against vLLM's own latency benchmark, pass by pass on one engine.

    PYTHONPATH=. python tests/bench/bench_latency.py [--pairs 40] [--batch-size 16] …

An engine is built once, as a sweep builds it. Then `VllmEngine.generate` and
`vllm.benchmarks.latency.main` (its code unchanged, one iteration a call, handed the engine
that is there in place of building another) take turns, in alternating order. Two processes
on a shared machine differ by 10 to 20 % from one start to the next, so only passes of one
engine, next to each other, tell whether the two ways of measuring agree.

They differ around the engine: ours steps it by hand and takes a stamp per token, vLLM's
calls `LLM.generate`. Their code samples at temperature 1, so ours does too here; what greedy
sampling, the default of a sweep, takes is measured beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.metrics import interval
from workers.moe.architecture import bend, configuration
from workers.prompts import random_ids

WARMUP = 3


def skeleton(options: argparse.Namespace, folder: Path) -> Path:
    """A Mixtral at 1/8 of its widths; vLLM's benchmark draws token ids up to 10,000."""
    config = configuration("mixtral-8x7b")
    assert config is not None
    model = Model(
        name="mixtral-8x7b",
        weights="dummy",
        scale=0.125,
        num_layers=4,
        ffn_dim=options.ffn_dim,
        num_experts=options.num_experts,
        top_k=options.top_k,
    )
    (folder / "config.json").write_text(json.dumps(bend(config, model) | {"vocab_size": 10016}))
    return folder


class Theirs:
    """vLLM's benchmark on an engine that is already built."""

    def __init__(self, engine: VllmEngine, workload: Workload, folder: Path) -> None:
        from vllm import LLM
        from vllm.benchmarks import latency
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        LLM.from_engine_args = staticmethod(lambda args: engine._vllm.llm)
        parser = FlexibleArgumentParser()
        latency.add_cli_args(parser)
        self._out = folder / "theirs.json"
        self._main = latency.main
        args = engine.loaded.args
        self._args: Any = parser.parse_args(
            [
                f"--model={args['model']}",
                "--load-format=dummy",
                "--skip-tokenizer-init",
                f"--dtype={args['dtype']}",
                "--enforce-eager",
                f"--max-model-len={args['max_model_len']}",
                f"--max-num-seqs={args['max_num_seqs']}",
                f"--input-len={workload.input_tokens}",
                f"--output-len={workload.output_tokens}",
                f"--batch-size={workload.batch_size}",
                "--num-iters-warmup=0",
                "--num-iters=1",
                "--disable-detokenize",
                f"--output-json={self._out}",
            ]
        )

    def one(self) -> float:
        """Latency of one batch as their code measures it, seconds."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._main(self._args)
        (latency,) = json.loads(self._out.read_text())["latencies"]
        return float(latency)


def main() -> None:
    """Runs the pairs and prints both medians and the median of the paired ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {
        "pairs": 40,
        "batch-size": 16,
        "input-tokens": 64,
        "output-tokens": 64,
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
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = skeleton(options, Path(name))
        trial = Trial(
            model=Model(name=str(folder), weights="dummy"),
            workload=workload,
            engine=EngineSettings(eager=True),
        )
        engine = VllmEngine(trial, [workload], Site(scratch=folder, device="cpu"))
        theirs = Theirs(engine, workload, folder)

        def ours(index: int, temperature: float = 1.0) -> float:
            prompts = random_ids(workload, vocab_size=10_000, index=index)
            return engine.generate(
                prompts,
                workload.output_tokens,
                kind="timed",
                repeat=index,
                temperature=temperature,
            ).e2e_s

        for index in range(WARMUP):
            ours(index)
            theirs.one()
        mine, other, greedy = [], [], []
        for index in range(options.pairs):
            if index % 2:
                other.append(theirs.one())
                mine.append(ours(WARMUP + index))
            else:
                mine.append(ours(WARMUP + index))
                other.append(theirs.one())
            greedy.append(ours(WARMUP + index, temperature=0.0))
        engine.close()
    tokens = workload.batch_size * workload.tokens_per_request
    ratio = interval([a / b for a, b in zip(mine, other, strict=True)])
    print(vars(options))
    for label, values in (("ours", mine), ("vLLM's", other), ("greedy", greedy)):
        median = statistics.median(values)
        print(f"{label:7} median {median:.4f} s, {tokens / median:.0f} tokens/s")
    print(f"ratio of medians {statistics.median(mine) / statistics.median(other):.4f}")
    print(f"paired ratio     {ratio.median:.4f}  [{ratio.low:.4f}, {ratio.high:.4f}]")


if __name__ == "__main__":
    main()
