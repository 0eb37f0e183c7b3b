"""Lanes on a real Ray cluster: two nodes with GPUs that only Ray believes in.

The devices are fake, the engine is not: the CPU build of vLLM runs inside actors that hold
one "GPU" each. What is tested is where the actors land and what their deaths become.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cluster import Cluster
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
    Open,
    TrialEnded,
)
from orchestrator.plan import Group, Planned
from orchestrator.schedule import Schedule
from workers.actor import _wait_over_nodes
from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.message import Finished, Progress, Released
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload

pytestmark = [
    pytest.mark.engine,
    pytest.mark.cluster,
    pytest.mark.timeout(280),
]


@pytest.fixture(scope="module")
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


_OPEN: list[Any] = []
"""Pools of the test that runs."""


@pytest.fixture(autouse=True)
def _no_pool_stays_open() -> Iterator[None]:
    """A test that fails must not keep the devices of the cluster that they share."""
    yield
    while _OPEN:
        _OPEN.pop().close_all()


class _Driver:
    """Schedule and pool, with what happened written down."""

    def __init__(self, cluster: Cluster, groups: list[Group], logs: Path) -> None:
        from orchestrator.pool import Pool

        self.schedule = Schedule.of(groups, cluster.nodes)
        self.pool = Pool(cluster, sweep="s", run_id="r", profile="cpu", logs=logs, kinds=["vllm"])
        _OPEN.append(self.pool)
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

    visible = ray.get(
        [one.placement.devices for one in driver.pool._processes.values()], timeout=60
    )
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
    pid = ray.get(process.host.pid, timeout=60)
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
        assert ray.get(placement.devices, timeout=60) is None  # each rank gets its own
        (table,) = [
            one for one in ray.util.placement_group_table().values() if one["state"] == "CREATED"
        ]
        assert list(table["bundles"].values()) == [{"GPU": 1.0, "CPU": 1.0}] * 4
        assert set(table["bundles_to_node_id"].values()) == set(nodes)
        look = ray.remote(num_cpus=0)(_wait_over_nodes)
        looking = look.options(scheduling_strategy=placement.within(captures=True)).remote({})
        assert ray.get(looking, timeout=60) == []  # each bundle's GPU was asked after
    finally:
        placement.release()
