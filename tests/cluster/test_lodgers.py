"""Hosts on a cluster that stays: what they leave on its nodes, which nobody else clears."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import own
from tests.integration.harness import TINY, orchestrate, start, sweep_file, until
from workers.actor import HOME
from workers.folders import FRESH_S, Folder

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Address of a cluster of one node, and its place for temporary files."""
    from ray.cluster_utils import Cluster

    temporary = Path(tempfile.mkdtemp(prefix="n"))  # short: sockets lie in it
    with monkeypatch.context() as there:
        there.setenv("TMPDIR", str(temporary))
        there.setenv("RAY_TMPDIR", str(own.temporary()))
        arguments = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 * 2**20}
        arguments["dashboard_port"] = _free_port()  # it does without where another has Ray's own
        fake = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        yield fake.address, temporary
    finally:
        fake.shutdown()
        shutil.rmtree(temporary)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _hosts() -> list[psutil.Process]:
    found = []
    for process in own.processes():
        with suppress(psutil.NoSuchProcess):
            if "EngineHost" in process.name():
                found.append(process)
    return found


def test_a_killed_drivers_files_go_with_the_next_run_and_a_living_hosts_stay(
    tmp_path: Path, node: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, temporary = node
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    neighbour = Folder.begin(HOME)
    os.utime(neighbour.path, (0, 0))
    until(lambda: list(temporary.glob("pymp-*")), 30)  # of Ray's dashboard, which lives on
    others = set(temporary.iterdir())
    earlier = {one.pid for one in _hosts()}
    workload: dict[str, Any] = {"batch_size": 1, "input_tokens": 16, "output_tokens": 30_000}
    path = sweep_file(tmp_path, base=TINY["base"] | {"workload": workload})
    driver = start(path, "--out", tmp_path, "--plain", "--address", address)
    try:
        logs = tmp_path / "tiny" / "logs"
        until(lambda: any("init engine" in one.read_text() for one in logs.glob("*/*.log")))
        hosts = [one for one in _hosts() if one.pid not in earlier]
    finally:
        driver.kill()
        driver.communicate()
    psutil.wait_procs(hosts, 20)
    assert hosts and not any(one.is_running() for one in hosts)
    (left,) = set(temporary.iterdir()) - others
    assert left.name.startswith(HOME)
    inside = {one.name.partition("-")[0] for one in left.iterdir()}
    assert inside == {"g", "pymp"}, "a group's folder and multiprocessing's"

    time.sleep(FRESH_S)
    path = sweep_file(tmp_path)
    done = orchestrate(path, "--out", tmp_path, "--address", address, "--json")
    assert done.returncode == 0, done.stderr
    assert set(temporary.iterdir()) == others
    neighbour.end()
