"""Engines side by side on one machine: the check with real processes, and what follows.

The machine of the tests has no GPU. Ray is told of two, and the engines of both compute on the
same cores, so neighbours change everything: the true verdict here is no.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from orchestrator.cluster import Cluster
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.packing import LEAST_TURNS, Packing

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.fixture
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster as FakeCluster

    arguments: dict[str, Any] = {"num_gpus": 2, "num_cpus": 2, "object_store_memory": 80 * 2**20}
    fake = FakeCluster(initialize_head=True, head_node_args=arguments)
    try:
        yield fake.address
    finally:
        fake.shutdown()


@pytest.mark.slow
@pytest.mark.engine
def test_engines_that_share_cores_run_one_at_a_time(address: str, tmp_path: Path) -> None:
    from orchestrator.request import Request
    from orchestrator.run import execute

    sweep = {
        "name": "beside",
        "base": {
            "model": {"name": "mixtral-8x7b", "weights": "dummy", "scale": 0.0625, "num_layers": 2},
            "workload": {"batch_size": 2, "input_tokens": 16, "output_tokens": 16},
            "engine": {"eager": True},
            "measure": {"repeats": 2},
        },
        "grid": {"model.num_experts": [2, 4]},
    }
    path = tmp_path / "beside.yaml"
    path.write_text(yaml.safe_dump(sweep))
    request = Request(sweep=path, out=tmp_path, profile="h100", address=address, plain=True)
    summary = execute(request)
    assert dict(summary.counts) == {"ok": 2}

    (run,) = json.loads((summary.dataset / "manifest.json").read_text())["runs"]
    (node,) = run["environment"]["nodes"].values()
    packing = Packing(**node["side_by_side"])
    assert packing.engines == 2 and packing.turns >= LEAST_TURNS
    assert packing.ratio is not None and not packing.unchanged

    frame = pl.scan_ipc(summary.dataset / "records").collect()
    assert frame["side_by_side"].to_list() == [False, False]
    samples = pl.scan_ipc(summary.dataset / "samples").collect()
    spans = (
        samples.group_by("trial_id")
        .agg(
            start=pl.col("started_at").min(),
            end=(pl.col("started_at") + pl.duration(microseconds=pl.col("e2e_s") * 1e6)).max(),
        )
        .sort("start")
    )
    assert spans["end"][0] < spans["start"][1], "two engines measured at the same time"

    again = execute(replace(request, rerun=frozenset({"ok"})))
    assert dict(again.counts) == {"ok": 2}
    log = summary.dataset / "logs" / again.run_id / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not any(line["event"] == "Checked" for line in lines)  # it is known by now
    assert list(lines[0]["side_by_side"].values()) == [False]


@pytest.mark.slow
def test_processes_that_do_not_notice_each_other_may_share(address: str) -> None:
    """Paced engines only wait: their passes take as long beside others as alone."""
    import ray

    from workers.actor import EngineHost, check_packing

    trial = Trial(
        model=Model(name="mixtral-8x7b", weights="dummy", scale=0.125, num_layers=4),
        workload=Workload(batch_size=1, input_tokens=64, output_tokens=256),
        engine=EngineSettings(kind="roofline", args={"pace": 0.1}),
    )
    job = Job(
        sweep="s",
        run_id="r",
        group_id="g",
        profile="h100",
        tickets=(Ticket(trial=trial, trial_id="t"),),
    )
    with Cluster.connect(address):
        kind: Any = EngineHost
        hosts = [kind.options(num_cpus=0).remote(["roofline"]) for _ in range(2)]
        ray.get([host.prepare.remote() for host in hosts])
        packing = ray.get(check_packing.remote(hosts, ["0", "1"], job, 60.0))
        assert packing.unchanged, packing.told()
        assert ray.get([host.end_rehearsal.remote() for host in hosts]) == [0, 0]

        wrong = replace(trial, engine=EngineSettings(kind="transformers"))
        job = replace(job, tickets=(Ticket(trial=wrong, trial_id="t"),))
        failed = ray.get(check_packing.remote(hosts, ["0", "1"], job, 60.0))
        assert not failed.unchanged and "transformers" in failed.reason
