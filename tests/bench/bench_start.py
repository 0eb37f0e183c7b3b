"""What a compiled CPU engine's start costs, and what the caches of compiled code save.

    PYTHONPATH=. python tests/bench/bench_start.py [--model FOLDER]

Two processes, one after the other, with one fresh folder for compiled code between them, as
two hosts of a sweep on one machine have. The first builds an engine, the same once more,
and one of another top-k; the second builds the first again. For each: seconds to build it,
and seconds of the first and the second pass of a batch. An eager engine stands beside them.
With a checkpoint, its load is timed with the file out of the page cache too, with and
without reading ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.prompts import random_ids

SKELETON = Model(name="mixtral-8x7b", weights="dummy", scale=0.125, num_layers=4, top_k=2)
WORKLOADS = (
    Workload(batch_size=8, input_tokens=64, output_tokens=16),
    Workload(batch_size=1, input_tokens=64, output_tokens=16),
)


def _cold(folder: str) -> None:
    """Drops the folder's files from the page cache."""
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Model, folder: Path, *, eager: bool, **args: Any) -> dict[str, float]:
    """Builds one engine, runs two passes and closes it."""
    from workers.engines.base import Site
    from workers.engines.vllm_engine import VllmEngine

    settings = EngineSettings(eager=eager, args=args)
    trial = Trial(model=model, workload=WORKLOADS[0], engine=settings)
    VllmEngine.prepare()
    start = time.perf_counter()
    engine = VllmEngine(trial, WORKLOADS, Site(scratch=folder, device="cpu"))
    told = {"load": time.perf_counter() - start}
    for index, label in enumerate(("first", "second")):
        prompts = random_ids(
            WORKLOADS[0], vocab_size=engine.loaded.architecture.vocab_size, index=index
        )
        one = engine.generate(prompts, 16, kind="warmup", repeat=index)
        told[label] = one.e2e_s
    engine.close()
    return told


def child(which: str, model: Model, folder: Path) -> None:
    """One process of the comparison; its figures go to standard output's last line."""
    other = replace(model, top_k=1)
    rows: list[tuple[str, dict[str, float]]] = []

    def take(label: str, of: Model, **how: Any) -> None:
        rows.append((label, measure(of, folder, **how)))

    if which == "first":
        take("process 1, engine 1", model, eager=False)
        take("process 1, the same again", model, eager=False)
        take("process 1, another top-k", other, eager=False)
    elif which == "second":
        take("process 2, engine 1 again", model, eager=False)
    elif which == "eager":
        take("eager", model, eager=True)
        take("eager, the same again", model, eager=True)
    else:
        measure(model, folder, eager=True)
        for label, args in (("lazy", {}), ("prefetch", {"safetensors_load_strategy": "prefetch"})):
            for state in ("in page cache", "cold"):
                if state == "cold":
                    _cold(model.name)
                take(f"checkpoint {state}, {label}", model, eager=True, **args)
    print(json.dumps(rows))


def main() -> None:
    """Runs the processes and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a checkpoint in place of the skeleton")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = Model(name=options.model, top_k=2) if options.model else SKELETON
    if options.child:
        child(options.child[0], model, Path(options.child[1]))
        return
    print(f"{'':34}{'load':>8}{'first pass':>12}{'second':>8}   seconds")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for which in ("first", "second", "eager", *(["files"] if options.model else [])):
            command = [sys.executable, __file__, "--child", which, name]
            if options.model:
                command += ["--model", options.model]
            environment = os.environ | {"VLLM_CACHE_ROOT": f"{name}/cache"}
            environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
            with (Path(name) / "log").open("a") as log:
                done = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            for label, told in json.loads(done.stdout.splitlines()[-1]):
                print(
                    f"{label:34}{told['load']:8.1f}{told['first']:12.2f}{told['second']:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
