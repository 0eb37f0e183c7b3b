"""The Ray cluster: one that runs already, or one of our own for the length of a sweep.

Ours leaves nothing behind. Its session lives in a folder that is removed with it, its
dashboard stays off, its object store is small (records are kilobytes), and what Ray
prints goes to the driver's log, because a table that is redrawn four times a second
cannot share a terminal.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType

from orchestrator.errors import ClusterError
from orchestrator.schedule import Node
from workers import memory
from workers.hardware.host import Host

OBJECT_STORE_BYTES = 128 * 2**20
KNOCK_S = 10.0
"""Wait for a cluster's address to answer at all, seconds."""
DESCRIBE_S = 120.0
"""Wait for every node to describe itself, seconds."""

_SETTINGS = {
    # Ray runs its workers at niceness 15: everything else on the machine, this driver first,
    # would preempt the engine in the middle of a pass.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@dataclass(slots=True)
class Cluster:
    """A connection to Ray, with what its nodes are."""

    nodes: tuple[Node, ...]
    hosts: dict[str, Host]
    """Node id → machine."""
    driver_node: str | None
    """Node on which this process runs, where it is one of the nodes."""
    session: Path | None
    """Folder of a cluster of our own; null if it was there before us."""

    @classmethod
    def connect(cls, address: str | None) -> Cluster:
        """Joins the cluster at `address`, else at `RAY_ADDRESS`, else one that runs on this
        machine, else starts one.

        Raises:
            ClusterError: no cluster answers there, or its nodes cannot be described.
        """
        wanted = address or os.environ.get("RAY_ADDRESS") or _running()
        session = None
        try:
            if wanted and wanted != "local":
                ray = _join(wanted)
            else:
                session = Path(tempfile.mkdtemp(prefix="moe-ray-"))
                ray = _start(session)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            if session is not None:
                shutil.rmtree(session, ignore_errors=True)
            place = wanted or "this machine"
            raise ClusterError(f"no Ray cluster at {place}: {_first_line(error)}") from error
        cluster = cls(nodes=(), hosts={}, driver_node=None, session=session)
        try:
            cluster._describe(ray)
        except BaseException:
            cluster.close()
            raise
        return cluster

    def close(self) -> None:
        """Leaves the cluster; ends it and removes its session if it is ours."""
        import ray

        ray.shutdown()
        if self.session is not None:
            memory.sweep_shared(self.session)
            shutil.rmtree(self.session, ignore_errors=True)
            self.session = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _describe(self, ray: ModuleType) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from workers.actor import describe_node

        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        asked = {
            node_id: describe_node.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            ).remote()
            for node_id in alive
        }
        try:
            hosts: list[Host] = ray.get(list(asked.values()), timeout=DESCRIBE_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"a node cannot be described: {_first_line(error)}") from error
        self.hosts = dict(zip(asked, hosts, strict=True))
        gpus = {node_id: int(resources.get("GPU", 0)) for node_id, resources in alive.items()}
        any_gpu = any(gpus.values())
        self.nodes = tuple(
            Node(
                node_id=node_id,
                hostname=self.hosts[node_id].hostname,
                devices=gpus[node_id] if any_gpu else int(resources.get("CPU", 0)),
                cpu_only=not any_gpu,
            )
            for node_id, resources in alive.items()
            if (gpus[node_id] if any_gpu else resources.get("CPU", 0))
        )
        if not self.nodes:
            raise ClusterError("the cluster has neither a GPU nor a CPU to offer")
        self.driver_node = ray.get_runtime_context().get_node_id()


def _import_ray() -> ModuleType:
    """Ray, told to be quiet before it is imported: it reads these once."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


def _start(session: Path) -> ModuleType:
    # An address in the environment would turn this into a connection to it. The token is for
    # this cluster alone; without one in the environment Ray writes one into the home folder.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = _import_ray()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(session),
    )
    return ray


def _join(address: str) -> ModuleType:
    import workers

    _knock(address)
    package = Path(next(iter(workers.__path__)))
    ray = _import_ray()
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
        runtime_env={"py_modules": [str(package)]},
    )
    return ray


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def _running() -> str | None:
    """Address of the cluster that `ray start` left running on this machine.

    It is the one that Ray's own `address="auto"` would take. Clusters that another program
    started for itself are not written there: they end with it.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        address = file.read_text().strip()
        _knock(address)
    except OSError:
        return None
    return address


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
