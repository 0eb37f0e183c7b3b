"""Whether a live driver disturbs what an engine measures, pass by pass on one engine.

    PYTHONPATH=. python tests/bench/bench_driver.py [--repeats 80] [--window 3]

A sweep of one trial with many repeats runs through the real command line. While its engine
measures, the driver, and Ray's own processes, are stopped and let go in turns of `--window`
seconds. Two processes on a shared machine differ by 10 to 20 % from one start to the next, so
only passes of one engine, in turns, tell whether the driver costs anything. An engine's host
never waits for the driver: what it sends is kept until the driver goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import psutil
import yaml

from workers.metrics import interval

SWEEP = {
    "model": {"name": "mixtral-8x7b", "weights": "dummy", "scale": 0.125, "num_layers": 8},
    "workload": {"batch_size": 4, "input_tokens": 64, "output_tokens": 32},
    "engine": {"eager": True},
}
Windows = list[tuple[float, float]]


def _others(driver: psutil.Process) -> list[psutil.Process]:
    """The driver and Ray's services: everything of a run but the engine's own process."""
    below = driver.children(recursive=True)
    engines = ("ray::", "multiprocessing", "nursery")
    return [driver, *(one for one in below if not any(word in _called(one) for word in engines))]


def _engine_works(driver: psutil.Process) -> bool:
    return any("EngineHost.run" in _called(one) for one in driver.children(recursive=True))


def _called(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return "gone"


def turns(driver: psutil.Process, window_s: float, until: float) -> tuple[Windows, Windows]:
    """Stops and lets go until `until` (Unix time); the spans of both."""
    stopped: Windows = []
    live: Windows = []
    while time.time() < until and driver.is_running():
        others = _others(driver)
        for one in others:
            os.kill(one.pid, signal.SIGSTOP)
        begin = time.time()
        time.sleep(window_s)
        stopped.append((begin, time.time()))
        for one in others:
            os.kill(one.pid, signal.SIGCONT)
        begin = time.time()
        time.sleep(window_s)
        live.append((begin, time.time()))
    return stopped, live


def main() -> None:
    """Runs the trial and prints medians of both kinds of pass and their ratio per turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=80)
    parser.add_argument("--window", type=float, default=3.0, help="seconds of one turn")
    parser.add_argument("--spare", type=float, default=40.0, help="seconds of turns at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name) / "sweep.yaml"
        measure = {"measure": {"repeats": options.repeats}}
        path.write_text(yaml.safe_dump({"name": "driver", "base": SWEEP | measure}))
        command = [sys.executable, "-m", "orchestrator", str(path), "--out", name, "--plain"]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        driver = psutil.Process(running.pid)
        while not _engine_works(driver):
            time.sleep(0.2)
        time.sleep(12)  # imports, load and warm-up
        stopped, live = turns(driver, options.window, time.time() + options.spare)
        assert running.wait() == 0, "the sweep failed"
        samples = pl.scan_ipc(Path(name) / "driver/samples").collect()
    timed = samples.filter(pl.col("kind") == "timed").select(
        start=pl.col("started_at").dt.timestamp("us") / 1e6, e2e_s="e2e_s"
    )

    def within(windows: Windows) -> list[list[float]]:
        """Times of the passes that lie wholly inside each span."""
        return [
            timed.filter((pl.col("start") >= a) & (pl.col("start") + pl.col("e2e_s") <= b))[
                "e2e_s"
            ].to_list()
            for a, b in windows
        ]

    pairs = [(a, b) for a, b in zip(within(live), within(stopped), strict=True) if a and b]
    ratio = interval([statistics.median(a) / statistics.median(b) for a, b in pairs])
    for label, side in (("live", 0), ("stopped", 1)):
        values = [value for pair in pairs for value in pair[side]]
        print(f"{label:8} {len(values)} passes, median {statistics.median(values):.4f} s")
    print(
        f"paired ratio of {len(pairs)} turns {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
    )


if __name__ == "__main__":
    main()
