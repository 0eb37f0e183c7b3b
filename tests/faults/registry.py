"""Every fault that `inject.py` knows: the sweep, the moment, the blow, what must come of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import psutil

from tests.faults.scene import LONGEST_S, ROOT, Expected, Fault, Scene, kill
from tests.integration.harness import TINY, until

REAL: dict[str, Any] = TINY | {
    "base": TINY["base"]
    | {
        "workload": {"batch_size": 1, "input_tokens": 16, "output_tokens": 128},
        "measure": {"repeats": 2},
    },
    "grid": {"model.num_experts": [8, 4], "workload.batch_size": [1, 2, 3]},
}
"""Two engines, three trials on each: about 20 s."""
SHORT = REAL | {"grid": {"model.num_experts": [4], "workload.batch_size": [1, 2]}}
"""One engine, two trials: about 15 s."""
SLOW = SHORT | {
    "base": REAL["base"]
    | {
        "workload": {"batch_size": 2, "input_tokens": 16, "output_tokens": 800},
        "measure": {"repeats": 2},
    },
    "grid": {"model.num_experts": [8, 4]},
}
"""Two engines, one trial of some eight seconds on each."""
RANKS = SLOW | {
    "base": SLOW["base"]
    | {
        "layout": {"tensor": 2},
        "workload": {"batch_size": 1, "input_tokens": 16, "output_tokens": 200},
    },
    "grid": {"model.num_experts": [4]},
}
"""One engine of two ranks, one trial."""
REPLICAS = RANKS | {
    "base": RANKS["base"]
    | {
        "layout": {"data": 2},
        "workload": {"batch_size": 3, "input_tokens": 16, "output_tokens": 200},
    },
    "grid": {"model.num_experts": [8, 4]},
}
"""Two engines of two replicas, one trial on each."""
HANGING = SLOW | {
    "base": SLOW["base"]
    | {
        "workload": {"batch_size": 2, "input_tokens": 16, "output_tokens": 800},
        "measure": {"repeats": 2, "timeout_s": 10},
    }
}
"""The same, where silence is not waited for any longer than it must."""
PACED: dict[str, Any] = {
    "name": "paced",
    "base": {
        "model": {"name": "mixtral-8x7b", "weights": "dummy"},
        "layout": {"tensor": 2},
        "workload": {"batch_size": 1, "input_tokens": 512},
        "engine": {"kind": "roofline", "args": {"pace": 0.01}},
    },
    "grid": {
        "model.num_layers": [8, 12, 16, 20],
        "workload.output_tokens": [2000, 4000, 6000, 8000],
    },
}
"""Four engines that only predict, four trials on each: about 9 s of waiting."""
LONG = PACED | {
    "base": PACED["base"] | {"engine": {"kind": "roofline", "args": {"pace": 0.04}}},
    "grid": PACED["grid"] | {"model.num_layers": [8, 12, 16]},
}
"""Three of them, at a quarter of the speed."""
H100 = ("--profile", "h100")
CASES = TINY | {
    "base": TINY["base"]
    | {
        "workload": {"batch_size": 2, "input_tokens": 16, "output_tokens": 32},
        "measure": {"repeats": 2},
    },
    "cases": [
        {"engine.memory_limit_gib": 1.0},
        {"engine.memory_limit_gib": 0.005},
        {"engine.args.kv_cache_memory_bytes": 1000},
        {"engine.args.no_such_argument": 1},
        {"model.top_k": 16},
        {"measure.timeout_s": 0.001},
        {"layout.pipeline": 2},
        {"layout.tensor": 2, "layout.expert": True},
        *(
            {
                "measure.warmup": warmup,
                "engine.memory_limit_gib": 0.06,
                "workload.batch_size": 16,
                "workload.input_tokens": 1024,
                "engine.args.max_num_batched_tokens": 16384,
            }
            for warmup in (0, 1)
        ),
    ],
}
"""Engines that fail by themselves, one in each way, and one that does not."""


# --- the driver


def nothing(scene: Scene) -> None:
    """For comparison."""


def _any_moment(scene: Scene) -> None:
    assert scene.length_s is not None
    scene.sleep(0.0, scene.length_s)


def killed_driver(scene: Scene) -> None:
    _any_moment(scene)
    scene.driver.kill()


def killed_driver_of_ranks(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(0.0, 2.0)
    scene.driver.kill()


def interrupted(scene: Scene) -> None:
    _any_moment(scene)
    scene.driver.send_signal(signal.SIGINT)


def interrupted_twice(scene: Scene) -> None:
    interrupted(scene)
    scene.sleep(0.05, 1.0)
    scene.driver.send_signal(signal.SIGINT)


def terminated(scene: Scene) -> None:
    _any_moment(scene)
    scene.driver.send_signal(signal.SIGTERM)


def interrupted_early(scene: Scene) -> None:
    _while_ray_begins(scene)
    scene.driver.send_signal(signal.SIGINT)


def terminated_early(scene: Scene) -> None:
    _while_ray_begins(scene)
    scene.driver.send_signal(signal.SIGTERM)


def _while_ray_begins(scene: Scene) -> None:
    scene.sleep(2.0, 10.0)


AT_ANY_MOMENT = (killed_driver, interrupted, interrupted_twice, terminated)
"""Faults whose moment is drawn from the whole length of a run."""


def second_driver(scene: Scene) -> None:
    scene.committed()
    began = time.monotonic()
    second = subprocess.run(
        scene.command(),
        cwd=scene.cwd,
        env=scene.environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    scene.notes.append(f"the second ended after {time.monotonic() - began:.1f} s")
    if second.returncode != 2 or second.stderr.count("\n") != 1:
        scene.wrong.append(f"the second: status {second.returncode}, {second.stderr[-500:]!r}")
    if f"is in use by process {scene.driver.pid}" not in second.stderr:
        scene.wrong.append(f"the second says {second.stderr!r}")


DAY = 86_400


def clocks_jump(scene: Scene) -> None:
    scene.committed()
    for jump in (DAY, -2 * DAY, 3 * 3600, -400 * DAY, 0):
        _clock(scene).write_text(str(jump))
        time.sleep(0.8)
        if scene.driver.poll() is not None:
            scene.notes.append("not all jumps came in time")
            break


def clock_jumps_before_the_resume(scene: Scene) -> None:
    _clock(scene).write_text(str(-9 * DAY))


def _clock(scene: Scene) -> Path:
    return scene.folder / "clock"


@contextmanager
def movable_clock(scene: Scene) -> Iterator[None]:
    """A wall clock of Python that can be moved while everything runs."""
    library = scene.folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotHere("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    _clock(scene).write_text("0")
    scene.environment |= {"LD_PRELOAD": str(library), "MOE_CLOCK": str(_clock(scene))}
    yield


def moved(scene: Scene, frame: pl.DataFrame) -> Iterator[str]:
    if not any(abs(one.timestamp() - time.time()) > DAY / 2 for one in frame["finished_at"]):
        yield "the clock of the records did not move"


class NotHere(Exception):
    """A fault that this machine does not let anybody inject."""


# --- the processes of an engine


def killed_engine_in_load(scene: Scene) -> None:
    scene.loading()
    engine = scene.engine()
    scene.sleep(0.0, 0.6)
    kill(engine)


def killed_engine(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(0.7, 3.0)
    kill(scene.engine())


def killed_replica(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(0.3, 2.0)
    children = scene.engine().children()
    kill(scene.rng.choice([one for one in children if "tracker" not in " ".join(one.cmdline())]))


def killed_server(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(0.5, 2.0)
    kill(scene.forks()[0])


def killed_host(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(0.7, 3.0)
    kill(scene.host())


def killed_host_in_load(scene: Scene) -> None:
    scene.loading()
    scene.sleep(0.0, 0.6)
    kill(scene.host())


def stopped_engine_in_load(scene: Scene) -> None:
    scene.loading()
    engine = scene.engine()
    scene.sleep(0.0, 0.3)
    kill(engine, signal.SIGSTOP)


def stopped_engine(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(1.0, 2.0)
    kill(scene.engine(), signal.SIGSTOP)


def stopped_host(scene: Scene) -> None:
    scene.measuring()
    scene.sleep(1.0, 2.0)
    kill(scene.host(), signal.SIGSTOP)


def told_by_the_engine(scene: Scene, frame: pl.DataFrame) -> Iterator[str]:
    """Memory that runs out in a pass leaves enough to write the record with."""
    late = frame.filter(pl.col("oom_stage").is_in(["warmup", "run"]))
    if late["engine_load_s"].null_count():
        yield "the driver had to write the record of an engine that ran out of memory"


@contextmanager
def crowded_memory(scene: Scene) -> Iterator[None]:
    """Ray's memory monitor, with a threshold a little above what is in use."""
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + 1.6 * 2**30) / memory.total
    scene.environment |= {"RAY_memory_usage_threshold": f"{share:.4f}"}
    scene.notes.append(f"threshold {share:.2f}")
    yield


@contextmanager
def full_memory(scene: Scene) -> Iterator[None]:
    """Ray's memory monitor, with a threshold below what is in use without this run."""
    scene.environment |= {"RAY_memory_usage_threshold": "0.01"}
    yield


def roomy_memory(scene: Scene) -> None:
    del scene.environment["RAY_memory_usage_threshold"]


# --- the disk


@contextmanager
def small_disk(scene: Scene) -> Iterator[None]:
    """A disk of 24 MiB under the output folder."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "moe-fault", str(scene.out)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NotHere(f"no disk can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(scene.out)], check=True)


@contextmanager
def read_only_disk(scene: Scene) -> Iterator[None]:
    with small_disk(scene):
        _remount(scene, "ro")
        yield


def _remount(scene: Scene, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(scene.out)], check=True)


def writable_again(scene: Scene) -> None:
    _remount(scene, "rw")


def fill_the_disk(scene: Scene) -> None:
    scene.committed()
    scene.sleep(0.0, 3.0)
    with (scene.out / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def empty_the_disk(scene: Scene) -> None:
    (scene.out / "ballast").unlink()


def no_more_files(scene: Scene) -> None:
    """Even root makes no file in a folder that cannot be changed."""
    scene.committed()
    scene.sleep(0.0, 3.0)
    _immutable(scene, "+i")


def files_again(scene: Scene) -> None:
    _immutable(scene, "-i")


def _immutable(scene: Scene, how: str) -> None:
    for folder in (scene.dataset / ".staging", scene.dataset / "records"):
        subprocess.run(["chattr", how, str(folder)], check=True)


@contextmanager
def changeable(scene: Scene) -> Iterator[None]:
    if shutil.which("chattr") is None:
        raise NotHere("no chattr")
    try:
        yield
    finally:
        with suppress(subprocess.CalledProcessError):
            files_again(scene)


def killed_with_some(scene: Scene) -> None:
    scene.committed(4)
    scene.sleep(0.0, 2.0)
    scene.driver.kill()


def spoil(scene: Scene) -> None:
    """What crashes, broken disks and people do to a folder."""
    files = sorted((scene.dataset / "records").glob("*.arrow"))
    whole = files[0].read_bytes()
    torn = bytearray(whole)
    middle = len(whole) // 2
    torn[middle - 300 : middle + 300] = bytes(600)
    strangers: dict[str, bytes] = {
        "records/torn.arrow": bytes(torn),
        "records/cut.arrow": whole[: scene.rng.randrange(1, len(whole))],
        "records/empty.arrow": b"",
        "records/notes.txt": b"do not forget the milk",
        "records/.DS_Store": b"\0",
        "records/text.arrow": b"trial_id,outcome\n1,ok\n",
        "samples/of-records.arrow": whole,
        ".staging/records-half.arrow": whole[:100],
        ".manifest.json.new": b"{",
    }
    for name, content in strangers.items():
        (scene.dataset / name).write_bytes(content)
    files[-1].write_bytes(files[-1].read_bytes()[:-20])  # of value, and gone
    (log,) = scene.dataset.glob("logs/*/events.jsonl")
    log.write_bytes(log.read_bytes()[:-15])


def set_aside(scene: Scene, frame: pl.DataFrame) -> Iterator[str]:
    found = sorted(one.name for one in (scene.dataset / "quarantine").iterdir())
    if len(found) != 8:
        yield f"{len(found)} files set aside: {found}"
    if list((scene.dataset / ".staging").iterdir()):
        yield "something is left in .staging"


def tear_the_manifest(scene: Scene) -> None:
    path = scene.dataset / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])
    scene.start()
    status, said = scene.end(), scene.said()
    if status != 2 or "move it away to go on" not in said:
        scene.wrong.append(f"a torn manifest: status {status}, {said[-300:]}")
    path.unlink()


# --- another version on the nodes


@contextmanager
def own_copy(scene: Scene) -> Iterator[None]:
    """The project in a folder of its own, where it can be changed under a driver."""
    scene.cwd = scene.folder / "code"
    for name in ("orchestrator", "workers"):
        shutil.copytree(ROOT / name, scene.cwd / name, ignore=shutil.ignore_patterns("__pycache__"))
    yield


def newer_workers(scene: Scene) -> None:
    """The code changes after the driver has read it and before its hosts do."""
    scene.until(lambda: (scene.dataset / "logs" / "driver.log").exists())
    path = scene.cwd / "workers/contract/record.py"
    text = path.read_text()
    (scene.folder / "record.py").write_text(text)
    if scene.seed % 2:
        text = text.replace("SCHEMA_VERSION = 1", "SCHEMA_VERSION = 2")
    else:
        text = text.replace(
            '    ("sweep", _STR', '    ("new_column", _STR, "New."),\n    ("sweep", _STR', 1
        )
    assert text != path.read_text()
    path.write_text(text)
    scene.notes.append("another number" if scene.seed % 2 else "another column")


def older_workers(scene: Scene) -> None:
    (scene.folder / "record.py").replace(scene.cwd / "workers/contract/record.py")


def one_version(scene: Scene, frame: pl.DataFrame) -> Iterator[str]:
    versions = set(frame["schema_version"])
    if versions != {1}:
        yield f"records of versions {versions} in one dataset"


# --- a cluster


class Nodes:
    """A head without devices and two nodes, each as processes on this machine."""

    def __init__(self, scene: Scene, **resources: Any) -> None:
        os.environ["RAY_TMPDIR"] = str(scene.folder / "r")
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        from ray.cluster_utils import Cluster

        store = {"object_store_memory": 80 * 2**20}
        head: dict[str, Any] = {"num_gpus": 0, "num_cpus": 0, **store}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(**resources, **store) for _ in range(2)]

    def raylet(self, number: int) -> psutil.Process:
        (found,) = self.nodes[number].all_processes["raylet"]
        return psutil.Process(found.process.pid)


@contextmanager
def two_gpu_nodes(scene: Scene) -> Iterator[None]:
    with _two_nodes(scene, num_gpus=2, num_cpus=4):
        yield


@contextmanager
def two_cpu_nodes(scene: Scene) -> Iterator[None]:
    with _two_nodes(scene, num_cpus=2):
        yield


@contextmanager
def _two_nodes(scene: Scene, **resources: Any) -> Iterator[None]:
    (scene.folder / "r").mkdir()
    os.environ["MOE_FAULT"] = scene.word
    nodes = Nodes(scene, **resources)
    scene.shared_cluster = True
    scene.nodes = nodes
    scene.arguments += ["--address", nodes.cluster.address]
    try:
        yield
    finally:
        nodes.cluster.shutdown()
        del os.environ["MOE_FAULT"]


def killed_raylet(scene: Scene) -> None:
    scene.committed()
    scene.sleep(0.0, 1.0)
    _kill_a_busy_node(scene)


def lost_node(scene: Scene) -> None:
    scene.committed()
    scene.sleep(0.0, 1.0)
    for number in range(2):
        raylet = scene.nodes.raylet(number)
        below = raylet.children(recursive=True)
        if any("EngineHost" in " ".join(one.cmdline()) for one in below):
            for one in (raylet, *below):
                with suppress(psutil.NoSuchProcess):
                    one.suspend()  # as one: nobody sees another die
            for one in (raylet, *below):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            return
    scene.wrong.append("no node with a host")


def killed_raylet_of_an_engine(scene: Scene) -> None:
    scene.engine()  # its log is its node's, so nothing tells here when it is built
    scene.sleep(5.0, 8.0)
    _kill_a_busy_node(scene)


def _kill_a_busy_node(scene: Scene) -> None:
    """The raylet of a node on which a host works."""
    for number in range(2):
        raylet = scene.nodes.raylet(number)
        below = raylet.children(recursive=True)
        if hosts := [one for one in below if "EngineHost" in " ".join(one.cmdline())]:
            family = [*hosts, *(child for host in hosts for child in host.children(recursive=True))]
            began = time.monotonic()
            kill(raylet)
            while any(one.is_running() and one.status() != "zombie" for one in family):
                if time.monotonic() > began + 40:
                    left = [" ".join(one.cmdline())[:60] for one in family if one.is_running()]
                    scene.wrong.append(f"40 s after its node, a host's process lives: {left}")
                    break
                time.sleep(0.1)
            else:
                took = time.monotonic() - began
                scene.notes.append(f"processes of the node gone after {took:.1f} s")
            return
    scene.wrong.append("no node with a host")


def once_each(scene: Scene, frame: pl.DataFrame) -> Iterator[str]:
    """The host lives on for a while and may end its group; else another does."""
    scene.notes.append(f"attempts {sorted(set(frame['attempt']))}")
    if frame.height != frame["trial_id"].n_unique():
        yield "a retried trial has more than one record"


def tried_again(scene: Scene, frame: pl.DataFrame) -> Iterator[str]:
    if frame.height != frame["trial_id"].n_unique():
        yield "a retried trial has more than one record"
    if frame["attempt"].max() not in (2, 3):
        yield f"attempts are {sorted(frame['attempt'])}"


class Head:
    """`ray start --head` on a port and in a folder of the scene's own."""

    def __init__(self, scene: Scene) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = scene.folder / "h"
        self.environment = {**os.environ, "MOE_FAULT": scene.word}
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = ["start", "--head", "--block", f"--port={self.port}", "--num-cpus=2"]
        words += [f"--temp-dir={self.folder}", "--include-dashboard=false", "--num-gpus=0"]
        words += ["--object-store-memory=83886080"]
        subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(self._listens, 60)
        time.sleep(3)  # its own node is registered after the port is open

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def processes(self, word: str = "") -> list[psutil.Process]:
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                line = " ".join(one.cmdline())
                if str(self.folder) in line and word in line and one.pid != os.getpid():
                    found.append(one)
        return found

    def kill(self, word: str = "") -> None:
        for one in self.processes(word):
            with suppress(psutil.NoSuchProcess):
                one.kill()


@contextmanager
def head(scene: Scene) -> Iterator[None]:
    scene.shared_cluster = True
    scene.nodes = Head(scene)
    scene.arguments += ["--address", scene.nodes.address]
    try:
        yield
    finally:
        scene.nodes.kill()


BLOWS = (
    ("", psutil.Process.kill, "all its processes killed"),
    ("gcs_server", psutil.Process.kill, "its GCS killed"),
    ("gcs_server", psutil.Process.suspend, "its GCS stopped"),
)


def lost_head(scene: Scene) -> None:
    scene.committed()
    scene.sleep(0.0, 1.5)
    word, blow, what = BLOWS[scene.seed % len(BLOWS)]
    scene.notes.append(what)
    began = time.monotonic()
    for process in scene.nodes.processes(word):
        with suppress(psutil.NoSuchProcess):
            blow(process)
    status = scene.end(200)
    scene.notes.append(f"the driver ended with {status} after {time.monotonic() - began:.0f} s")
    scene.notes.append(f"it said last: {scene.said().strip().splitlines()[-1:]}")


def head_again(scene: Scene) -> None:
    scene.nodes.kill()
    time.sleep(1)
    scene.nodes.start()


SIGKILLED = -signal.SIGKILL
CRASHED = Expected(outcome="crashed", reason="SIGKILL")

FAULTS = {
    one.name: one
    for one in (
        Fault(name="none", what="nothing, for comparison", sweep=REAL, inject=nothing, times=1),
        Fault(
            name="driver-killed",
            what="SIGKILL of the driver at any moment",
            sweep=REAL,
            inject=killed_driver,
            status=(0, SIGKILLED),
            times=20,
        ),
        Fault(
            name="driver-killed-ranks",
            what="SIGKILL of the driver, two tensor-parallel ranks measuring",
            sweep=RANKS,
            inject=killed_driver_of_ranks,
            status=(SIGKILLED,),
        ),
        Fault(
            name="driver-killed-replicas",
            what="SIGKILL of the driver, two data-parallel replicas measuring",
            sweep=REPLICAS,
            inject=killed_driver_of_ranks,
            status=(SIGKILLED,),
        ),
        Fault(
            name="interrupted",
            what="SIGINT of the driver at any moment",
            sweep=REAL,
            inject=interrupted,
            status=(0, 130),
            says="goes on where this one stopped|interrupted before the first trial|6 of 6",
        ),
        Fault(
            name="interrupted-twice",
            what="SIGINT twice, less than a second apart",
            sweep=REAL,
            inject=interrupted_twice,
            status=(0, 130),
            says="goes on where this one stopped|interrupted before the first trial|6 of 6",
        ),
        Fault(
            name="terminated",
            what="SIGTERM of the driver at any moment",
            sweep=REAL,
            inject=terminated,
            status=(0, 130, -signal.SIGTERM),  # the last one before anything was started
            says="goes on where this one stopped|interrupted before the first trial|6 of 6",
        ),
        Fault(
            name="interrupted-early",
            what="SIGINT of the driver while it starts Ray",
            sweep=PACED,
            arguments=H100,
            inject=interrupted_early,
            times=5,
            status=(0, 130),
            says="goes on where this one stopped|interrupted before the first trial|16 of 16",
        ),
        Fault(
            name="terminated-early",
            what="SIGTERM of the driver while it starts Ray",
            sweep=PACED,
            arguments=H100,
            inject=terminated_early,
            times=5,
            status=(0, 130),
            says="goes on where this one stopped|interrupted before the first trial|16 of 16",
        ),
        Fault(
            name="engine-killed-load",
            what="SIGKILL of the engine's process while it is built",
            sweep=SHORT,
            inject=killed_engine_in_load,
            expected=[Expected(outcome="crashed", reason="SIGKILL")],
            status=(1,),
        ),
        Fault(
            name="engine-killed",
            what="SIGKILL of the engine's process while it measures",
            sweep=SLOW,
            inject=killed_engine,
            expected=[CRASHED],
            status=(1,),
        ),
        Fault(
            name="engine-killed-replicas",
            what="SIGKILL of the engine's process, two replicas of its measuring",
            sweep=REPLICAS,
            inject=killed_engine,
            expected=[CRASHED],
            status=(1,),
        ),
        Fault(
            name="replica-killed",
            what="SIGKILL of one of two replicas while they measure",
            sweep=REPLICAS,
            inject=killed_replica,
            expected=[Expected(outcome="crashed", reason="replica [01] died: SIGKILL")],
            status=(1,),
        ),
        Fault(
            name="server-killed",
            what="SIGKILL of the fork server while its fork measures",
            sweep=SLOW,
            inject=killed_server,
            expected=[Expected(outcome="crashed", reason="died", least=0)],
            status=(0, 1),
        ),
        Fault(
            name="host-killed-load",
            what="SIGKILL of the host actor while the engine is built",
            sweep=SHORT,
            inject=killed_host_in_load,
            expected=[Expected(outcome="crashed", reason="died", most=2)],
            status=(1,),
        ),
        Fault(
            name="host-killed",
            what="SIGKILL of the host actor while the engine measures",
            sweep=SLOW,
            inject=killed_host,
            expected=[Expected(outcome="crashed", reason="died")],
            status=(1,),
        ),
        Fault(
            name="engine-stopped-load",
            what="SIGSTOP of the engine's process while it is built",
            sweep=HANGING,
            inject=stopped_engine_in_load,
            expected=[Expected(outcome="timeout", reason="building the engine said nothing")],
            status=(1,),
        ),
        Fault(
            name="engine-stopped",
            what="SIGSTOP of the engine's process while it measures",
            sweep=HANGING,
            inject=stopped_engine,
            expected=[Expected(outcome="timeout", reason="the trial said nothing")],
            status=(1,),
        ),
        Fault(
            name="engine-hangs",
            what="the same with a deadline of half an hour: the prediction ends it",
            sweep=SLOW,
            inject=stopped_engine,
            expected=[Expected(outcome="timeout", reason="the trial said nothing")],
            status=(1,),
            times=1,
        ),
        Fault(
            name="host-stopped",
            what="SIGSTOP of the host actor while the engine measures",
            sweep=HANGING,
            inject=stopped_host,
            expected=[Expected(outcome="timeout", reason="said nothing")],
            status=(1,),
            times=1,
        ),
        Fault(
            name="engines-fail",
            what="engines that fail by themselves: memory at load, KV cache, memory in a pass, "
            "refusal, contradiction, deadline, two kinds of sudden death",
            sweep=CASES,
            inject=nothing,
            verify=told_by_the_engine,
            status=(1,),
            expected=[
                Expected(
                    outcome="oom",
                    stage="load",
                    scope="device",
                    reason="can't allocate memory",
                    axes={"engine.memory_limit_gib": 0.005},
                ),
                Expected(
                    outcome="oom",
                    stage="kv_cache",
                    scope="device",
                    axes={"engine.args.kv_cache_memory_bytes": 1000},
                ),
                Expected(
                    outcome="unsupported",
                    reason="no_such_argument",
                    axes={"engine.args.no_such_argument": 1},
                ),
                Expected(outcome="infeasible", reason="top_k 16", axes={"model.top_k": 16}),
                Expected(
                    outcome="timeout",
                    reason=re.escape("measure.timeout_s"),
                    axes={"measure.timeout_s": 0.001},
                ),
                Expected(outcome="crashed", axes={"layout.pipeline": 2}),
                Expected(outcome="crashed", axes={"layout.expert": True}),
                *(
                    Expected(
                        outcome="oom",
                        stage=stage,
                        scope="device",
                        reason="can't allocate memory",
                        axes={"measure.warmup": warmup},
                    )
                    for warmup, stage in enumerate(("run", "warmup"))
                ),
            ],
        ),
        Fault(
            name="host-memory",
            what="the node's memory runs out (Ray's monitor)",
            sweep=SHORT
            | {
                "grid": None,
                "cases": [
                    {"model.num_experts": 4},
                    {"model.scale": 0.5, "model.num_layers": 4, "model.ffn_dim": 14336},
                ],
            },
            inject=nothing,
            prepare=crowded_memory,
            expected=[
                Expected(outcome="oom", scope="host", stage="load", axes={"model.scale": 0.5})
            ],
            status=(0,),
        ),
        Fault(
            name="memory-full",
            what="others keep the node's memory full, then leave it",
            sweep=SHORT | {"grid": {"model.num_experts": [4, 8]}},
            inject=nothing,
            prepare=full_memory,
            mend=roomy_memory,
            expected=[
                Expected(outcome="oom", scope="host", stage="load", axes={"model.num_experts": 8})
            ],
            status=(3,),
            says="no device is left that could go on",
        ),
        Fault(
            name="disk-full",
            what="the disk fills at any moment",
            sweep=PACED,
            arguments=H100,
            prepare=small_disk,
            inject=fill_the_disk,
            mend=empty_the_disk,
            status=(0, 2),
            says="No space left on device",
        ),
        Fault(
            name="read-only",
            what="the output folder is on a disk that cannot be written",
            sweep=PACED,
            arguments=H100,
            prepare=read_only_disk,
            inject=nothing,
            mend=writable_again,
            status=(2,),
            says="Read-only file system",
        ),
        Fault(
            name="no-more-files",
            what="the dataset cannot be written from one moment on",
            sweep=PACED,
            arguments=H100,
            prepare=changeable,
            inject=no_more_files,
            mend=files_again,
            status=(2,),
            says="Operation not permitted",
        ),
        Fault(
            name="files-spoiled",
            what="torn, cut and foreign files, after SIGKILL of the driver",
            sweep=PACED,
            arguments=H100,
            inject=killed_with_some,
            mend=spoil,
            verify=set_aside,
            status=(SIGKILLED,),
            vanish=True,
        ),
        Fault(
            name="manifest-torn",
            what="a torn manifest, after SIGKILL of the driver",
            sweep=PACED,
            arguments=H100,
            inject=killed_with_some,
            mend=tear_the_manifest,
            status=(SIGKILLED,),
        ),
        Fault(
            name="second-driver",
            what="a second driver on the same dataset",
            sweep=PACED,
            arguments=H100,
            inject=second_driver,
        ),
        Fault(
            name="clock-jumps",
            what="the wall clock jumps by hours and days, both ways",
            sweep=PACED,
            arguments=H100,
            prepare=movable_clock,
            inject=clocks_jump,
            mend=clock_jumps_before_the_resume,
            verify=moved,
        ),
        Fault(
            name="other-version",
            what="hosts run another version of the package than the driver",
            sweep=PACED,
            arguments=H100,
            prepare=own_copy,
            inject=newer_workers,
            mend=older_workers,
            verify=one_version,
            status=(2,),
            says="is the same version of the project on every node",
        ),
        Fault(
            name="raylet-killed",
            what="SIGKILL of a node's raylet, predicting engines",
            sweep=LONG,
            arguments=H100,
            prepare=two_gpu_nodes,
            inject=killed_raylet,
            verify=once_each,
        ),
        Fault(
            name="node-lost",
            what="SIGKILL of all processes of a node at once",
            sweep=LONG,
            arguments=H100,
            prepare=two_gpu_nodes,
            inject=lost_node,
            verify=tried_again,
        ),
        Fault(
            name="raylet-killed-engine",
            what="SIGKILL of a node's raylet, vLLM measuring",
            sweep=SLOW
            | {"base": SLOW["base"] | {"workload": {"batch_size": 2, "output_tokens": 1500}}},
            prepare=two_cpu_nodes,
            inject=killed_raylet_of_an_engine,
            verify=once_each,
            times=2,
        ),
        Fault(
            name="head-lost",
            what="the cluster's head dies or hangs (its GCS, or all of it) and is started again",
            sweep=LONG,
            arguments=H100,
            prepare=head,
            inject=lost_head,
            mend=head_again,
            status=(3,),
            says="the head of the Ray cluster.* is gone; the records of .* are safe in",
            grace_s=60.0,
            times=2,
        ),
    )
}
