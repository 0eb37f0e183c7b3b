"""Where the time of a sweep goes: four engine settings times six workloads, on this CPU.

    PYTHONPATH=. python tests/bench/bench_efficiency.py [--repeats 5] [--model FOLDER]

The settings are top-k 1, 2 and 4 in bfloat16, which share one engine, and top-k 2 in float32,
which needs an engine of its own, so that closing, rebuilding and starting in a warm process
are in it. The real command line runs once. Every second between its start and its end is
then laid to one cause, from the stamps of records, samples and manifest, and the processor
time of every process of it is read while passes run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import polars as pl
import psutil
import yaml

SKELETON = {"name": "mixtral-8x7b", "weights": "dummy", "scale": 0.125, "num_layers": 4}
BATCHES = (1, 4, 8)
LENGTHS = ((32, 16), (64, 32))
SETTINGS = (
    {"model.top_k": 1},
    {"model.top_k": 2},
    {"model.top_k": 4},
    {"model.top_k": 2, "model.dtype": "float32"},
)
POLL_S = 0.2


class Watch(threading.Thread):
    """Processor time of every process below one, by what it is, at every moment."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.readings: list[tuple[float, dict[str, float]]] = []

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            seen: dict[str, float] = defaultdict(float)
            try:
                for one in [self._root, *self._root.children(recursive=True)]:
                    try:
                        used = one.cpu_times()
                        seen[_role(one, self._root)] += used.user + used.system
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.readings.append((time.time(), dict(seen)))
            time.sleep(POLL_S)

    def between(self, start: float, end: float) -> dict[str, float]:
        """Processor seconds of each kind of process in a span of time."""
        inside = [seen for at, seen in self.readings if start <= at <= end]
        roles = inside[-1].keys()
        return {role: inside[-1][role] - inside[0].get(role, 0.0) for role in roles}


def _role(process: psutil.Process, root: psutil.Process) -> str:
    if process == root:
        return "driver"
    line = " ".join(process.cmdline()) + process.name()
    words = ("EngineHost", "multiprocessing", "nursery")
    return "engine" if any(word in line for word in words) else "Ray"


def sweep(options: argparse.Namespace) -> dict[str, object]:
    """The sweep file: settings as cases, workloads as a grid."""
    model = {"name": options.model} if options.model else SKELETON
    return {
        "name": "efficiency",
        "base": {
            "model": model,
            "engine": {"eager": True},
            "measure": {"warmup": 1, "repeats": options.repeats},
        },
        "cases": [
            setting | {"workload.input_tokens": given, "workload.output_tokens": made}
            for setting in SETTINGS
            for given, made in LENGTHS
        ],
        "grid": {"workload.batch_size": list(BATCHES)},
    }


def account(
    began: float, ended: float, run_began: float, records: pl.DataFrame, samples: pl.DataFrame
) -> dict[str, float]:
    """Seconds of the makespan by cause; they add up to it."""
    passes = samples.with_columns(start=pl.col("started_at").dt.timestamp("us") / 1e6).with_columns(
        end=pl.col("start") + pl.col("e2e_s")
    )
    own = passes.join(records.select("trial_id", "engine_load_s"), on="trial_id")
    engines = (
        own.group_by("engine_load_s")
        .agg(pl.col("start").min(), pl.col("end").max(), pl.col("e2e_s").sum())
        .sort("start")
    )
    spans = engines.to_dicts()
    told = {kind: float(value) for kind, value in own.group_by("kind").agg(pl.sum("e2e_s")).rows()}
    loads = [one["start"] - one["engine_load_s"] for one in spans]
    found = {
        "driver: imports, plan, Ray": run_began - began,
        "engine's process: start, imports": loads[0] - run_began,
        "loads": sum(one["engine_load_s"] for one in spans),
        "warm-up passes": told["warmup"],
        "timed passes, one token": told["one_token"],
        "timed passes, in full": told["timed"],
        "between passes": sum(one["end"] - one["start"] - one["e2e_s"] for one in spans),
        "between engines": sum(
            load - before["end"] for before, load in zip(spans[:-1], loads[1:], strict=True)
        ),
        "end: last engine, Ray": ended - spans[-1]["end"],
    }
    assert abs(sum(found.values()) - (ended - began)) < 0.01, "a second is missing"
    return found


def main() -> None:
    """Runs the sweep and prints the account."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="folder of a checkpoint in place of the skeleton")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        path = folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(sweep(options)))
        command = [sys.executable, "-m", "orchestrator", str(path), "--out", name, "--plain"]
        began = time.time()
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        watch = Watch(running.pid)
        watch.start()
        assert running.wait() == 0, "the sweep failed"
        ended = time.time()
        found = folder / "efficiency"
        records, samples = (
            pl.scan_ipc(found / table).collect() for table in ("records", "samples")
        )
        (run,) = json.loads((found / "manifest.json").read_text())["runs"]
    run_began = datetime.fromisoformat(run["started_at"]).timestamp()
    causes = account(began, ended, run_began, records, samples)
    makespan = ended - began
    engines = records["engine_load_s"].unique().len()
    print(f"{len(records)} trials, {engines} engines built, makespan {makespan:.1f} s")
    for cause, seconds in causes.items():
        print(f"  {cause:34}{seconds:8.1f} s {seconds / makespan:6.1%}")
    passes = sum(value for cause, value in causes.items() if "passes," in cause or "warm" in cause)
    print(f"inside timed passes and warm-ups: {passes / makespan:.3f} of the makespan")
    stamps = sorted(one.timestamp() for one in samples["started_at"].to_list())
    start, end = stamps[0], stamps[-1]
    print(f"processor time while passes run ({end - start:.0f} s):")
    for role, used in watch.between(start, end).items():
        print(f"  {role:34}{used:8.1f} s {used / (end - start):6.1%} of a core")


if __name__ == "__main__":
    main()
