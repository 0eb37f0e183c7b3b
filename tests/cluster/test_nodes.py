"""Clusters that are not there, change, or are told of again from a run's log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster import Changes, Cluster
from orchestrator.errors import ClusterError
from orchestrator.events import Close, NodeJoined, NodeLost, Open
from orchestrator.plan import Group, Planned
from orchestrator.schedule import Schedule, Unplaceable
from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]


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
