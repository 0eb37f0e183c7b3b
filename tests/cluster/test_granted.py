"""Which GPUs a lane gets, and on which nodes there is none, as Ray and NVML tell it.

The nodes are Ray's, on this machine. NVML and CUDA builds of the libraries of engines are made up:
a folder on their path has the first, and of the others no more than what says their versions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.cluster import Cluster
from orchestrator.errors import ClusterError
from orchestrator.events import Inspect, Lane
from tests import nvml
from workers.contract.errors import Crashed
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.hardware.occupancy import Holder

pytestmark = pytest.mark.timeout(120)

NOSET = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
UUIDS = {"CUDA_VISIBLE_DEVICES": "GPU-0b,GPU-0a"}
DESKTOP: dict[str, Any] = {"used_mib": 900, "compute": {}, "graphics": {"11": 890}}
NODES: dict[str, dict[str, str]] = {
    "noset": NOSET,
    "uuids": UUIDS,
    "old": {},
}


def _wheels(folder: Path) -> Path:
    """What tells the versions of CUDA builds."""
    for name, version in {"vllm": "0.32.0", "torch": "2.13.0+cu130"}.items():
        told = folder / f"{name}-{version}.dist-info" / "METADATA"
        told.parent.mkdir(parents=True)
        told.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('asked for its version only')")
    (folder / "torch" / "version.py").write_text("cuda = '13.0'\n")
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray.cluster_utils import Cluster as FakeCluster

    folder = tmp_path_factory.mktemp("nodes")
    path = os.pathsep.join(map(str, (nvml.FOLDER, _wheels(folder / "wheels"))))
    store = {"object_store_memory": 80 * 2**20}
    fake = FakeCluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
    try:
        for name, environment in NODES.items():
            driver = {"driver": "570.86.15", "cuda": 12080} if name == "old" else {}
            told = {"driver": "580.65.06", "cuda": 13000, "programs": {"11": "Xorg"}} | driver
            gpus = [nvml.gpu("GPU-0a", **DESKTOP), nvml.gpu("GPU-0b")]
            file = folder / f"{name}.json"
            file.write_text(json.dumps(told | {"gpus": gpus}))
            caches = str(folder / ("elsewhere" if name == "old" else "caches"))
            given = environment | {"PYTHONPATH": path, "FAKE_NVML": str(file)}
            given["XDG_CACHE_HOME"] = caches
            labels = {"name": name}
            fake.add_node(num_cpus=2, num_gpus=2, labels=labels, env_vars=given, **store)
        yield fake.address
    finally:
        fake.shutdown()


def test_lanes_get_devices_of_their_own_and_unfit_nodes_are_named(
    address: str, tmp_path: Path
) -> None:
    from orchestrator.pool import Found, Pool

    with Cluster.connect(address) as cluster:
        names = {node["NodeID"]: node["Labels"].get("name", "head") for node in ray.nodes()}
        there = {names[node.node_id]: node for node in cluster.nodes}
        assert set(there) == {"noset", "uuids"}
        ((refused, why),) = cluster.refused.items()
        assert names[refused] == "old" and "570.86.15" in why and "2.13.0+cu130" in why

        pool = Pool(cluster, sweep="s", run_id="r", profile="h100", logs=tmp_path, kinds=["vllm"])
        lanes: dict[str, list[int]] = {}
        for name, node in there.items():
            assert (node.devices, node.cpu_only, node.device_class) == (2, False, "h100")
            lanes[name] = [2 * len(lanes), 2 * len(lanes) + 1]
            for lane_id in lanes[name]:
                pool.open(Lane(lane_id=lane_id, node_id=node.node_id, devices=1))
        granted = {
            name: [ray.get(pool._processes[one].placement.devices) for one in ids]
            for name, ids in lanes.items()
        }
        assert sorted(granted["noset"]) == ["0", "1"]
        assert sorted(granted["uuids"]) == ["GPU-0a", "GPU-0b"]

        occupied = cluster.occupied[there["uuids"].node_id]
        assert list(occupied) == ["GPU-0b", "GPU-0a"]
        assert occupied["GPU-0a"].holders == (Holder(pid=11, name="Xorg", used_bytes=890 * 2**20),)
        for lane_id in lanes["uuids"]:  # a display is there, and was there before
            pool.inspect(Inspect(lane_id=lane_id, group=None))
        found: dict[int, Any] = {}
        while len(found) < 2:
            found |= dict(pool.poll(0.2))
        assert list(found.values()) == [Found(problems=())] * 2

        node_id = there["uuids"].node_id
        for ids in lanes.values():
            for lane_id in ids:
                pool.close(lane_id)
        pool.open(Lane(lane_id=99, node_id=node_id, devices=2))
        assert ray.get(pool._processes[99].placement.devices) == "GPU-0a,GPU-0b"
        pool.close_all()


def test_the_drivers_settings_reach_hosts_and_its_token_no_file(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator.pool import Pool

    token = "hf_CanaryOfTheHub00000000000000000"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NCCL_DEBUG", "VERSION")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "absent"))

    def ask(_: Any) -> tuple[list[str | None], str]:
        names = ("NCCL_DEBUG", "HF_HOME", "VLLM_CACHE_ROOT", "HF_TOKEN", "CUDA_DEVICE_ORDER")
        read = Path(os.environ["HF_TOKEN_PATH"]).read_text()
        return [os.environ.get(name) for name in names], read

    with Cluster.connect(address) as cluster:
        pool = Pool(cluster, sweep="s", run_id="r", profile="h100", logs=tmp_path, kinds=["vllm"])
        actor = pool._host_on(cluster.nodes[0].node_id).actor
        values, read = ray.get(actor.__ray_call__.remote(ask))
        assert values == ["VERSION", str(tmp_path), None, None, "PCI_BUS_ID"] and read == token
        assert token not in str(ray.get_runtime_context().runtime_env)
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        ray.kill(actor)
    files = [one for one in session.rglob("*") if one.is_file()]
    assert files and not [one for one in files if token.encode() in one.read_bytes()]


def test_a_model_over_nodes_lies_in_one_place_on_all(address: str, tmp_path: Path) -> None:
    from workers.actor import _in_one_place

    model = Model(name="mixtral-8x7b", weights="dummy", num_layers=2)
    with Cluster.connect(address, engines=False) as cluster:
        assert len(cluster.nodes) == len(NODES), "predictions ask nothing of drivers"
        nodes = {
            node["Labels"]["name"]: node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and "name" in node["Labels"]
        }
        alike, apart = [nodes["noset"], nodes["uuids"]], [nodes["noset"], nodes["old"]]
        assert _in_one_place(alike, Trial(model=model), {}, None) is None
        told = _in_one_place(apart, Trial(model=model), {}, None)
        assert isinstance(told, Crashed) and "different places" in str(told)
        assert "/elsewhere/" in str(told) and "XDG_CACHE_HOME" in str(told)

        nowhere = Trial(model=Model(name=str(tmp_path / "nowhere")))
        told = _in_one_place(alike, nowhere, {}, None)
        assert isinstance(told, Crashed) and f"does not have {tmp_path / 'nowhere'}" in str(told)


def test_a_cluster_of_unfit_nodes_is_refused_in_words(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cluster.unfit", lambda host: f"{host.device} is too old")
    with pytest.raises(ClusterError, match=r"^NVIDIA H100 80GB HBM3 is too old$"):
        Cluster.connect(address)
    assert not ray.is_initialized()
