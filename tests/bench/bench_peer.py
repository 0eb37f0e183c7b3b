"""One sweep of 12 points by `vllm bench sweep serve` and by ours, one after the other.

    PYTHONPATH=. python tests/bench/bench_peer.py MODEL_FOLDER [--keep FOLDER]

The folder holds a Mixtral with weights and a tokenizer. Three engine settings (top-k 1, 2,
4) times four workloads; both sides run eagerly on the same cores, without a prefix cache,
and time the same batch of requests per point. Ours runs as the peer works (no warm-up, each
point once) and as a sweep should (a warm-up; 1 and 3 repeats). Theirs runs as a user starts
it, and once more with the limits on sequences and lengths, and the binding of threads, that
ours works out from the workloads, which makes its servers start sooner.

What differs is the way of working, and it shows in the latencies too:

- theirs starts an HTTP server per engine setting and a client process per workload; tokens
  travel through a detokenizer, JSON and a socket. Its client sends one request before the
  batch to see that the server answers, and measures each point once.
- ours keeps the engine in one warm process and changes top-k in place; beside each batch in
  full it measures the batch with one token.

vLLM's command line needs a distribution called `vllm`, which the CPU build does not have, so
the modules behind it are started directly. Their summary table needs pandas; where that is
missing they fail after the last point, with every result on disk, and that is accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import yaml

TOP_KS = (1, 2, 4)
WORKLOADS = ((32, 16, 1), (32, 16, 4), (64, 32, 4), (64, 32, 8))
"""Prompt tokens, generated tokens, requests at once."""
LENGTH = max(i + o for i, o, _ in WORKLOADS)
BATCH = max(b for _, _, b in WORKLOADS)
CLIENT = (
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser; "
    "from vllm.benchmarks import serve; "
    "parser = Parser(); serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
FIGURES = ("ttft", "tpot", "e2el")
Point = tuple[int, int, int, int]
"""Top-k and workload."""
OURS = ((0, 1), (1, 1), (1, 3))
"""Warm-ups and repeats."""
LIMITS = ("--max-model-len", LENGTH, "--max-num-seqs", BATCH)
Figures = dict[Point, dict[str, float]]
"""Medians over requests, milliseconds."""


def ours(model: str, warmup: int, repeats: int, folder: Path) -> tuple[float, Figures]:
    """Seconds from the start of our command to its end, and the medians of its points."""
    name = f"warmup{warmup}-repeats{repeats}"
    sweep = {
        "name": name,
        "base": {
            "model": {"name": model},
            "engine": {"eager": True},
            "measure": {"repeats": repeats, "warmup": warmup},
        },
        "grid": {"model.top_k": list(TOP_KS)},
        "zip": {
            "workload.input_tokens": [i for i, _, _ in WORKLOADS],
            "workload.output_tokens": [o for _, o, _ in WORKLOADS],
            "workload.batch_size": [b for _, _, b in WORKLOADS],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    command = [sys.executable, "-m", "orchestrator", str(path), "--out", str(folder), "--plain"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    found = folder / name
    records, samples = (pl.scan_ipc(found / table).collect() for table in ("records", "samples"))
    loads = records["engine_load_s"].unique().len()
    print(f"ours, {name}: {seconds:.1f} s, {loads} engine(s) built", flush=True)
    keys = ("top_k", "input_tokens", "output_tokens", "batch_size")
    figures = {}
    for row in records.iter_rows(named=True):
        timed = samples.filter(
            (pl.col("trial_id") == row["trial_id"]) & (pl.col("kind") == "timed")
        )
        requests = [one for passed in timed["token_s"].to_list() for one in passed]
        figures[tuple(row[key] for key in keys)] = {
            "ttft": 1000 * statistics.median(one[0] for one in requests),
            "tpot": 1000
            * statistics.median((one[-1] - one[0]) / (len(one) - 1) for one in requests),
            "e2el": 1000 * statistics.median(one[-1] for one in requests),
        }
    return seconds, figures


def theirs(model: str, folder: Path, *, limited: bool) -> tuple[float, Figures]:
    """The same of `vllm bench sweep serve`, with our limits or with its own."""
    name = "limited" if limited else "default"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = folder / "serve.json"
    serve.write_text(json.dumps([{"hf_overrides": {"num_experts_per_tok": k}} for k in TOP_KS]))
    bench = folder / "bench.json"
    bench.write_text(
        json.dumps(
            [
                {
                    "random_input_len": i,
                    "random_output_len": o,
                    "num_prompts": b,
                    "max_concurrency": b,
                }
                for i, o, b in WORKLOADS
            ]
        )
    )
    server = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--enforce-eager", "--dtype", "bfloat16"),
        *("--no-enable-prefix-caching", *(LIMITS if limited else ())),
        *("--host", "127.0.0.1", "--port", port),
    ]
    client = [
        *(sys.executable, "-c", CLIENT, "--model", model, "--dataset-name", "random"),
        *("--host", "127.0.0.1", "--port", port, "--ignore-eos", "--endpoint", "/v1/completions"),
    ]
    command = [
        *(sys.executable, "-m", "vllm.benchmarks.sweep.serve"),
        *("--serve-cmd", _line(server), "--bench-cmd", _line(client)),
        *("--after-bench-cmd", "true", "--serve-params", serve, "--bench-params", bench),
        *("--num-runs", "1", "--output-dir", folder, "--experiment-name", name),
    ]
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # by default it asks for nearly all of the memory
    }
    if limited:
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores
    start = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [str(one) for one in command],
            check=False,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    seconds = time.perf_counter() - start
    figures: Figures = {}
    for path in (folder / name).rglob("run=0.json"):
        told: dict[str, Any] = json.loads(path.read_text())
        assert told["completed"] == told["num_prompts"], f"requests failed: {path}"
        overrides = told["hf_overrides"]["num_experts_per_tok"]
        point = (overrides, told["random_input_len"], told["random_output_len"])
        figures[*point, told["num_prompts"]] = {name: told[f"median_{name}_ms"] for name in FIGURES}
    expected = len(TOP_KS) * len(WORKLOADS)
    if len(figures) != expected:
        raise SystemExit(f"theirs gave {len(figures)} of {expected} points: {folder}/{name}.log")
    print(f"theirs, {name}: {seconds:.1f} s, {len(TOP_KS)} servers, {expected} clients", flush=True)
    return seconds, figures


def _line(command: list[Any]) -> str:
    return shlex.join(str(one) for one in command)


def main() -> None:
    """Runs ours for each number of repeats, then theirs, and prints both beside each other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--keep", type=Path, help="folder for everything that both write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        mine = {how: ours(options.model, *how, folder) for how in OURS}
        other = {how: theirs(options.model, folder, limited=how) for how in (False, True)}
    print("\nmakespan theirs / ours       by default   with our limits")
    for (warmup, repeats), (seconds, _) in mine.items():
        ratios = "".join(f"{other[how][0] / seconds:14.1f}" for how in (False, True))
        print(f"  warm-ups {warmup}, repeats {repeats}    {ratios}")
    print("\nmedians over requests, ms: ours once / ours warm, 3 repeats / theirs / theirs limited")
    print(f"{'top-k':>5} {'in/out':>7} {'batch':>5} {'TTFT':>26} {'TPOT':>26} {'E2E':>28}")
    shown = [mine[OURS[0]][1], mine[OURS[-1]][1], other[False][1], other[True][1]]
    for point in sorted(shown[0]):
        top_k, given, made, batch = point
        cells = [" / ".join(f"{one[point][name]:.0f}" for one in shown) for name in FIGURES]
        print(
            f"{top_k:>5} {f'{given}/{made}':>7} {batch:>5} "
            f"{cells[0]:>26} {cells[1]:>26} {cells[2]:>28}"
        )


if __name__ == "__main__":
    main()
