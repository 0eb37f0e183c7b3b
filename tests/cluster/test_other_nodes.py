"""What happens on nodes where the driver sees no file: the usual shape of a cluster, whose head has
no device and runs the driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import TINY, orchestrate, records, sweep_file

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.fixture
def address() -> Iterator[str]:
    """An empty head, where drivers run, and a node with two devices."""
    from ray.cluster_utils import Cluster

    arguments: dict[str, Any] = {"object_store_memory": 80 * 2**20}
    fake = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0} | arguments)
    try:
        fake.add_node(num_cpus=2, num_gpus=2, **arguments)
        yield fake.address
    finally:
        fake.shutdown()


def test_memory_that_runs_out_in_ranks_is_known_by_what_they_print(
    address: str, tmp_path: Path
) -> None:
    """Ranks send home no more than that one of them failed."""
    changes = {"layout": {"tensor": 2}, "engine": {"eager": True, "memory_limit_gib": 0.02}}
    path = sweep_file(tmp_path, base=TINY["base"] | changes)
    done = orchestrate(path, "--out", tmp_path, "--address", address, "--json", timeout=270)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "tiny").iter_rows(named=True)
    assert record["outcome"] == "oom", record["outcome_reason"]
    assert (record["oom_stage"], record["oom_scope"]) == ("load", "device")
    assert record["oom_bytes"] > 0
    log = (tmp_path / "tiny" / record["log"]).read_text()
    assert "WorkerProc failed to start" in log, "which vLLM logs on standard output"
