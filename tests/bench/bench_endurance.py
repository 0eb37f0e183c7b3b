"""Whether a long run costs more by the hour: memory, open files and the dataset over thousands
of trials.

    python -m tests.bench.bench_endurance [--trials 2000] [--runs trials groups engines]
        [--rows FILE] [--plot FILE.png]

Three runs through the real command line, each on a Ray of its own:

trials   `--trials` workloads of one engine (vLLM on CPU, a tiny skeleton of two layers): one
         driver, one host, one fork, one engine all the way.
groups   200 groups of the roofline engine, ten trials each, in the process of one host.
engines  20 groups of vLLM, 100 trials each: 20 forks, one after the other, of one server.

Every second, of each kind of process (the driver, its nursery of imports, the host's actor, the
server that is forked, the fork with the engine, all of Ray's own services together): resident
memory, open descriptors and threads. Memory is RSS, whole: what a fork shares with its server
counts in both, so that the birth of a fork does not look like a change of the server. Of the
dataset: bytes and files.

A table shows the state after 0, 25, 50, 75 and 100 % of the trials. The verdict is the slope of
the least-squares line through the second half, per 1,000 trials: below `FLAT_MIB` and
`FLAT_HANDLES` a process counts as flat. A fork that lives for one group only has no slope over
groups. With `--rows` every run is kept as a line of JSON, and those of earlier sittings are
shown too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from tests.integration.harness import forks_of

LOOK_S = 1.0
"""Time between two samples."""
FLAT_MIB = 10.0
"""Growth per 1,000 trials below which memory counts as flat."""
FLAT_HANDLES = 2.0
"""Growth per 1,000 trials below which open descriptors count as flat."""
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROLES = ("driver", "nursery", "host", "fork server", "engine", "Ray")
GROUPS = 200
ENGINES = 20
TINY = {
    "model": {
        "name": "mixtral-8x7b",
        "weights": "dummy",
        "scale": 0.0625,
        "num_layers": 2,
        "ffn_dim": 3584,
    },
    "engine": {"eager": True},
    "measure": {"warmup": 0, "repeats": 1},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What processes of one kind hold together."""

    mib: float
    """Resident memory."""
    handles: int
    """Open descriptors."""
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One moment of a run."""

    at_s: float
    """Since the command was given."""
    trials: int
    """With a record."""
    held: dict[str, Held]
    """Kind of process → what it holds; without kinds of which none was alive."""
    bytes: int
    """Of the dataset, logs included."""
    files: int
    """Of the dataset, logs included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One long run."""

    name: str
    trials: int
    groups: int
    wall_s: float
    samples: tuple[Sample, ...]
    tables_bytes: int
    """Records and samples in the end, merged."""
    logs_bytes: int
    files: int
    """Of the dataset in the end, logs included."""
    hosts: int
    """Actors that were seen."""
    forks: int
    """Forks with an engine that were seen."""


def sweep(name: str, trials: int) -> dict[str, Any]:
    """The sweep of a run, as its file has it."""
    if name == "trials":
        grid: dict[str, Any] = {
            "workload.batch_size": [1, 2, 3, 4],
            "workload.input_tokens": [4, 5, 6, 7, 8],
            "workload.output_tokens": [2, 3],
            "workload.seed": list(range(-(-trials // 40))),
        }
        return {"name": name, "base": TINY, "grid": grid}
    widths = GROUPS if name == "groups" else ENGINES
    base = TINY | {"workload": {"input_tokens": 4, "output_tokens": 2}}
    grid = {
        "model.ffn_dim": [1024 + 256 * i for i in range(widths)],
        "workload.batch_size": list(range(1, 11)),
    }
    if name == "groups":
        base |= {"engine": {"kind": "roofline"}}
    else:
        grid["workload.seed"] = list(range(10))
    return {"name": name, "base": base, "grid": grid}


def run(folder: Path, name: str, trials: int) -> Run:
    """Runs a sweep to its end and looks at it every `LOOK_S`."""
    path = folder / f"{name}.yaml"
    asked = sweep(name, trials)
    path.write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-m", "orchestrator", str(path), "--out", str(folder)]
    command += ["--address", "local", "--json", "--fresh"]
    if name == "groups":
        command += ["--profile", "h100"]
    began = time.perf_counter()
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = _Watch(driver.pid, folder / name, began)
    try:
        while driver.poll() is None:
            watch.look()
            time.sleep(LOOK_S)
    except BaseException:
        driver.terminate()
        driver.wait()
        raise
    wall_s = time.perf_counter() - began
    assert driver.stdout is not None
    told = json.loads(driver.stdout.read())
    assert driver.returncode == 0, driver.returncode
    assert set(told["outcomes"]) == {"ok"}, told["outcomes"]
    dataset = folder / name
    return Run(
        name=name,
        trials=told["trials"],
        groups=len(asked["grid"].get("model.ffn_dim", [1])),
        wall_s=wall_s,
        samples=tuple(watch.samples),
        tables_bytes=sum(sum(_sizes(dataset / table)) for table in ("records", "samples")),
        logs_bytes=sum(_sizes(dataset / "logs")),
        files=len(list(_sizes(dataset))),
        hosts=len(watch.seen["host"]),
        forks=len(watch.seen["engine"]),
    )


class _Watch:
    """Looks at a run from outside."""

    def __init__(self, driver: int, dataset: Path, began: float) -> None:
        self._driver = psutil.Process(driver)
        self._dataset, self._began = dataset, began
        self._events: Path | None = None
        self._read = self._ended = 0
        self.samples: list[Sample] = []
        self.seen: dict[str, set[int]] = {role: set() for role in ROLES}

    def look(self) -> None:
        """Takes a sample, once a host is there; none while the driver ends."""
        try:
            roles = self._roles()
        except (psutil.NoSuchProcess, ProcessLookupError):
            return
        if not roles["host"]:
            return
        trials = self._trials()
        held = {role: one for role, some in roles.items() if (one := _held(some)) is not None}
        for role, some in roles.items():
            self.seen[role] |= {one.pid for one in some}
        sizes = list(_sizes(self._dataset))
        self.samples.append(
            Sample(
                at_s=round(time.perf_counter() - self._began, 1),
                trials=trials,
                held=held,
                bytes=sum(sizes),
                files=len(sizes),
            )
        )

    def _roles(self) -> dict[str, list[psutil.Process]]:
        below = self._driver.children(recursive=True)
        called = {one: _called(one) for one in below}
        hosts = [one for one in below if "EngineHost" in called[one]]
        forks = {one: forks_of(one) for one in hosts}
        servers = [some[0] for some in forks.values() if some]
        engines = [one for some in forks.values() for one in some[1:]]
        forked = {*servers, *engines}
        nursery = [one for one in below if "workers.nursery" in called[one] and one not in forked]
        ours = {*hosts, *nursery, *(one for some in forks.values() for one in some)}
        family = {one.pid for some in ours for one in (some, *some.children(recursive=True))}
        return {
            "driver": [self._driver],
            "nursery": nursery,
            "host": hosts,
            "fork server": servers,
            "engine": engines,
            "Ray": [one for one in below if one.pid not in family],
        }

    def _trials(self) -> int:
        """Trials of which the schedule has heard the end: lines of the event log, which is
        read on from where it was left."""
        if self._events is None:
            self._events = next(iter(self._dataset.glob("logs/*/events.jsonl")), None)
        if self._events is not None:
            with self._events.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += len(new)
            self._ended += new.count(b'"event":"TrialEnded"')
        return self._ended


def _called(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return "gone"


def _held(processes: Iterable[psutil.Process]) -> Held | None:
    """What those that are still alive hold; None where none is."""
    found = []
    for one in processes:
        try:
            found.append((one.memory_info().rss, one.num_fds(), one.num_threads()))
        except psutil.Error:
            continue
    if not found:
        return None
    memory, handles, threads = (sum(column) for column in zip(*found, strict=True))
    return Held(mib=round(memory / 2**20, 2), handles=handles, threads=threads)


def _sizes(folder: Path) -> Iterable[int]:
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path.stat().st_size
        except FileNotFoundError:  # merged away
            continue


def slope(run: Run, role: str, quantity: str) -> float | None:
    """Growth per 1,000 trials over the second half of a run; None where that cannot be said."""
    half = [one for one in _going(run) if one.trials >= run.trials / 2 and role in one.held]
    if (role == "engine" and run.groups > 1) or len({one.trials for one in half}) < 3:
        return None
    values = [getattr(one.held[role], quantity) for one in half]
    return 1_000 * float(np.polyfit([one.trials for one in half], values, 1)[0])


def report(run: Run) -> bool:
    """Prints the table and the verdict.

    Returns:
        Whether every process is flat.
    """
    print(
        f"\n{run.name}: {run.trials:,} trials in {run.groups} groups, {run.wall_s:.0f} s, "
        f"{len(run.samples)} samples; {run.hosts} host(s), {run.forks} fork(s) seen"
    )
    print(f"{'':12}" + "".join(f"{f'{share:.0%}':>22}" for share in QUARTERS))
    chosen = [_nearest(run, share) for share in QUARTERS]
    for role in ROLES:
        cells = [_cell(one.held.get(role)) for one in chosen]
        print(f"{role:12}" + "".join(f"{cell:>22}" for cell in cells))
    cells = [f"{one.bytes / 2**10:,.0f} KiB {one.files:4} files" for one in chosen]
    print(f"{'dataset':12}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"{'trials':12}" + "".join(f"{one.trials:>22,}" for one in chosen))
    flat = True
    for role in ROLES:
        grown = [slope(run, role, quantity) for quantity in ("mib", "handles", "threads")]
        if any(one is None for one in grown):
            continue
        mib, handles, threads = (one or 0.0 for one in grown)
        good = mib < FLAT_MIB and handles < FLAT_HANDLES
        flat &= good
        print(
            f"{role}: {'flat' if good else 'NOT FLAT'}, per 1,000 trials of the second half "
            f"{mib:+.2f} MiB, {handles:+.2f} handles, {threads:+.2f} threads"
        )
    print(
        f"dataset: {run.tables_bytes / run.trials:.0f} bytes of records and samples per trial and "
        f"{run.logs_bytes / run.trials:.0f} of logs, {run.files} files in the end, at most "
        f"{max(one.files for one in run.samples)} on the way"
    )
    return flat


def _nearest(run: Run, share: float) -> Sample:
    """The first sample after a share of the trials, the last one for all of them."""
    going = _going(run)
    return next((one for one in going if one.trials >= share * run.trials), going[-1])


def _going(run: Run) -> list[Sample]:
    """Samples up to the last trial's end: then processes end, too."""
    return [one for one in run.samples if one.trials < run.trials]


def _cell(held: Held | None) -> str:
    return "–" if held is None else f"{held.mib:.0f} MiB {held.handles} fd {held.threads} th"


def plot(runs: Sequence[Run], path: Path) -> None:
    """Memory against trials, one panel per run."""
    import altair as alt
    import polars as pl

    rows = [
        {"run": run.name, "trials": one.trials, "of": role, "MiB": held.mib}
        for run in runs
        for one in run.samples
        for role, held in one.held.items()
    ]
    chart = (
        alt.Chart(pl.DataFrame(rows))
        .mark_line()
        .encode(
            alt.X("trials", title="Trials with a record"),
            alt.Y("MiB", title="Resident memory, MiB"),
            color=alt.Color("of", title=None, sort=list(ROLES)),
        )
        .properties(width=320, height=240)
        .facet(column=alt.Column("run", title=None))
    )
    chart.save(path, scale_factor=2)


def kept(path: Path | None) -> list[Run]:
    """Runs of earlier sittings."""
    if path is None or not path.exists():
        return []
    return [_read_run(json.loads(line)) for line in path.read_text().splitlines()]


def _read_run(told: dict[str, Any]) -> Run:
    samples = tuple(
        Sample(**one | {"held": {role: Held(**held) for role, held in one["held"].items()}})
        for one in told["samples"]
    )
    return Run(**told | {"samples": samples})


def main() -> int:
    """Runs what was asked for and prints a table and a verdict each; status 1 if one grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2_000, help="of the run of one engine")
    parser.add_argument(
        "--runs", nargs="*", choices=("trials", "groups", "engines"), help="default: all three"
    )
    parser.add_argument("--rows", type=Path, help="file of runs, read and added to")
    parser.add_argument("--plot", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("--out", type=Path, help="folder on the disk that datasets go to")
    asked = parser.parse_args()
    wanted = ("trials", "groups", "engines") if asked.runs is None else asked.runs
    runs = kept(asked.rows)
    with tempfile.TemporaryDirectory(prefix="endurance-", dir=asked.out) as name:
        for one in wanted:
            runs.append(run(Path(name), one, asked.trials))
            if asked.rows is not None:
                with asked.rows.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
    flat = [report(one) for one in runs]
    if asked.plot is not None:
        plot(runs, asked.plot)
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(main())
