"""The Ray cluster: one that runs already, or one of our own for the length of a sweep.

Ours leaves nothing behind. Its session lives in a folder that is removed with it, its
dashboard stays off, its object store is small (records are kilobytes), and what Ray
prints goes to the driver's log, because a table that is redrawn four times a second
cannot share a terminal.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import psutil

from orchestrator.carried import Carried, carried
from orchestrator.errors import ClusterError, HeadLost
from orchestrator.events import Need, Node
from orchestrator.signals import deaf, keeping_sigterm
from workers.folders import Folder, clear
from workers.hardware import nvml
from workers.hardware.device import CPU
from workers.hardware.fitness import unfit
from workers.hardware.host import Host, describe
from workers.hardware.occupancy import Occupancy, occupancies
from workers.nursery import USABLE, Nursery

OBJECT_STORE_BYTES = 128 * 2**20
SESSION = "moe-ray-"
"""How folders of clusters of our own begin."""
RAY_SOCKET = len("/session_2026-11-30_20-00-00_000000_4194304/sockets/plasma_store")
"""Length of Ray's longest path of a socket below its folder; those of engines are shorter."""
KNOCK_S = 10.0
"""Wait for a cluster's address to answer at all, seconds."""
DESCRIBE_S = 120.0
"""Wait for every node to describe itself, seconds."""
LOOK_S = 3.0
"""Time between two looks at which nodes there are, seconds."""
HEAD_LOOK_S = 2.0
"""Time between two knocks at the head's door, and longest wait for an answer, seconds."""
HEAD_S = 30.0
"""Time in which no knock was answered, after which the head is gone, seconds: long enough for a
head or a link that comes back. Ray waits for a minute, then ends the driver without a word."""
STARTS = 3
"""Times that a cluster of our own is begun, where its services do not come up in time."""
KILLED_S = 5.0
"""Wait for a process that was killed, seconds."""
TRIES = "RAY_gcs_server_port_wait_time_s"
"""Ray's own variable: how often it tries to join a head (`Node._init_gcs_client`)."""
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client opens HTTP/2: the preface and empty settings."""
STUCK_S = 10.0
"""Time for the driver to hear of it, seconds. By then it waits for the head within Ray, where
nothing can reach it."""
CLASS_LABEL = "device-class"
"""Label of a node that names its class of device, where its driver's name does not."""
WHOLE_NODE = 8
"""Devices up to which a group is asked for on one node, where no larger node is there."""
MOST_BUNDLES = 1_000
"""Bundles in a request: more nodes than these need are never asked for at once."""

_SETTINGS = {
    # Ray runs its workers at niceness 15: everything else on the machine, this driver first,
    # would preempt the engine in the middle of a pass.
    "RAY_worker_niceness": "0",
    # Ray starts a worker per core in advance; a node of ours hosts one process per lane.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Nodes that came and went since the last look."""

    joined: tuple[Node, ...] = ()
    lost: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    """Why some that came are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """What a cluster of our own has on this machine, beside Ray's processes."""

    held: Folder
    nursery: Nursery | None

    @classmethod
    def begin(cls, preloads: Sequence[str]) -> _Session:
        """A new one, after those are removed that killed drivers left."""
        held = Folder.begin(SESSION, RAY_SOCKET)
        nursery = Nursery(preloads, held.path) if preloads and USABLE else None
        return cls(held=held, nursery=nursery)

    @property
    def folder(self) -> Path:
        return self.held.path

    def abandon(self) -> None:
        """Ends it with what Ray has started of it: that names the folder on its command line, or
        has given itself a title of Ray's."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                words = process.cmdline()
                if any(str(self.folder) in word or word.startswith("ray::") for word in words):
                    process.kill()
                    process.wait(KILLED_S)
        self.end()

    def end(self) -> None:
        """Removes the folder and the shared memory that is named after files in it, and what
        killed drivers left since this session began."""
        if self.nursery is not None:
            self.nursery.close()
        self.held.end()
        clear(SESSION)


class _Head:
    """Whether the head of a cluster answers, found out beside whatever waits for it.

    It is only watched if it can be reached from here to begin with: a client of Ray's may be
    let in through another door. An answer is what a gRPC server says to a greeting, since the
    kernel still accepts connections for a process that is stopped or hangs; only behind TLS,
    where nobody answers that greeting, the open door has to do.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._call = _greet
        self.last_words: Callable[[], None] | None = None
        """Ends the process, because nobody else can any more."""
        self._silent_since: float | None = None
        self._heard = threading.Event()
        if not self._answers():
            self._call = _knock
        if self._call is _greet or self._answers():
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def silent(self) -> bool:
        """The last knock was not answered."""
        return self._silent_since is not None

    @property
    def lost(self) -> bool:
        """None was for so long that this is no accident."""
        since = self._silent_since
        return since is not None and time.monotonic() > since + HEAD_S

    def leave(self) -> None:
        """Watches it no more: it is known to be lost, or not needed."""
        self._heard.set()

    def _answers(self) -> bool:
        try:
            self._call(self.address, HEAD_LOOK_S)
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        while not self._heard.wait(HEAD_LOOK_S):
            if self._answers():
                self._silent_since = None
            elif self._silent_since is None:
                self._silent_since = time.monotonic()
            if self.lost and not self._heard.wait(STUCK_S) and self.last_words is not None:
                self.last_words()


@dataclass(slots=True)
class Cluster:
    """A connection to Ray, with what its nodes are."""

    nodes: tuple[Node, ...]
    hosts: dict[str, Host]
    """Node id → machine."""
    driver_node: str | None
    """Node on which this process runs, where it is one of the nodes."""
    occupied: dict[str, Mapping[str, Occupancy]] = field(default_factory=dict)
    """Node id → GPU → what was in use there before this run's first group."""
    refused: dict[str, str] = field(default_factory=dict)
    """Node id → why engines cannot measure on its GPUs; such a node is none of `nodes`."""
    autoscaling: bool = False
    """Nodes can be asked for."""
    carried: Carried | None = None
    """What hosts are given of the driver's environment; null where they inherit it."""
    _present: set[str] = field(default_factory=set)
    """Nodes that are alive, those without a device included."""
    _asked: dict[str, Any] = field(default_factory=dict)
    """New nodes that have not described themselves yet."""
    _looked_at: float = -math.inf
    _engines: bool = True
    """Engines will be built, and not only predictions made."""
    _own: _Session | None = None
    """What goes with a cluster of our own; null if it was there before us."""
    _head: _Head | None = None

    @classmethod
    def connect(
        cls, address: str | None, preloads: Sequence[str] = (), *, engines: bool = True
    ) -> Cluster:
        """Joins the cluster at `address`, else at `RAY_ADDRESS`, else one that runs on this
        machine, else starts one.

        Args:
            address: as Ray takes it; `local` starts one in any case.
            preloads: modules whose import begins meanwhile, where one is started.
            engines: some will be built, so nodes whose GPUs cannot carry any are refused.

        Raises:
            ClusterError: no cluster answers there, its nodes cannot be described, or all of them
                are refused.
        """
        wanted = chosen(address)
        own: _Session | None = None
        given: Carried | None = None
        try:
            if wanted is not None:
                given = carried()
                ray = _join(wanted, given)
            else:
                own, ray = _begin(preloads)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            place = wanted or "this machine"
            raise ClusterError(f"no Ray cluster at {place}: {_first_line(error)}") from error
        cluster = cls(
            nodes=(), hosts={}, driver_node=None, carried=given, _engines=engines, _own=own
        )
        try:
            cluster._describe(ray)
        except BaseException:
            cluster.close()
            raise
        return cluster

    @property
    def session(self) -> Path | None:
        """Folder of a cluster of our own; null if it was there before us."""
        return self._own.folder if self._own is not None else None

    @property
    def alone(self) -> bool:
        """Engines run on the driver's machine, and on no other."""
        there = {node.node_id for node in self.nodes}
        return not self.autoscaling and there == {self.driver_node}

    @property
    def nursery(self) -> str | None:
        """Where hosts on the driver's node find their imports done."""
        nursery = self._own.nursery if self._own is not None else None
        return str(nursery.path) if nursery is not None else None

    @property
    def lost(self) -> bool:
        """Its head is gone; nothing must be asked of Ray any more."""
        return self._head is not None and self._head.lost

    def or_else(self, last_words: Callable[[], None]) -> None:
        """What to do when the head is gone and `changes` is not called, because this process
        waits for it within Ray. Called in another thread; must end the process."""
        if self._head is not None:
            self._head.last_words = last_words

    def look_now(self) -> None:
        """Has the next call of `changes` look, however short ago the last one did."""
        self._looked_at = -math.inf

    def changes(self) -> Changes:
        """Nodes that came and went; looks every `LOOK_S` and never waits for a node.

        Raises:
            HeadLost: the head has not answered for `HEAD_S`.
        """
        head = self._head
        if head is not None and head.lost:
            head.leave()
            raise HeadLost(f"the head of the Ray cluster at {head.address} is gone")
        if time.monotonic() < self._looked_at + LOOK_S or (head is not None and head.silent):
            return Changes()
        self._looked_at = time.monotonic()
        import ray

        alive = _alive(ray)
        lost = tuple(node.node_id for node in self.nodes if node.node_id not in alive)
        self.nodes = tuple(node for node in self.nodes if node.node_id in alive)
        for node_id in alive.keys() - self._present:
            self._asked[node_id] = _describe(node_id)
        self._present = set(alive)
        joined: list[Node] = []
        known = set(self.refused)
        for node_id, answer in list(self._asked.items()):
            if node_id in alive and not ray.wait([answer], timeout=0)[0]:
                continue
            del self._asked[node_id]
            try:
                self.hosts[node_id], self.occupied[node_id] = ray.get(answer)
                joined += self._usable(alive, [node_id])
            except (ray.exceptions.RayError, KeyError):
                continue  # it went again before it could answer
        self.nodes = (*self.nodes, *joined)
        refused = tuple(why for node_id, why in self.refused.items() if node_id not in known)
        return Changes(joined=tuple(joined), lost=lost, refused=refused)

    def request(self, needs: tuple[Need, ...]) -> None:
        """Asks the autoscaler for nodes that carry all of `needs`, and for no others.

        A request stays until the next one, beyond this process too: end with an empty one.
        """
        from ray.autoscaler.sdk import request_resources

        widest = max((node.devices for node in self.nodes), default=WHOLE_NODE)
        bundles: list[dict[str, int]] = []
        labels: list[dict[str, str]] = []
        for need in needs:
            cpu = need.device_class == CPU or any(node.cpu_only for node in self.nodes)
            alone = need.devices <= max(widest, WHOLE_NODE)
            each = need.devices if alone else 1  # what no node holds alone, device by device
            shape = {"CPU": each} if cpu else {"GPU": each, "CPU": each}
            asked = need.device_class not in (None, CPU)
            number = min(MOST_BUNDLES, need.groups * (need.devices // each))
            bundles += [shape] * number
            labels += [{CLASS_LABEL: str(need.device_class)} if asked else {}] * number
        request_resources(
            bundles=bundles[:MOST_BUNDLES], bundle_label_selectors=labels[:MOST_BUNDLES]
        )

    def close(self) -> None:
        """Leaves the cluster; ends it and removes its session if it is ours. One whose head is
        gone cannot be left: Ray ends with this process, which `os._exit` has to end. Ctrl-C does
        not cut it short: it would leave the session's folder, and Ray to the interpreter's end."""
        import ray

        with deaf():
            if self._head is not None and self._own is not None:
                self._head.leave()
            if not self.lost:
                ray.shutdown()
            if self._head is not None:
                self._head.leave()
            if self._own is not None:
                self._own.end()
                self._own = None

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
        alive = _alive(ray)
        if self.session is not None:  # of our own, and of this machine alone
            told = [(describe(), occupancies()) for _ in alive]
        else:
            asked = [_describe(node_id) for node_id in alive]
            try:
                told = ray.get(asked, timeout=DESCRIBE_S)
            except ray.exceptions.RayError as error:
                raise ClusterError(f"a node cannot be described: {_first_line(error)}") from error
        for node_id, (host, occupied) in zip(alive, told, strict=True):
            self.hosts[node_id], self.occupied[node_id] = host, occupied
        self._present = set(alive)
        self.nodes = self._usable(alive, list(alive))
        address = ray.get_runtime_context().gcs_address
        self.autoscaling = _autoscales(address)
        self._head = _Head(address)
        if self.refused and not self.nodes:
            raise ClusterError("; ".join(dict.fromkeys(self.refused.values())))
        if not self.nodes and not self.autoscaling:
            raise ClusterError("the cluster has neither a GPU nor a CPU to offer")
        self.driver_node = ray.get_runtime_context().get_node_id()

    def _usable(
        self, alive: Mapping[str, Mapping[str, Any]], node_ids: list[str]
    ) -> tuple[Node, ...]:
        """Those of `node_ids` that have a device that engines can measure on. Where any node has
        a GPU, only GPUs count."""
        any_gpu = any(node["Resources"].get("GPU") for node in alive.values())
        nodes = []
        for node_id in node_ids:
            resources, host = alive[node_id]["Resources"], self.hosts[node_id]
            gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
            if not (gpus if any_gpu else cpus):
                continue
            if any_gpu and self._engines and (why := unfit(host)) is not None:
                self.refused[node_id] = why
                continue
            known = host.device_class if bool(host.gpus) == any_gpu else None
            nodes.append(
                Node(
                    node_id=node_id,
                    hostname=host.hostname,
                    devices=gpus if any_gpu else cpus,
                    cpu_only=not any_gpu,
                    device_class=alive[node_id]["Labels"].get(CLASS_LABEL) or known,
                )
            )
        return tuple(nodes)


def chosen(address: str | None) -> str | None:
    """The cluster that is joined: the one at `address`, else at `RAY_ADDRESS`, else one that runs
    on this machine; null where one of our own is started."""
    wanted = address or os.environ.get("RAY_ADDRESS") or _running()
    return None if wanted == "local" else wanted


def _alive(ray: ModuleType) -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _describe(node_id: str) -> Any:
    """The answer to come of a node that is asked what it is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from workers.actor import describe_node

    pinned = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    return describe_node.options(scheduling_strategy=pinned).remote()


def _autoscales(gcs_address: str) -> bool:
    """Whether nodes can be asked for: the autoscaler of this cluster runs here with a file
    that says how to start some. Without such a file Ray runs it too, and it only reports. On
    a machine other than the head this cannot be seen, and the cluster counts as fixed."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if f"--gcs-address={gcs_address}" in words and any(
            word.startswith("--autoscaling-config=") and not word.endswith("=") for word in words
        ):
            return True
    return False


def _import_ray() -> ModuleType:
    """Ray, told to be quiet before it is imported: it reads these once."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update(nvml.ORDER)
    import ray

    return ray


def _begin(preloads: Sequence[str]) -> tuple[_Session, ModuleType]:
    """A cluster of our own. Ray gives its services 30 s, which a crowded machine exceeds while it
    reads their modules for the first time; then everything is put away and begun anew.

    Raises:
        TimeoutError: not at the last try either.
    """
    for left in reversed(range(STARTS)):
        own = _Session.begin(preloads)
        try:
            return own, _start(own.folder)
        except BaseException as error:
            with deaf():
                own.abandon()
            if type(error) is not Exception:  # Ray has no class for this one
                raise
            if not left:
                raise TimeoutError(f"{_first_line(error)} Tried {STARTS} times") from error
    raise AssertionError


def _start(session: Path) -> ModuleType:
    # An address in the environment would turn this into a connection to it. The token is for
    # this cluster alone; without one in the environment Ray writes one into the home folder.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = _import_ray()
    # What Ray starts puts its temporary files into the session too: processes that are killed
    # do not remove theirs.
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(session)
    try:
        with keeping_sigterm():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(session),
            )
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
    return ray


def _join(address: str, given: Carried) -> ModuleType:
    import workers

    _knock(address)
    package = Path(next(iter(workers.__path__)))
    ray = _import_ray()
    # A head that goes between knock and greeting: each try waits for it for 40 s, and Ray makes 20.
    unset = TRIES not in os.environ
    os.environ.setdefault(TRIES, "1")
    try:
        with keeping_sigterm():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                runtime_env={"py_modules": [str(package)], "env_vars": dict(given.settings)},
            )
    finally:
        if unset:
            del os.environ[TRIES]
    return ray


def _knock(address: str, patience_s: float = KNOCK_S) -> None:
    """Raises OSError if nothing listens at `host:port`; Ray itself would try for minutes."""
    if where := _socket_address(address):
        socket.create_connection(where, timeout=patience_s).close()


def _greet(address: str, patience_s: float) -> None:
    """Raises OSError unless the gRPC server at `host:port` returns a greeting: each side of an
    HTTP/2 connection opens with its settings (RFC 9113, 3.4)."""
    if where := _socket_address(address):
        with socket.create_connection(where, timeout=patience_s) as line:
            line.sendall(GREETING)
            if not line.recv(1):
                raise ConnectionError(f"{address} hung up")


def _socket_address(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    known = host and port.isdecimal() and "/" not in host
    return (host.strip("[]"), int(port)) if known else None


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
