"""A real autoscaler, of Ray's provider that starts nodes as processes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster import Changes, Cluster
from orchestrator.events import Need

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(280)]

HEAD_TYPE = "ray.head.default"
HEAD = "f" * 51 + "00000"
"""Type and id that the provider expects of the head."""
COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "initialization_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head without devices, and an autoscaler that may add two nodes of 8 GPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="moe-scale-"))  # short: sockets lie in it
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD,
        },
        "auth": {"ssh_user": "nobody"},
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 8, "GPU": 8, "object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
                "labels": {"device-class": "h100"},
            },
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
        "head_node": {},
        "worker_nodes": {},
        **dict.fromkeys(COMMANDS, ()),
    }
    (folder / "cluster.json").write_text(json.dumps(config))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "1")
    settings = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")),
            *("start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}"),
            *("--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"),
            *(f"--autoscaling-config={folder / 'cluster.json'}", "--object-store-memory=83886080"),
        ],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _until_it_listens(port)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
        for process in psutil.process_iter(["cmdline"]):
            if str(folder) in " ".join(process.info["cmdline"] or ()):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            time.sleep(5)  # the head registers its own node after its port is open
            return
    raise AssertionError("no head came up")


def test_nodes_come_when_they_are_asked_for(address: str) -> None:
    with Cluster.connect(address) as cluster:
        assert cluster.autoscaling and cluster.nodes == ()
        for needs in ((Need(8, None, 1),), (Need(8, "h100", 2),)):
            cluster.request(needs)
            deadline = time.monotonic() + 90
            while (found := cluster.changes()) == Changes():
                assert time.monotonic() < deadline, "no node came"
                time.sleep(0.2)
            (node,) = found.joined
            assert (node.devices, node.device_class, node.cpu_only) == (8, "h100", False)
        assert len(cluster.nodes) == 2
        cluster.request(())
