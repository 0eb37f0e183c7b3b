"""Running the command line as a user does, and looking for what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import yaml

from tests import own

TINY: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "model": {
            "name": "mixtral-8x7b",
            "weights": "dummy",
            "scale": 0.0625,
            "num_layers": 2,
            "ffn_dim": 3584,
        },
        "workload": {"batch_size": 2, "input_tokens": 16, "output_tokens": 8},
        "engine": {"eager": True},
        "measure": {"repeats": 2},
    },
}


def base(**sections: object) -> dict[str, object]:
    """The base of `TINY` with sections replaced."""
    whole: dict[str, object] = TINY["base"] | sections
    return whole


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep file of `TINY` with sections replaced."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *(str(one) for one in arguments)]


def orchestrate(
    *arguments: object, timeout: float = 200, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs the orchestrator to its end; `env` goes over the environment."""
    return subprocess.run(
        command(*arguments),
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts the orchestrator in a process group of its own, as a shell does, and so that it hears
    Ctrl-C wherever these tests run."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=hear_ctrl_c,
    )


def hear_ctrl_c() -> None:
    """Undoes in a child what a shell does to programs in its background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def records(folder: Path) -> pl.DataFrame:
    """The dataset's records as they are on disk."""
    return pl.scan_ipc(folder / "records").collect()


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The answer of `--json`; asserts that nothing else is on standard output."""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def until(what: Callable[[], Any], timeout: float = 120) -> Any:
    """Waits until `what()` is true and returns it."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing came of it in {timeout:.0f} s")


def footprint() -> set[str]:
    """What a run could leave: processes of engines and Ray, shared memory, sessions."""
    words = ("ray::", "raylet", "gcs_server", "EngineHost", "VLLM", "multiprocessing", "nursery")
    processes = set()
    for process in own.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if any(word in line or word in process.name() for word in words):
                processes.add(f"{process.pid} {line[:80]}")
    temporary = {
        str(path)
        for pattern in ("moe-*", "pymp-*", "vllm_dist_*", "ray/session_*")
        for path in own.temporary().glob(pattern)
    }
    return processes | own.shared_memory() | temporary


def hosts_of(driver: int) -> list[psutil.Process]:
    """Processes of engine hosts below a driver's Ray."""
    found = []
    for one in psutil.Process(driver).children(recursive=True):
        try:
            if "EngineHost" in " ".join(one.cmdline()) or "EngineHost" in one.name():
                found.append(one)
        except psutil.NoSuchProcess:
            continue
    return found


def forks_of(host: psutil.Process) -> list[psutil.Process]:
    """A host's fork server and its forks, eldest first: they are in its process group, and a
    server may be a fork of the driver's nursery."""
    group, found = os.getpgid(host.pid), []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            line = " ".join(one.cmdline())
            if ("forkserver" in line or "workers.nursery" in line) and os.getpgid(one.pid) == group:
                found.append(one)
    return sorted(found, key=lambda one: one.create_time())


def engine_of(host: psutil.Process) -> psutil.Process:
    """The fork in which a host's engine runs: younger than the server that made it."""
    forks = forks_of(host)
    assert len(forks) >= 2, "a server and its fork"
    return forks[-1]


def gone(before: set[str], timeout: float = 15) -> set[str]:
    """What is left beyond `before` after a grace for dying processes."""
    deadline = time.monotonic() + timeout
    while (left := footprint() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
