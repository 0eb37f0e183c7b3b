"""What killed drivers leave, and a few of the faults of `inject.py`, once each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from orchestrator import cluster
from tests.faults.inject import length
from tests.faults.registry import AT_ANY_MOMENT, FAULTS, NotHere
from tests.faults.scene import ROOT, play
from tests.integration.harness import until
from workers.folders import Folder


def test_folders_of_dead_drivers_go_and_those_of_living_ones_stay(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    tmp_path = Path(tempfile.mkdtemp(prefix="f"))  # short enough for Ray's sockets
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = cluster._Session.begin(())
    dead, fresh = (Path(tempfile.mkdtemp(prefix=cluster.SESSION)) for _ in range(2))
    (dead / "vllm_dist_abc").touch()
    segment = Path("/dev/shm") / "vllm_dist_abc_rank0"
    segment.touch()
    another = tmp_path / "somebody-elses"
    another.mkdir()
    for folder in (living.folder, dead, another):
        os.utime(folder, (0, 0))
    cluster._Session.begin(()).end()
    assert sorted(tmp_path.iterdir()) == sorted([living.folder, fresh, another])
    assert not segment.exists()
    dead.mkdir()  # written by what the dead driver had started
    os.utime(dead, (0, 0))
    living.end()
    assert sorted(tmp_path.iterdir()) == sorted([fresh, another])


HELD = """
import sys, tempfile
from workers.folders import Folder

tempfile.tempdir = sys.argv[1]
held = Folder.begin("moe-host-")
(held.path / "vllm_dist_held").touch()
print(held.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_its_owners_until_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner is another process, as a host on a node is to the next one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", HELD, tmp_path],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        paths = [Path((one.stdout or sys.stdin).readline().strip()) for one in owners]
        for path in paths:
            os.utime(path, (0, 0))
        Folder.begin("moe-host-").end()
        assert all((path / "vllm_dist_held").exists() for path in paths)
        owners[0].kill()
        owners[0].wait()
        Folder.begin("moe-host-").end()
        assert list(tmp_path.iterdir()) == [paths[1]] and (paths[1] / "vllm_dist_held").exists()
    finally:
        for one in owners:
            one.kill()
            one.communicate()


GROUP = """
import multiprocessing, os, signal
from workers.forks import _track_apart

def hold(pipe):
    _track_apart()
    locks = [multiprocessing.get_context("spawn").Lock() for _ in range(2)]
    pipe.send([one._semlock.name for one in locks])
    signal.pause()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    context.Process(target=hold, args=(theirs,)).start()
    print(*ours.recv(), flush=True)
    os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.lengthy
def test_semaphores_go_with_a_group_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "group.py").write_text(GROUP)
    done = subprocess.run(
        [sys.executable, tmp_path / "group.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == -signal.SIGKILL
    names = [Path("/dev/shm") / f"sem.{name.removeprefix('/')}" for name in done.stdout.split()]
    assert len(names) == 2
    until(lambda: not any(name.exists() for name in names), 20)


HOST = """
import os, subprocess, sys
from workers import actor

actor.WATCH_S = actor.NODE_GRACE_S = 0.05
os.setpgid(0, 0)
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(engine.pid, flush=True)
actor._end_with_the_node(os.getppid())
"""
NODE = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.lengthy
def test_a_host_and_its_engine_end_when_their_node_was_killed() -> None:
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, HOST],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert node.stdout is not None
    engine = psutil.Process(int(node.stdout.readline()))
    host = engine.parent()
    assert host is not None and host.pid != node.pid
    node.kill()
    node.wait()
    for one in (host, engine):
        one.wait(30)
    node.stdout.close()


SERVER = """
import os, sys
from pathlib import Path
import psutil
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.forks import Forks
from workers.nursery import Nursery

def servers():
    found = [one for one in psutil.Process().children(recursive=True)
             if "workers.nursery" in " ".join(one.cmdline())]
    return [one for one in found if one.ppid() != os.getpid()]

if __name__ == "__main__":
    model = Model(name="mixtral-8x7b", weights="dummy", scale=0.125, num_layers=4)
    trial = Trial(model=model, engine=EngineSettings(kind="roofline"))
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100",
              tickets=(Ticket(trial=trial, trial_id="t"),))
    nursery = Nursery((), Path(sys.argv[1]))
    forks = Forks(["roofline"], str(nursery.path))
    for _ in range(3):
        print([type(one).__name__ for one in forks.run(job, None)].count("Finished"))
        (server,) = servers()
        server.kill()
    nursery.close()
"""


@pytest.mark.lengthy
def test_a_fork_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "server.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.stdout.split() == ["1", "1", "1"], done.stderr


QUICK = ("second-driver",)
"""Faults of the default suite; the others take minutes."""


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS],
)
def test_a_fault_costs_nothing_but_what_it_hit(name: str) -> None:
    fault = FAULTS[name]
    length_s = length(fault) if fault.inject in AT_ANY_MOMENT else None
    try:
        row = play(fault, 1, length_s)
    except NotHere as error:
        pytest.skip(str(error))
    assert (row.lost, row.doubled, row.again, row.unreadable) == (0, 0, 0, 0)
    assert row.wrong == [] and row.right == row.planned
    assert row.left == [] and row.gone_s is not None
