"""Lanes on a real Ray cluster: two nodes with GPUs that only Ray believes in.

The devices are fake, the engine is not: the CPU build of vLLM runs inside actors that hold
one "GPU" each. What is tested is where the actors land and what their deaths become.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator.cluster import Changes, Cluster
from orchestrator.errors import ClusterError
from orchestrator.events import (
    Assign,
    Blame,
    Close,
    Command,
    GroupEnded,
    Inspect,
    Inspected,
    Lane,
    LaneLost,
    NodeJoined,
    NodeLost,
    Open,
    TrialEnded,
)
from orchestrator.plan import Group, Planned
from orchestrator.schedule import Schedule, Unplaceable
from workers.actor import _wait_over_nodes
from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.message import Finished, Progress, Released
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    from ray.cluster_utils import Cluster as FakeCluster

    arguments: dict[str, Any] = {"num_gpus": 2, "num_cpus": 2, "object_store_memory": 80 * 2**20}
    fake = FakeCluster(initialize_head=True, head_node_args=arguments)
    try:
        fake.add_node(**arguments)
        with Cluster.connect(fake.address) as connected:
            yield connected
    finally:
        fake.shutdown()


def _group(name: str, devices: int = 1, output_tokens: int = 4) -> Group:
    trial = Trial(
        model=Model(
            name="mixtral-8x7b",
            weights="dummy",
            scale=0.0625,
            num_layers=2,
            ffn_dim=3584,
            num_experts=2 + 2 * (name == "b"),
        ),
        layout=Layout(tensor=1, pipeline=devices),
        workload=Workload(batch_size=1, input_tokens=8, output_tokens=output_tokens),
        engine=EngineSettings(eager=True),
        measure=Measure(repeats=1),
    )
    planned = Planned(trial=trial, trial_id=f"{name}0", axes={})
    return Group(group_id=name, devices=devices, trials=(planned,), label=name)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class _Driver:
    """Schedule and pool, with what happened written down."""

    def __init__(self, cluster: Cluster, groups: list[Group], logs: Path) -> None:
        from orchestrator.pool import Pool

        self.schedule = Schedule.of(groups, cluster.nodes)
        self.pool = Pool(cluster, sweep="s", run_id="r", profile="cpu", logs=logs, kinds=["vllm"])
        self.opened: list[Open] = []
        self.blamed: list[tuple[str, str]] = []
        self.finished: dict[str, str] = {}
        self.where: dict[str, str] = {}
        self.stage: dict[int, str] = {}
        self.inspected: list[int] = []

    def carry_out(self, commands: list[Command], error: object = None) -> None:
        for command in commands:
            if isinstance(command, Open):
                self.opened.append(command)
                self.pool.open(command.lane)
            elif isinstance(command, Assign):
                self.pool.assign(command.lane_id, command.group, command.attempts)
            elif isinstance(command, Close):
                self.pool.close(command.lane_id)
            elif isinstance(command, Inspect):
                self.inspected.append(command.lane_id)
                self.pool.inspect(command)
            elif isinstance(command, Blame):
                self.blamed += [(one.trial_id, str(error)) for one in command.group.trials]

    def step(self) -> None:
        from orchestrator.pool import Found

        for lane, happening in self.pool.poll(0.2):
            if isinstance(happening, Finished):
                self.finished[happening.trial_id] = happening.outcome
                self.carry_out(
                    self.schedule.on(TrialEnded(lane_id=lane, trial_id=happening.trial_id))
                )
            elif isinstance(happening, Released):
                self.carry_out(self.schedule.on(GroupEnded(lane_id=lane, clean=happening.clean)))
            elif isinstance(happening, Progress):
                self.stage[lane] = happening.stage
            elif isinstance(happening, Found):
                assert happening.problems == ()
                self.carry_out(self.schedule.on(Inspected(lane_id=lane, sound=True)))
            else:
                lost = LaneLost(
                    lane_id=lane,
                    trial_id=happening.trial_id,
                    retry=happening.retry,
                    lives=happening.lives,
                )
                self.carry_out(self.schedule.on(lost), happening.error)

    def run(self) -> None:
        while not self.schedule.finished:
            self.step()


def test_devices_are_tried_with_what_runs_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    """An engine that cannot be built stands in for a device that cannot run one."""
    from orchestrator.pool import Found

    driver = _Driver(cluster, [], tmp_path)
    good = _group("a")
    (one,) = good.trials
    settings = replace(one.trial.engine, args={"kv_cache_dtype": "no such type"})
    bad = replace(good, trials=(replace(one, trial=replace(one.trial, engine=settings)),))
    node_id = cluster.nodes[0].node_id
    found: dict[str, Found] = {}
    for lane_id, (what, group) in enumerate({"good": good, "bad": bad, "left": None}.items()):
        driver.pool.open(Lane(lane_id=lane_id, node_id=node_id, devices=1))
        driver.pool.inspect(Inspect(lane_id=lane_id, group=group))
        while what not in found:
            for answered, happening in driver.pool.poll(0.2):
                assert answered == lane_id and isinstance(happening, Found)
                found[what] = happening
        driver.pool.close(lane_id)
    driver.pool.close_all()
    assert found["good"].problems == found["left"].problems == ()
    (problem,) = found["bad"].problems
    assert problem.startswith("trial a0 ran elsewhere and fails here too: ")
    assert "ValidationError" in problem and "CacheConfig" in problem


def test_two_groups_run_on_devices_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    assert sorted(node.devices for node in cluster.nodes) == [2, 2]
    assert not any(node.cpu_only for node in cluster.nodes)
    driver = _Driver(cluster, [_group("a"), _group("b")], tmp_path)
    commands = driver.schedule.start()
    driver.carry_out([one for one in commands if isinstance(one, Open)])
    import ray

    visible = ray.get([one.placement.devices for one in driver.pool._processes.values()])
    assert sorted(visible) == ["0", "1"]
    driver.carry_out([one for one in commands if not isinstance(one, Open)])
    driver.run()
    assert driver.finished == {"a0": "ok", "b0": "ok"}
    assert len({one.lane.node_id for one in driver.opened}) == 1  # the fullest node first
    assert driver.blamed == []


def test_a_killed_process_ends_its_trial(cluster: Cluster, tmp_path: Path) -> None:
    driver = _Driver(cluster, [_group("a", output_tokens=3000)], tmp_path)
    opening, assigning = driver.schedule.start()
    driver.carry_out([opening])
    import ray

    (process,) = driver.pool._processes.values()
    pid = ray.get(process.host.pid)
    driver.carry_out([assigning])
    deadline = time.monotonic() + 120
    while driver.stage.get(process.lane.lane_id) != "warmup" and time.monotonic() < deadline:
        driver.step()
    os.kill(pid, signal.SIGKILL)
    driver.run()
    ((trial, reason),) = driver.blamed
    assert trial == "a0" and "died" in reason
    assert not _alive(pid)


def test_a_layout_over_several_nodes_gets_a_placement_group(cluster: Cluster) -> None:
    import ray

    from orchestrator.events import Lane
    from orchestrator.placement import Placement

    nodes = {node.node_id: node for node in cluster.nodes}
    parts = tuple((node_id, 2) for node_id in nodes)
    placement = Placement(Lane(lane_id=0, node_id=None, devices=4, parts=parts), nodes)
    try:
        assert ray.get(placement.devices) is None  # each rank gets its own
        (table,) = [
            one for one in ray.util.placement_group_table().values() if one["state"] == "CREATED"
        ]
        assert list(table["bundles"].values()) == [{"GPU": 1.0, "CPU": 1.0}] * 4
        assert set(table["bundles_to_node_id"].values()) == set(nodes)
        look = ray.remote(num_cpus=0)(_wait_over_nodes)
        looking = look.options(scheduling_strategy=placement.within(captures=True)).remote()
        assert ray.get(looking, timeout=60) == []  # each bundle's GPU was asked after
    finally:
        placement.release()


def test_a_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        Cluster.connect("127.0.0.1:1")


def _holder(name: str, device_class: str | None, devices: int = 1) -> Group:
    """A group that is never run: it only holds devices."""
    trial = Trial(
        model=Model(name="mixtral-8x7b", weights="dummy"),
        layout=Layout(tensor=devices, device=device_class),
        workload=Workload(batch_size=1, input_tokens=8, output_tokens=4),
        engine=EngineSettings(kind="vllm"),
    )
    planned = Planned(trial=trial, trial_id=f"{name}0", axes={})
    return Group(group_id=name, devices=devices, trials=(planned,), label=name)


@pytest.mark.slow
def test_nodes_of_several_classes_that_come_and_go() -> None:
    """A group goes to the class that it asks for; a node that dies takes its lane with it,
    and one that joins takes the work on."""
    import ray
    from ray.cluster_utils import Cluster as FakeCluster

    from orchestrator.pool import Pool

    fake = FakeCluster(
        initialize_head=True,
        head_node_args={"num_gpus": 0, "num_cpus": 1, "object_store_memory": 80 * 2**20},
    )

    def add(name: str) -> Any:
        return fake.add_node(
            num_gpus=2,
            num_cpus=2,
            object_store_memory=80 * 2**20,
            labels={"device-class": name},
        )

    def until_changed(cluster: Cluster) -> Changes:
        deadline = time.monotonic() + 60
        while (found := cluster.changes()) == Changes():
            assert time.monotonic() < deadline, "no change was seen"
            time.sleep(0.2)
        return found

    try:
        add("h100")
        dying = add("l4")
        with Cluster.connect(fake.address) as cluster:
            classes = {node.node_id: node.device_class for node in cluster.nodes}
            assert sorted(map(str, classes.values())) == ["h100", "l4"]
            assert not cluster.autoscaling
            groups = [_holder("a", "l4", 2), _holder("b", "h100-sxm", 2), _holder("c", None)]
            with pytest.raises(Unplaceable, match="4 devices of class l4, but the cluster has 2"):
                Schedule.of([_holder("d", "l4", 4)], cluster.nodes)
            schedule = Schedule.of(groups, cluster.nodes)
            pool = Pool(
                cluster, sweep="s", run_id="r", profile="cpu", logs=Path("logs"), kinds=["vllm"]
            )
            opened = [one.lane for one in schedule.start() if isinstance(one, Open)]
            assert {classes[str(lane.node_id)] for lane in opened} == {"h100", "l4"}
            for lane in opened:
                pool.open(lane)
            granted = [process.placement.devices for process in pool._processes.values()]
            assert ray.get(granted) == ["0,1", "0,1"]

            fake.remove_node(dying, allow_graceful=False)
            (lost,) = until_changed(cluster).lost
            assert classes[lost] == "l4"
            commands = schedule.on(NodeLost(node_id=lost))
            (closed,) = [one.lane_id for one in commands if isinstance(one, Close)]
            pool.close(closed)
            assert [need.device_class for need in schedule.stranded] == ["l4"]

            add("l4")
            (joined,) = until_changed(cluster).joined
            assert (joined.device_class, joined.devices) == ("l4", 2)
            (new,) = [one for one in schedule.on(NodeJoined(node=joined)) if isinstance(one, Open)]
            assert new.lane.node_id == joined.node_id
            pool.open(new.lane)
            assert ray.get(pool._processes[new.lane.lane_id].placement.devices) == "0,1"
            pool.close_all()
    finally:
        fake.shutdown()


def test_the_log_of_a_run_gives_the_same_commands_again(tmp_path: Path) -> None:
    from orchestrator.events import Node, brief, from_json
    from orchestrator.request import Request, prepare
    from orchestrator.run import execute
    from orchestrator.schedule import Exhausted, replay

    file = tmp_path / "log.yaml"
    base = {
        "model": {"name": "mixtral-8x7b", "weights": "dummy"},
        "workload": {"input_tokens": 16, "output_tokens": 4},
        "engine": {"kind": "roofline"},
    }
    grid = {"layout.tensor": [1, 2], "model.num_experts": [4, 8], "workload.batch_size": [1, 2]}
    file.write_text(yaml.safe_dump({"name": "log", "base": base, "grid": grid}))
    request = Request(sweep=file, out=tmp_path, profile="h100", address="local", json=True)
    summary = execute(request)
    assert sum(summary.counts.values()) == 8

    (log,) = (tmp_path / "log" / "logs").glob("*/events.jsonl")
    first, started, *lines = map(json.loads, log.read_text().splitlines())
    _, plan = prepare(request, "h100")
    planned = {group.group_id: group for group in plan.groups}
    groups = [planned[name].only(trials) for name, trials in first["groups"]]
    known: list[Exhausted] = []
    assert first["known"] == known
    state, commands = replay(
        [group for group in groups if group is not None],
        [Node(**node) for node in first["nodes"]],
        [from_json(line) for line in lines],
        skip=first["skip"],
        known=known,
        autoscaling=first["autoscaling"],
    )
    assert state.finished
    logged = [started["commands"], *(line["commands"] for line in lines)]
    assert [list(map(brief, some)) for some in commands] == logged
