"""Our timed passes against vLLM's own latency benchmark, interleaved.

    python tests/bench/bench_latency.py [--rounds 4] [--batch-size 16] [--ffn-dim 7168] …

Each round runs two fresh processes, one after the other and in alternating order: ours
(the runner on one trial) and `vllm.benchmarks.latency.main`, with the same engine
arguments, batch and lengths. The medians over all passes of all rounds are compared. The
two differ in what they do around the engine: ours steps it by hand and takes a stamp per
token, sampling greedily; vLLM's calls `LLM.generate` and samples at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workers.contract.engine import EngineSettings
from workers.contract.measure import Measure
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload

PASSES = 5
WARMUP = 2

OURS = """
import json, sys
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished
from workers import runner
from tests.bench.bench_latency import trial
one = trial(json.loads(sys.argv[1]))
job = Job(sweep="bench", run_id="bench", group_id="bench", profile="cpu",
          tickets=(Ticket(trial=one, trial_id=one.trial_id),))
(done,) = [m for m in runner.run(job) if isinstance(m, Finished)]
assert done.outcome == "ok", done.record.to_pylist()
row = done.record.to_pylist()[0]
samples = [s["e2e_s"] for s in done.samples.to_pylist() if s["kind"] == "timed"]
json.dump({"latencies": samples, "args": json.loads(row["engine_args"])}, open(sys.argv[2], "w"))
"""

THEIRS = """
import json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.benchmarks import latency
parser = FlexibleArgumentParser()
latency.add_cli_args(parser)
latency.main(parser.parse_args(json.loads(sys.argv[1])))
"""


def trial(options: dict[str, Any]) -> Trial:
    """The trial that both sides run."""
    return Trial(
        model=Model(
            name="mixtral-8x7b",
            weights="dummy",
            scale=0.125,
            num_layers=4,
            ffn_dim=options["ffn_dim"],
            num_experts=options["num_experts"],
            top_k=options["top_k"],
        ),
        workload=Workload(
            batch_size=options["batch_size"],
            input_tokens=options["input_tokens"],
            output_tokens=options["output_tokens"],
        ),
        engine=EngineSettings(eager=True),
        measure=Measure(warmup=WARMUP, repeats=PASSES),
    )


def _run(code: str, *arguments: str) -> None:
    from workers.engines.vllm_engine import ENVIRONMENT

    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | ENVIRONMENT | environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _ours(options: dict[str, Any], folder: Path) -> tuple[list[float], dict[str, Any]]:
    out = folder / "ours.json"
    _run(OURS, json.dumps(options), str(out))
    found = json.loads(out.read_text())
    return found["latencies"], found["args"]


def _theirs(options: dict[str, Any], folder: Path, args: dict[str, Any]) -> list[float]:
    from workers.moe.architecture import bend, configuration

    skeleton = folder / "skeleton"
    skeleton.mkdir(exist_ok=True)
    config = configuration("mixtral-8x7b")
    assert config is not None
    bent = bend(config, trial(options).model)
    (skeleton / "config.json").write_text(json.dumps(bent))
    out = folder / "theirs.json"
    _run(
        THEIRS,
        json.dumps(
            [
                f"--model={skeleton}",
                "--load-format=dummy",
                "--skip-tokenizer-init",
                f"--dtype={args['dtype']}",
                "--enforce-eager",
                f"--max-model-len={args['max_model_len']}",
                f"--max-num-seqs={args['max_num_seqs']}",
                f"--kv-cache-memory-bytes={args['kv_cache_memory_bytes']}",
                f"--input-len={options['input_tokens']}",
                f"--output-len={options['output_tokens']}",
                f"--batch-size={options['batch_size']}",
                f"--num-iters-warmup={WARMUP}",
                f"--num-iters={PASSES}",
                "--disable-detokenize",
                f"--output-json={out}",
            ]
        ),
    )
    found: list[float] = json.loads(out.read_text())["latencies"]
    return found


def main() -> None:
    """Runs the rounds and prints both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    for name, default in {
        "batch-size": 16,
        "input-tokens": 64,
        "output-tokens": 64,
        "ffn-dim": 7168,
        "num-experts": 8,
        "top-k": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        args: dict[str, Any] = {}
        for index in range(rounds):
            if index % 2 == 0 or not args:
                latencies, args = _ours(options, folder)
                ours += latencies
                theirs += _theirs(options, folder, args)
            else:
                theirs += _theirs(options, folder, args)
                ours += _ours(options, folder)[0]
            print(
                f"round {index + 1}: ours {statistics.median(ours[-PASSES:]):.4f} s, "
                f"vLLM's {statistics.median(theirs[-PASSES:]):.4f} s",
                flush=True,
            )
    mine, other = statistics.median(ours), statistics.median(theirs)
    tokens = options["batch_size"] * (options["input_tokens"] + options["output_tokens"])
    print(f"{options}")
    print(f"ours    median {mine:.4f} s  {tokens / mine:8.0f} tok/s  ({len(ours)} passes)")
    print(f"vLLM's  median {other:.4f} s  {tokens / other:8.0f} tok/s  ({len(theirs)} passes)")
    print(f"ratio   {mine / other:.4f}")


if __name__ == "__main__":
    main()
