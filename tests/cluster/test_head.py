"""The head of a cluster dies under a driver that is attached to it.

Ray itself would wait for it for a minute and then end the driver with status 1 and no word.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import cluster
from orchestrator.manifest import read
from tests.integration.harness import orchestrate, records, start, summary, sweep_file, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

BASE: dict[str, Any] = {
    "model": {"name": "mixtral-8x7b", "weights": "dummy"},
    "layout": {"tensor": 2},
    "workload": {"batch_size": 1, "input_tokens": 512},
}
PROMPT_S = cluster.HEAD_S + cluster.STUCK_S + 3 * cluster.HEAD_LOOK_S + 5
"""From the head's death to the driver's end at the latest, seconds: within Ray's minute."""


@pytest.fixture
def fake() -> Iterator[Any]:
    """A head without devices and a node with two GPUs that only Ray believes in."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * 2**20}
    fake = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **store})
    hosts: list[psutil.Process] = []
    try:
        node = fake.add_node(num_cpus=4, num_gpus=2, **store)
        fake.raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        yield fake
        hosts = fake.raylet.children(recursive=True)
    finally:
        fake.shutdown()
        for one in hosts:  # they would give a lost node half a minute
            if one.is_running():
                one.kill()


@contextmanager
def _beheaded(fake: Any, blow: signal.Signals) -> Iterator[None]:
    (gcs,) = fake.head_node.all_processes["gcs_server"]
    gcs.process.send_signal(blow)
    if blow == signal.SIGKILL:
        gcs.process.wait()
    try:
        yield
    finally:
        if blow == signal.SIGSTOP:
            gcs.process.send_signal(signal.SIGCONT)


def _ended(driver: subprocess.Popen[str]) -> tuple[int, str, float]:
    """Status, last words and seconds until the end."""
    began = time.monotonic()
    try:
        _, said = driver.communicate(timeout=90)
    finally:
        driver.kill()
    return driver.returncode, said, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
@pytest.mark.parametrize("pace", [0.2, 0.0005], ids=["while it waits", "while it places"])
def test_a_driver_whose_head_is_gone_says_so_and_keeps_its_records(
    tmp_path: Path, fake: Any, pace: float, blow: signal.Signals
) -> None:
    """Slow groups: the driver only listens. Fast ones: it is in the middle of a request to Ray,
    or soon will be. Connections to a head that hangs are still accepted, by the kernel."""
    base = BASE | {"engine": {"kind": "roofline", "args": {"pace": pace}}}
    layers = [8, 12, 16, 20] if pace > 0.01 else list(range(4, 33))
    widths = [14336] if pace > 0.01 else [7168, 10752, 14336]
    grid = {
        "model.num_layers": layers,
        "model.ffn_dim": widths,
        "workload.output_tokens": [2000, 4000, 6000],
    }
    path = sweep_file(tmp_path, base=base, grid=grid)
    driver = start(
        path, "--out", tmp_path, "--plain", "--profile", "h100", "--address", fake.address
    )
    try:
        until(lambda: _heard(tmp_path) >= 2)
        with _beheaded(fake, blow):
            status, said, took_s = _ended(driver)
    finally:
        driver.kill()
    made = records(tmp_path / "tiny")
    planned = 3 * len(layers) * len(widths)
    assert status == 3, said
    assert took_s < PROMPT_S
    (line,) = said.splitlines()
    told = re.search(
        rf"head of the Ray cluster.* is gone; the records of (\d+) of {planned} ", line
    )
    assert told is not None and "the same command goes on" in line, line
    assert 2 <= int(told[1]) == made.height < planned
    (run,) = read(tmp_path / "tiny" / "manifest.json", "tiny")["runs"]
    if pace > 0.01 and blow == signal.SIGKILL:  # nothing kept the driver from closing it
        assert run["finished_at"] is not None and run["counts"] == {"ok": made.height}

    again = orchestrate(
        path, "--out", tmp_path, "--profile", "h100", "--address", "local", "--limit", 1, "--json"
    )
    answer = summary(again)
    assert (answer["resumed"], answer["outcomes"]) == (
        made.height,
        {"ok": made.height + 1},
    ), again.stderr


def _heard(folder: Path) -> int:
    """Trials of which the schedule has heard, and which are therefore on disk."""
    logs = (folder / "tiny" / "logs").glob("*/events.jsonl")
    return sum(one.read_text().count('"TrialEnded"') for one in logs)


def test_one_slow_answer_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, True, False, True, *[False] * 1000])

    def greet(address: str, patience_s: float) -> None:
        if not next(answers):
            raise TimeoutError

    monkeypatch.setattr(cluster, "_greet", greet)
    monkeypatch.setattr(cluster, "HEAD_LOOK_S", 0.05)
    monkeypatch.setattr(cluster, "HEAD_S", 0.4)
    monkeypatch.setattr(cluster, "STUCK_S", 0.1)
    head = cluster._Head("127.0.0.1:1")
    said: list[float] = []
    began = time.monotonic()

    def last_words() -> None:
        said.append(time.monotonic() - began)
        head.leave()

    head.last_words = last_words
    until(lambda: head.silent, 2)
    until(lambda: not head.silent, 2)
    assert not head.lost
    until(lambda: head.lost, 5)
    until(lambda: said, 5)
    assert len(said) == 1 and said[0] > 0.5


def test_a_head_that_cannot_be_reached_from_here_is_not_watched() -> None:
    """A client of Ray's is let in through another door."""
    head = cluster._Head("127.0.0.1:1")
    assert not head.silent and not head.lost


def test_a_door_that_only_opens_is_watched_as_a_door() -> None:
    """Behind TLS nobody answers a greeting in the clear; who listens is all there is to know."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        head = cluster._Head(f"127.0.0.1:{door.getsockname()[1]}")
        assert head._call is cluster._knock and not head.silent
        head.leave()


@pytest.mark.slow
def test_a_head_that_goes_while_it_is_joined_is_given_up(tmp_path: Path) -> None:
    """Ray itself makes twenty tries of 40 s, without a word."""
    with socket.create_server(("127.0.0.1", 0)) as door:  # opens, and nobody is in
        address = f"127.0.0.1:{door.getsockname()[1]}"
        path = sweep_file(tmp_path, base=BASE | {"engine": {"kind": "roofline"}})
        began = time.monotonic()
        done = orchestrate(path, "--out", tmp_path, "--profile", "h100", "--address", address)
    assert done.returncode == 3 and f"no Ray cluster at {address}" in done.stderr
    assert time.monotonic() - began < 90
