"""Whether a host that waits, its imports done, disturbs what an engine beside it measures.

    PYTHONPATH=. python tests/bench/bench_standby.py [--rounds 12]

One engine on all cores runs passes in three situations that take turns: alone; beside a
process with vLLM imported that waits to be forked, as the next group's does; and beside one
that is importing vLLM, which is what a scheduler without such a process does when the next
engine begins. Ratios are of medians, round by round, so drift touches all three alike.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Engine, Site
from workers.metrics import interval
from workers.prompts import random_ids

MODEL = Model(name="mixtral-8x7b", weights="dummy", scale=0.125, num_layers=4)
WORKLOAD = Workload(batch_size=4, input_tokens=32, output_tokens=16)
WAITING = (
    "from workers.forks import Forks; forks = Forks(['vllm']); forks.prepare(); "
    "print('waits', flush=True); input()"
)
IMPORTING = "while True: __import__('subprocess').run([{0!r}, '-c', {1!r}])"
IMPORT = "from workers.engines.vllm_engine import VllmEngine; VllmEngine.prepare()"
TURN_S = 4.0
"""Time of passes in one situation of a round, seconds."""


def passes(engine: Engine, seconds: float) -> list[float]:
    """Times of passes for about `seconds`."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        prompts = random_ids(
            WORKLOAD, vocab_size=engine.loaded.architecture.vocab_size, index=len(found)
        )
        one = engine.generate(prompts, WORKLOAD.output_tokens, kind="timed", repeat=len(found))
        found.append(one.e2e_s)
    return found


def beside(code: str, says: bool) -> subprocess.Popen[str]:
    """Another process, in a group of its own, once it says that it is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    if says:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
    else:
        time.sleep(0.5)
    return process


def used(process: subprocess.Popen[str]) -> float:
    """Processor seconds of a process and all below it."""
    root = psutil.Process(process.pid)
    times = [one.cpu_times() for one in [root, *root.children(recursive=True)]]
    return sum(one.user + one.system for one in times)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and what it started."""
    subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=True)
    process.wait()


def main() -> None:
    """Runs the rounds and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    from workers.engines.vllm_engine import VllmEngine

    importing = IMPORTING.format(sys.executable, IMPORT)
    times: dict[str, list[list[float]]] = {"alone": [], "waiting": [], "importing": []}
    idle: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        trial = Trial(model=MODEL, workload=WORKLOAD, engine=EngineSettings(eager=True))
        engine = VllmEngine(trial, [WORKLOAD], Site(scratch=Path(name), device="cpu"))
        passes(engine, 2.0)
        for _ in range(options.rounds):
            times["alone"].append(passes(engine, TURN_S))
            other = beside(WAITING, says=True)
            before = used(other)
            times["waiting"].append(passes(engine, TURN_S))
            idle.append(used(other) - before)
            end(other)
            other = beside(importing, says=False)
            times["importing"].append(passes(engine, TURN_S))
            end(other)
        engine.close()
    for label, rounds in times.items():
        every = [one for some in rounds for one in some]
        print(f"{label:10}{len(every):5} passes, median {statistics.median(every):.4f} s")
    print(f"processor time of a waiting process in {TURN_S:.0f} s: at most {max(idle):.3f} s")
    for label in ("waiting", "importing"):
        ratios = [
            statistics.median(some) / statistics.median(alone)
            for some, alone in zip(times[label], times["alone"], strict=True)
        ]
        found = interval(ratios)
        print(f"{label} / alone: {found.median:.3f} [{found.low:.3f}, {found.high:.3f}]")


if __name__ == "__main__":
    main()
