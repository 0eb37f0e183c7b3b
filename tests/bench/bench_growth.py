"""How the driver's cost grows with the trials of a sweep, where a trial itself costs nothing.

    python -m tests.bench.bench_growth [--trials 1000 3000 10000] [--rows FILE] [--plot FILE.png]
    python -m tests.bench.bench_growth --streams

Sweeps of trivial roofline trials, 50 to a group, run through the real command line on a Ray
of their own. Of the driver's process: CPU seconds (its own, without Ray's services), wall
seconds and peak resident memory; of the dataset: bytes. What one trial costs is what a run
takes beyond the run of a single group, per trial beyond those of that group. Growth is the
exponent b of the power law c·n^b that fits those seconds best (1 is linear).

A run that is not done after `--most` seconds is interrupted, as Ctrl-C would, and counts with
the trials that it recorded. With `--rows` every run is kept as a line of JSON and runs of
earlier sittings are read again, so a long series can be measured in parts.

`--streams` measures the way of a record piece by piece: Ray's streams without the store,
from one, two and four lanes, and the store without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import yaml

from workers.contract.engine import EngineKind
from workers.contract.message import Finished, Released

TRIALS = (1_000, 3_000, 10_000, 30_000, 100_000)
GROUP = 50
"""Trials of a group: 10 batch sizes and 5 lengths of output."""
LOOK_S = 0.2
"""Time between two looks at the driver's memory."""
STREAMED = 500
"""Trials that each stream of `--streams` carries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one sweep took."""

    trials: int
    """With a record."""
    groups: int
    wall_s: float
    """The whole process, imports and Ray's start included."""
    cpu_s: float
    """User and system time of the driver's process alone."""
    peak_mib: float
    """Most resident memory of the driver's process."""
    records_bytes: int
    samples_bytes: int
    logs_bytes: int
    """Events and logs."""
    stopped: bool
    """Interrupted, so not all of the sweep."""


def sweep(folder: Path, trials: int) -> Path:
    """The sweep's file: `trials` points in groups of 50, all of which fit an H100."""
    groups = -(-trials // GROUP)
    path = folder / f"growth-{trials}.yaml"
    text = {
        "name": path.stem,
        "base": {
            "model": {"name": "mixtral-8x7b", "weights": "dummy", "num_layers": 4},
            "workload": {"input_tokens": 16},
            "engine": {"kind": "roofline"},
        },
        "grid": {
            "model.ffn_dim": [1024 + 16 * i for i in range(groups)],
            "workload.batch_size": list(range(1, 11)),
            "workload.output_tokens": [4, 5, 6, 7, 8],
        },
    }
    path.write_text(yaml.safe_dump(text))
    return path


def run(folder: Path, trials: int, most_s: float) -> Run:
    """Runs a sweep of `trials` to its end, or for `most_s` seconds."""
    path = sweep(folder, trials)
    command = [sys.executable, "-m", "orchestrator", str(path), "--out", str(folder)]
    command += ["--profile", "h100", "--address", "local", "--json", "--fresh"]
    began = time.perf_counter()
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    stopped = False
    try:
        while not _ended(driver.pid):
            peak = max(peak, psutil.Process(driver.pid).memory_info().rss)
            if not stopped and time.perf_counter() - began > most_s:
                driver.send_signal(signal.SIGINT)
                stopped = True
            time.sleep(LOOK_S)
    except BaseException:
        driver.terminate()
        driver.wait()
        raise
    wall = time.perf_counter() - began
    cpu = psutil.Process(driver.pid).cpu_times()
    assert driver.stdout is not None
    told = json.loads(driver.stdout.read())
    assert driver.wait() == (130 if stopped else 0)
    dataset = folder / path.stem
    recorded = pl.scan_ipc(dataset / "records").select("trial_id").collect()["trial_id"]
    assert recorded.n_unique() == len(recorded) == sum(told["outcomes"].values())
    assert stopped or told["outcomes"] == {"ok": trials}
    return Run(
        trials=len(recorded),
        groups=-(-len(recorded) // GROUP),
        wall_s=wall,
        cpu_s=cpu.user + cpu.system,
        peak_mib=peak / 2**20,
        records_bytes=_bytes(dataset / "records"),
        samples_bytes=_bytes(dataset / "samples"),
        logs_bytes=_bytes(dataset / "logs"),
        stopped=stopped,
    )


def _ended(pid: int) -> bool:
    """Whether a child is dead; it stays to be asked what it took."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def beyond(runs: Sequence[Run], fixed: Run) -> pl.DataFrame:
    """Trials and seconds of each run beyond those of one group."""
    return pl.DataFrame(
        {
            "trials": [one.trials - fixed.trials for one in runs],
            "wall": [one.wall_s - fixed.wall_s for one in runs],
            "driver CPU": [one.cpu_s - fixed.cpu_s for one in runs],
        },
        orient="row",
    ).sort("trials")


def exponent(frame: pl.DataFrame, seconds: str) -> float:
    """b of the power law c·n^b through trials and seconds, fitted to their logarithms."""
    return float(np.polyfit(np.log(frame["trials"]), np.log(frame[seconds]), 1)[0])


def plot(frame: pl.DataFrame, path: Path) -> None:
    """Seconds against trials, both logarithmic, beside a line of linear growth."""
    import altair as alt

    names = {one: f"{one}: exponent {exponent(frame, one):.2f}" for one in ("wall", "driver CPU")}
    first = frame.row(0, named=True)
    linear = frame.select("trials", linear=pl.col("trials") * first["wall"] / first["trials"])
    x = alt.X("trials", title="Trials").scale(type="log")
    seen = (
        alt.Chart(frame.rename(names).unpivot(index="trials", variable_name="of"))
        .mark_line(point=True)
        .encode(x, alt.Y("value", title="Seconds beyond one group").scale(type="log"))
        .encode(color=alt.Color("of", title=None))
    )
    even = alt.Chart(linear).mark_line(strokeDash=[4, 4], color="grey").encode(x, y="linear")
    title = alt.Title(
        "Cost of a sweep by its number of trials",
        subtitle="Roofline trials (predicted, not measured) on one machine; dashed: linear",
    )
    (even + seen).properties(width=440, height=300, title=title).save(path, scale_factor=2)


def kept(path: Path | None) -> list[Run]:
    """Runs of earlier sittings."""
    if path is None or not path.exists():
        return []
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()]


def streams(folder: Path) -> None:
    """Prints records per second through Ray's streams, and through the store."""
    from ray.cluster_utils import Cluster as FakeCluster

    from orchestrator.cluster import Cluster
    from orchestrator.store import Dataset

    node: dict[str, Any] = {"num_gpus": 4, "num_cpus": 4, "object_store_memory": 128 * 2**20}
    fake = FakeCluster(initialize_head=True, head_node_args=node)
    messages: list[Finished] = []
    try:
        with Cluster.connect(fake.address) as cluster:
            for lanes in (1, 2, 4):
                messages, taken, cpu = _streamed(cluster, folder, lanes)
                print(
                    f"{lanes} lanes, Ray's streams alone: {len(messages) / taken:.0f} records/s, "
                    f"{1e3 * cpu / len(messages):.2f} ms of the driver's CPU each",
                    flush=True,
                )
    finally:
        fake.shutdown()
    with Dataset.open(folder, "store") as dataset:
        began, cpu = time.perf_counter(), time.process_time()
        for one in messages:
            run_id = one.record["run_id"][0].as_py()
            dataset.commit(run_id, records=one.record, samples=one.samples)
        taken, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"the store alone, merges included: {len(messages) / taken:.0f} records/s, "
        f"{1e3 * cpu / len(messages):.2f} ms of CPU each"
    )


def _streamed(cluster: Any, folder: Path, lanes: int) -> tuple[list[Finished], float, float]:
    """Terminal records of as many groups as lanes, the seconds and CPU seconds in which they
    came once the processes stood."""
    from orchestrator.events import Lane
    from orchestrator.pool import Pool
    from orchestrator.request import Request, prepare

    _, plan = prepare(Request(sweep=sweep(folder, 2 * lanes * STREAMED)), "h100")
    trials = [one for group in plan.groups for one in group.trials]
    kinds: tuple[EngineKind, ...] = ("roofline",)
    pool = Pool(cluster, sweep="s", run_id="r", profile="h100", logs=folder, kinds=kinds)
    for lane_id in range(lanes):
        pool.open(Lane(lane_id=lane_id, node_id=cluster.nodes[0].node_id, devices=1))
    try:
        for _ in _round(pool, plan.groups[:lanes]):  # imports, connections
            pass
        whole = [
            replace(plan.groups[0], trials=tuple(trials[i * STREAMED : (i + 1) * STREAMED]))
            for i in range(lanes)
        ]
        began, cpu = time.perf_counter(), time.process_time()
        messages = list(_round(pool, whole))
        return messages, time.perf_counter() - began, time.process_time() - cpu
    finally:
        pool.close_all()


def _round(pool: Any, groups: Sequence[Any]) -> Iterator[Finished]:
    """Gives each lane a group, and hears them to their end."""
    for lane_id, group in enumerate(groups):
        pool.assign(lane_id, group, {one.trial_id: 1 for one in group.trials})
    left = len(groups)
    while left:
        for _, happening in pool.poll(0.25):
            if isinstance(happening, Finished):
                yield happening
            elif isinstance(happening, Released):
                left -= 1


def main() -> None:
    """Runs what was asked for and prints one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="*", default=list(TRIALS))
    parser.add_argument("--most", type=float, default=480.0, help="seconds of one run at most")
    parser.add_argument("--rows", type=Path, help="file of runs, read and added to")
    parser.add_argument("--plot", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("--out", type=Path, help="folder on the disk that datasets go to")
    parser.add_argument("--streams", action="store_true", help="measure a record's way instead")
    asked = parser.parse_args()
    runs = kept(asked.rows)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=asked.out) as name:
        if asked.streams:
            streams(Path(name))
            return
        for trials in [GROUP] * (not runs) + asked.trials:
            runs.append(run(Path(name), trials, asked.most))
            if asked.rows is not None:
                with asked.rows.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
    fixed, *runs = sorted(runs, key=lambda one: one.trials)
    assert fixed.trials == GROUP, "the run of one group is missing"
    print(f"one group of {GROUP}: wall {fixed.wall_s:.1f} s, driver CPU {fixed.cpu_s:.2f} s")
    frame = beyond(runs, fixed)
    for one in runs:
        trials = one.trials - fixed.trials
        print(
            f"{one.trials:,} trials{' (stopped)' if one.stopped else ''}: "
            f"wall {one.wall_s:.1f} s, {1e3 * (one.wall_s - fixed.wall_s) / trials:.2f} ms/trial; "
            f"driver CPU {one.cpu_s:.1f} s, {1e3 * (one.cpu_s - fixed.cpu_s) / trials:.2f} "
            f"ms/trial; {one.peak_mib:.0f} MiB; records {one.records_bytes / 2**20:.2f} MiB, "
            f"samples {one.samples_bytes / 2**20:.2f}, logs {one.logs_bytes / 2**20:.2f}"
        )
    if len(runs) > 1:
        found = ", ".join(f"{one} {exponent(frame, one):.3f}" for one in ("wall", "driver CPU"))
        print(f"growth exponent: {found}")
        if asked.plot is not None:
            plot(frame, asked.plot)


if __name__ == "__main__":
    main()
