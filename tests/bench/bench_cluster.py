"""A real run of 5,000 trials on 16 nodes of 8 GPUs that only Ray believes in.

    python -m tests.bench.bench_cluster [--groups 500] [--seconds 300] [--keep FOLDER] [--json]

Everything is real but the devices: Ray's nodes, the command line, the schedule, a process
per lane, streams, records on disk. The engine is the roofline with a pace, so each group
holds its devices for the predicted time of a load and of its passes, scaled such that the
whole should take `--seconds`. All figures in the dataset are predicted, and say so.

Groups have 1, 2, 4, 8 and 16 devices (the last over two nodes); models of 2 layers to the
most that fits make some of them several times as long as others. Reported is the makespan
over what no schedule can beat: device-seconds over devices, or the longest group. Once with
the seconds that groups really had their devices, starts of processes included: that judges
the schedule. Once with the predicted ones: that judges everything, this machine's cores too,
which start some four processes per second where 16 nodes would start them side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import yaml

from orchestrator.plan import Group, Plan
from orchestrator.request import Request, prepare

SHARES = {1: 0.38, 2: 0.24, 4: 0.2, 8: 0.14, 16: 0.04}
"""Devices of a group and the share of groups that have them."""
NODE_DEVICES = 8
LAYERS = 18
"""Most layers per device: what 80 GB of an H100 carry of this model."""
TRIALS = 10
"""Trials of a group: as many output lengths."""
LONGEST = 1280
"""Tokens of the longest output."""
NODE_CORES = 64
"""By word, as the devices are. Ray keeps as many processes without work alive: fewer than a
real node has would have it start a process for every lane."""
PROFILE = "h100"
STORE_BYTES = 80 * 2**20
LEAST_BYTES = 1.5 * 2**30
"""Memory that is left to the rest of the machine."""
LOOK_S = 1.0


def sweep(folder: Path, groups: int, seed: int, pace: float) -> Path:
    """The sweep's file: `groups` groups of ten trials."""
    chance = random.Random(seed)
    sizes = [size for size, share in SHARES.items() for _ in range(round(share * groups))]
    sizes = (sizes + [1] * groups)[:groups]
    chance.shuffle(sizes)
    cases = []
    for number, size in enumerate(sizes):
        layers = round(2 * (LAYERS * size / 2) ** chance.random())
        cases.append(
            {
                "layout.tensor": min(size, NODE_DEVICES),
                "layout.pipeline": max(1, size // NODE_DEVICES),
                "model.num_layers": max(layers, 2),
                "model.ffn_dim": 14336 - 8 * number,
                "workload.seed": number,
            }
        )
    path = folder / "cluster.yaml"
    text = {
        "name": path.stem,
        "base": {
            "model": {"name": "mixtral-8x7b", "weights": "dummy"},
            "workload": {"batch_size": 1, "input_tokens": 512},
            "engine": {"kind": "roofline", "args": {"pace": pace}},
        },
        "grid": {"workload.output_tokens": [LONGEST // TRIALS * i for i in range(1, TRIALS + 1)]},
        "cases": cases,
    }
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    return path


def bound(groups: Sequence[tuple[float, int]], devices: int) -> float:
    """Seconds that no schedule can beat, of groups of so many seconds and devices."""
    work = sum(seconds * held for seconds, held in groups)
    return max(work / devices, max(seconds for seconds, _ in groups))


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A group's time on its lane."""

    group_id: str
    devices: int
    since: float
    until: float
    opened: bool
    """Its lane's process was started for it."""

    @property
    def seconds(self) -> float:
        return self.until - self.since


def history(log: Path, held: dict[str, int]) -> tuple[list[Held], int, float]:
    """From the log of events: who held devices when, processes opened, end of the last trial.

    Time counts from the run's beginning, a moment before the first assignment.
    """
    first, *lines = map(json.loads, log.read_text().splitlines())
    assert first["event"] == "start"
    on: dict[str, tuple[str, float, bool]] = {}
    fresh: set[str] = set()
    found: list[Held] = []
    opened = 0
    last = 0.0
    for line in lines:
        at = line.get("at", 0.0)
        if line["event"] == "TrialEnded":
            last = max(last, at)
        elif line["event"] == "GroupEnded":
            group_id, since, was_fresh = on.pop(str(line["lane_id"]))
            found.append(
                Held(
                    group_id=group_id,
                    devices=held[group_id],
                    since=since,
                    until=at,
                    opened=was_fresh,
                )
            )
        elif line["event"] != "started":
            raise AssertionError(f"something else happened: {line}")
        for command in line["commands"]:
            word, rest = command.split(" ", 1)
            lane, _, rest = rest.partition(": ")
            if word == "open":
                opened += 1
                fresh.add(lane)
            elif word == "assign":
                on[lane] = (rest.partition(",")[0], at, lane in fresh)
                fresh.discard(lane)
    assert not on, "a group never ended"
    return found, opened, last


def shares(groups: Sequence[Held], devices: int, end: float, parts: int = 10) -> list[float]:
    """Share of the devices that were held, in each of `parts` equal parts of the run."""
    step = end / parts
    return [
        sum(
            max(0.0, min(one.until, (i + 1) * step) - max(one.since, i * step)) * one.devices
            for one in groups
        )
        / (step * devices)
        for i in range(parts)
    ]


class Watch(threading.Thread):
    """Memory of the machine and of the driver, and how busy the cores are. Ends the driver
    before the machine's memory does."""

    def __init__(self, pid: int, before: int) -> None:
        super().__init__(daemon=True)
        self._driver, self._before = psutil.Process(pid), before
        self.done = threading.Event()
        self.peak = self.driver_peak = 0
        self.driver_cpu_s = 0.0
        self.busy: list[float] = []

    def run(self) -> None:
        psutil.cpu_percent()
        while not self.done.wait(LOOK_S):
            self.peak = max(self.peak, _used() - self._before)
            if psutil.virtual_memory().available < LEAST_BYTES:
                self._driver.terminate()
            self.busy.append(psutil.cpu_percent())
            with suppress(psutil.Error):
                self.driver_peak = max(self.driver_peak, self._driver.memory_info().rss)
                times = self._driver.cpu_times()
                self.driver_cpu_s = times.user + times.system


def _used() -> int:
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def check(dataset: Path, plan: Plan) -> dict[str, int]:
    """Every planned trial has exactly one terminal record, and each says that it is predicted.

    Returns:
        Records by outcome.
    """
    records = pl.scan_ipc(dataset / "records").select("trial_id", "outcome", "measured", "engine")
    frame = records.collect()
    planned = Counter(one.trial_id for group in plan.groups for one in group.trials)
    planned.update(one.trial_id for one in plan.infeasible)
    assert Counter(frame["trial_id"].to_list()) == planned, "not one record for each trial"
    assert not frame["measured"].any() and frame["measured"].null_count() == 0
    assert set(frame["engine"]) == {"roofline"}
    return dict(Counter(frame["outcome"].to_list()))


def fake(nodes: int, folder: str) -> Any:
    """Ray's own cluster for tests: real nodes, GPUs by word only.

    Args:
        nodes: beside a head without devices.
        folder: for its sessions; where Ray's own folder is, others would look for a cluster
            to join.
    """
    os.environ["RAY_TMPDIR"] = folder
    # A node would start a process per core for the first driver that comes: 128 for nothing.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as in cluster.yaml
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    head = {"num_gpus": 0, "num_cpus": 0, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = {"num_gpus": NODE_DEVICES, "num_cpus": NODE_CORES, "object_store_memory": STORE_BYTES}
    try:
        for _ in range(nodes):
            cluster.add_node(**node)
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the run came to; seconds, and memory in MiB."""

    devices: int
    groups: int
    trials: int
    outcomes: dict[str, int]
    pace: float
    makespan_s: float
    bound_held_s: float
    """From the seconds that groups really had their devices."""
    bound_predicted_s: float
    longest_held_s: float
    processes: int
    """Opened for lanes."""
    started_late_s: float
    """Mean of a group's held seconds beyond the predicted, on a process of its own."""
    reused_late_s: float
    """The same on a process that had a group before."""
    held: list[float]
    """Share of the devices, in each tenth of the run."""
    cores_busy: list[float]
    """Share of this machine's cores, in each tenth of the driver's life."""
    driver_cpu_s: float
    driver_mib: float
    cluster_mib: float
    """Before the run."""
    peak_mib: float
    """Nodes, processes and driver together."""

    @property
    def ratio_held(self) -> float:
        return self.makespan_s / self.bound_held_s

    @property
    def ratio_predicted(self) -> float:
        return self.makespan_s / self.bound_predicted_s


def measure(folder: Path, nodes: int, groups: int, seconds: float, seed: int) -> Outcome:
    """Plans, runs and reads the log."""
    devices = nodes * NODE_DEVICES
    plan = _plan(sweep(folder, groups, seed, 1.0))
    pace = seconds / bound([_predicted(one) for one in plan.groups], devices)
    path = sweep(folder, groups, seed, round(pace, 4))
    plan = _plan(path)
    held = {one.group_id: one.held for one in plan.groups}
    before = _used()
    ray_folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets have names of 107 letters
    cluster = fake(nodes, ray_folder)
    try:
        standing = _used() - before
        command = [sys.executable, "-m", "orchestrator", str(path), "--out", str(folder)]
        command += ["--profile", PROFILE, "--address", cluster.address, "--plain"]
        with (folder / "driver.txt").open("w") as output:
            driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            watch = Watch(driver.pid, before)
            watch.start()
            try:
                status = driver.wait()
            finally:
                watch.done.set()
                driver.terminate()
    finally:
        cluster.shutdown()
        shutil.rmtree(ray_folder, ignore_errors=True)
    assert status == 0, (folder / "driver.txt").read_text()[-2000:]
    dataset = folder / path.stem
    outcomes = check(dataset, plan)
    (log,) = (dataset / "logs").glob("*/events.jsonl")
    spans, opened, end = history(log, held)
    assert {one.group_id for one in spans} == held.keys()
    predicted = {one.group_id: one.predicted_s for one in plan.groups}
    late = {
        fresh: [one.seconds - predicted[one.group_id] for one in spans if one.opened == fresh]
        for fresh in (True, False)
    }
    return Outcome(
        devices=devices,
        groups=len(plan.groups),
        trials=plan.trials,
        outcomes=outcomes,
        pace=pace,
        makespan_s=end,
        bound_held_s=bound([(one.seconds, one.devices) for one in spans], devices),
        bound_predicted_s=bound([_predicted(one) for one in plan.groups], devices),
        longest_held_s=max(one.seconds for one in spans),
        processes=opened,
        started_late_s=statistics.fmean(late[True] or [math.nan]),
        reused_late_s=statistics.fmean(late[False] or [math.nan]),
        held=shares(spans, devices, end),
        cores_busy=_tenths(watch.busy),
        driver_cpu_s=watch.driver_cpu_s,
        driver_mib=watch.driver_peak / 2**20,
        cluster_mib=standing / 2**20,
        peak_mib=watch.peak / 2**20,
    )


def _plan(path: Path) -> Plan:
    return prepare(Request(sweep=path), PROFILE)[1]


def _predicted(group: Group) -> tuple[float, int]:
    return group.predicted_s, group.held


def _tenths(values: Sequence[float]) -> list[float]:
    """Means of ten equal parts, as shares."""
    size = len(values) / 10
    parts = [values[int(i * size) : int((i + 1) * size)] for i in range(10)]
    return [statistics.fmean(part) / 100 if part else math.nan for part in parts]


def main() -> None:
    """Runs it and prints what it came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--groups", type=int, default=500, help="of ten trials each")
    parser.add_argument("--seconds", type=float, default=300.0, help="bound to pace it to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for sweep, dataset and logs")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = asked.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        one = measure(folder, asked.nodes, asked.groups, asked.seconds, asked.seed)
        took = time.perf_counter() - began
    if asked.json:
        ratios = {"ratio_held": one.ratio_held, "ratio_predicted": one.ratio_predicted}
        print(json.dumps(asdict(one) | ratios))
        return
    percent = " ".join(f"{100 * share:.0f}" for share in one.held)
    busy = " ".join(f"{100 * share:.0f}" for share in one.cores_busy)
    print(
        f"{one.trials} trials in {one.groups} groups on {one.devices} devices, pace {one.pace:.4f}"
        f" (predicted figures); records: {one.outcomes}\n"
        f"makespan {one.makespan_s:.1f} s, {one.ratio_held:.3f} x the bound of held devices "
        f"({one.bound_held_s:.1f} s; longest group {one.longest_held_s:.1f} s), "
        f"{one.ratio_predicted:.3f} x the predicted bound ({one.bound_predicted_s:.1f} s)\n"
        f"devices held, % by tenths: {percent}\n"
        f"{one.processes} processes opened; a group took {one.started_late_s:.2f} s longer than "
        f"predicted on a new one, {one.reused_late_s:.2f} s on a used one\n"
        f"cores busy, % by tenths: {busy}; driver {one.driver_cpu_s:.0f} s of CPU\n"
        f"memory: driver {one.driver_mib:.0f} MiB, nodes {one.cluster_mib:.0f} MiB, at most "
        f"{one.peak_mib:.0f} MiB in all; {took:.0f} s with the cluster's start"
    )


if __name__ == "__main__":
    main()
