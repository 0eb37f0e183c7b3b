"""A sweep that runs on without whoever started it: submitted to a cluster as a job.

The cluster is a real one of this machine, started as `cluster.yaml` starts a head: token
authentication on, the dashboard (which takes the jobs) on loopback. What is uploaded is a
checkout with an environment and results in it, which must stay behind.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import yaml

from tests.integration.harness import until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(280),
]

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
PACE = 0.01
"""Groups of the sweep last about half a second, so that a job can be stopped in the middle."""
TRIALS = 40
PATIENT = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
"""Ray kills a job three seconds after it was told to stop, if it is not told otherwise."""
SWEEP: dict[str, Any] = {
    "name": "detached",
    "base": {
        "model": {"name": "mixtral-8x7b", "weights": "dummy", "num_layers": 1, "scale": 0.0625},
        "workload": {"input_tokens": 8, "output_tokens": 8},
        "engine": {"kind": "roofline", "args": {"pace": PACE}},
    },
    "grid": {"model.ffn_dim": [1024 + 256 * i for i in range(TRIALS)]},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A cluster of one node."""

    process: psutil.Process
    url: str
    """Of its dashboard."""
    session: Path
    environment: Mapping[str, str]
    """Of whoever holds its token."""
    checkout: Path
    out: Path

    def job(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray job …`, as a user gives it."""
        return subprocess.run(
            [str(RAY), "job", *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            cwd=self.checkout,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.url, **environment},
        )

    def submit(self, name: str, out: str | None = None) -> None:
        """Gives the command of the README, and does not wait for its end."""
        command = ["-m", "orchestrator", "sweeps/detached.yaml", "--out", out or str(self.out)]
        done = self.job(
            "submit", "--no-wait", "--submission-id", name, "--working-dir", ".",
            "--runtime-env-json", PATIENT, "--", sys.executable, *command, "--profile", "h100",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def end(self, name: str) -> str:
        """How a job ended, in Ray's words; waits for it."""
        words = ("succeeded", "failed", "was stopped")
        told = until(
            lambda: next((w for w in words if f"{name}' {w}" in self.told("status", name)), None)
        )
        return str(told)

    def told(self, *arguments: str) -> str:
        """What `ray job …` says to either stream."""
        done = self.job(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def logs(self, name: str) -> str:
        """What whoever submitted a job can read."""
        return self.told("logs", name)

    def hosts(self) -> list[psutil.Process]:
        """Processes with engines."""
        below = self.process.children(recursive=True)
        return [one for one in below if "EngineHost" in _line(one)]


def _line(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return ""


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _checkout(folder: Path) -> Path:
    """What a user has: the project, its environment, and results of earlier sweeps."""
    folder.mkdir()
    for name in ("orchestrator", "workers"):
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    shutil.copy(ROOT / ".gitignore", folder)
    for name in ("sweeps", "results", ".venv", ".git"):
        (folder / name).mkdir()
        (folder / name / "large").write_text("not to be uploaded")
    (folder / "sweeps" / "detached.yaml").write_text(yaml.safe_dump(SWEEP))
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("d")
    session = Path(tempfile.gettempdir(), f"d{secrets.token_hex(3)}")  # sockets need short paths
    gcs, dashboard, client, agent = _free_ports(4)
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    started = subprocess.Popen(
        [
            str(RAY), "start", "--head", "--block", f"--port={gcs}", f"--temp-dir={session}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", "--num-cpus=1",
            f"--object-store-memory={80 * 2**20}",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    head = Head(
        process=psutil.Process(started.pid),
        url=f"http://127.0.0.1:{dashboard}",
        session=session,
        environment=environment,
        checkout=_checkout(folder / "checkout"),
        out=folder / "datasets",
    )
    try:
        until(lambda: head.job("list").returncode == 0, timeout=60)
        yield head
    finally:
        started.terminate()
        started.communicate(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def _records(head: Head) -> int:
    """Records on disk."""
    folder = head.out / "detached" / "records"
    files = list(folder.glob("*.arrow")) if folder.is_dir() else []
    return pl.scan_ipc(folder).select(pl.len()).collect().item() if files else 0


def test_a_stopped_job_keeps_its_records_and_is_resumed_by_submitting_again(head: Head) -> None:
    stranger = head.job("list", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode != 0 and "oken" in stranger.stdout + stranger.stderr

    head.submit("first")
    until(lambda: _records(head) >= 3)
    assert len(head.hosts()) == 1
    assert "was stopped" in head.told("stop", "first")
    kept = _records(head)
    assert 3 <= kept < TRIALS
    until(lambda: not head.hosts(), timeout=10)
    manifest = json.loads((head.out / "detached" / "manifest.json").read_text())
    (run,) = manifest["runs"]
    assert run["finished_at"] and run["counts"] == {"ok": kept}, "ended by itself, not killed"
    assert "goes on where this one stopped" in head.logs("first")

    head.submit("second")
    assert head.end("second") == "succeeded"
    told = head.logs("second")
    assert f"{TRIALS} of {TRIALS} trials have a record: {TRIALS} ok" in told
    assert f"{kept} of them from earlier runs" in told
    assert _records(head) == TRIALS
    assert not head.hosts()


def test_neither_results_nor_the_environment_are_uploaded(head: Head) -> None:
    head.submit("uploaded")
    assert head.end("uploaded") == "succeeded"
    copies = head.session.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*/")
    found = [{one.name for one in copy.iterdir()} for copy in copies if copy.is_dir()]
    assert found
    assert all(one == {"orchestrator", "workers", "sweeps", ".gitignore"} for one in found), found


def test_results_in_the_uploaded_copy_are_refused(head: Head) -> None:
    """It goes with the job, and with it the results."""
    head.submit("lost", out="results")
    assert head.end("lost") == "failed"
    assert "lies in Ray's copy of the working directory" in head.logs("lost")
