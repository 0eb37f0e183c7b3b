"""Who may reach the Ray that a local run starts: nobody without its token, and from nowhere
by way of a dashboard.

Ray's services listen on every interface, so on a shared machine the token is what stands
between a neighbour and a shell of ours: whoever is let in may run code.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster import Cluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(280),
]

LOOK = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)), "nodes seen")
"""
RUN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "code was run").remote()))
"""


@pytest.fixture(scope="module")
def gcs() -> Iterator[str]:
    """Address of a cluster that `Cluster` started for this process."""
    with Cluster.connect("local"):
        import ray

        yield ray.get_runtime_context().gcs_address


def _client(
    program: str, address: str, home: Path, **token: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", program, address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"} | token,
    )


def test_the_holder_of_the_token_is_let_in(gcs: str, tmp_path: Path) -> None:
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    assert _client(LOOK, gcs, tmp_path, **right).stdout == "1 nodes seen\n"
    assert "code was run" in _client(RUN, gcs, tmp_path, **right).stdout


@pytest.mark.parametrize(
    "token",
    [
        {},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ],
    ids=["nothing said", "disabled", "wrong token"],
)
def test_nobody_else_sees_or_runs_anything(gcs: str, tmp_path: Path, token: dict[str, str]) -> None:
    seen = _client(LOOK, gcs, tmp_path, **token)
    assert seen.returncode != 0 and "nodes seen" not in seen.stdout
    assert "UNAUTHENTICATED" in seen.stderr or "oken" in seen.stderr, seen.stderr
    if not token:
        with suppress(subprocess.TimeoutExpired):  # refused over and over is refused, too
            ran = _client(RUN, gcs, tmp_path)
            assert ran.returncode != 0 and "code was run" not in ran.stdout


def test_there_is_no_dashboard_and_its_agent_takes_no_job(gcs: str) -> None:
    """The agent of a node can start jobs on request; it must ask for the token as well."""
    family = psutil.Process().children(recursive=True)
    lines = [" ".join(one.cmdline()) for one in family]
    assert any("gcs_server" in line for line in lines), "these are Ray's processes"
    for line in lines:  # what is left of it counts usage, which is off
        if "dashboard/dashboard.py" in line:
            assert "--host=127.0.0.1" in line and "--disable-frontend" in line

    answered = {}
    for process in family:
        with suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    for path in ("/api/job_agent/jobs/", "/api/jobs/", "/api/version"):
                        answered[socket.laddr.port, path] = _post(socket.laddr.port, path)
    assert answered, "something listens"
    assert not {key for key, status in answered.items() if status is not None and status < 300}


def _post(port: int, path: str) -> int | None:
    """Status of a job that is submitted without a token; null where no HTTP is spoken."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        body = '{"entrypoint": "true"}'
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (http.client.HTTPException, OSError):
        return None
    finally:
        connection.close()
