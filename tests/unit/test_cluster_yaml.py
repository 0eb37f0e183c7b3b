"""cluster.yaml, checked as far as that goes without a cloud: by Ray's own schema, and by the
promises that the file makes about who may reach the cluster and what runs on the head.

The file holds a second cluster, for machines that one already has, as a commented block; it
is uncommented here just as the file tells a reader to do it.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()
_, _, COMMENTED = TEXT.partition("\n# ---- machines that you already have ----\n")
CLOUD = yaml.safe_load(TEXT)
LOCAL = yaml.safe_load(re.sub(r"^# ?", "", COMMENTED, flags=re.MULTILINE))

both = pytest.mark.parametrize("config", [CLOUD, LOCAL], ids=["cloud", "local"])


def _ray_start(config: dict[str, Any], role: str) -> str:
    (command,) = [c for c in config[f"{role}_start_ray_commands"] if "ray start" in c]
    return str(command)


@both
def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@both
def test_ray_refuses_a_typo(config: dict[str, Any]) -> None:
    broken = copy.deepcopy(config)
    broken["setup_comands"] = broken.pop("setup_commands")
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(broken))


def test_ray_refuses_a_head_that_is_no_node_type() -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config({**copy.deepcopy(CLOUD), "head_node_type": "haed"}))


def test_the_head_takes_no_engine() -> None:
    assert CLOUD["available_node_types"][CLOUD["head_node_type"]]["resources"] == {
        "CPU": 0,
        "GPU": 0,
    }
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(_ray_start(LOCAL, "head").split())


def test_workers_offer_their_gpus_and_say_their_market() -> None:
    workers = {
        name: node
        for name, node in CLOUD["available_node_types"].items()
        if name != CLOUD["head_node_type"]
    }
    assert {node["labels"]["market"] for node in workers.values()} == {"on-demand", "spot"}
    for node in workers.values():
        assert node["resources"]["GPU"] == 8
        asks_for_spot = "InstanceMarketOptions" in node["node_config"]
        assert asks_for_spot == (node["labels"]["market"] == "spot")


@both
@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_asks_for_the_token_and_reports_to_nobody(
    config: dict[str, Any], role: str
) -> None:
    command = _ray_start(config, role)
    for setting in (
        "RAY_AUTH_MODE=token",
        "RAY_worker_niceness=0",
        "RAY_USAGE_STATS_ENABLED=0",
        "VLLM_NO_USAGE_STATS=1",
    ):
        assert f"{setting} " in command.partition("ray start")[0]
    token = "~/.ray/auth_token"
    assert config["file_mounts"][token] == token


@both
def test_the_dashboard_stays_on_the_head(config: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in _ray_start(config, "head").split()
    assert "--dashboard-host" not in _ray_start(config, "worker")


@both
def test_nothing_is_opened_to_the_world(config: dict[str, Any]) -> None:
    """Ray's own security group lets in ssh alone; shells on the nodes ask for the token too."""
    assert "0.0.0.0" not in TEXT
    assert "security_group" not in config["provider"]
    (profile,) = [command for command in config["setup_commands"] if ".bashrc" in command]
    assert "RAY_AUTH_MODE=token" in profile


def test_the_token_is_made_for_its_owner_alone() -> None:
    (made,) = [line for line in TEXT.splitlines() if "get-auth-token --generate" in line]
    assert "umask 077" in made and ">/dev/null" in made, "neither others' nor in a terminal's log"


@both
def test_nodes_run_this_checkout(config: dict[str, Any]) -> None:
    """What is mounted exists here, and suffices to build the project there."""
    mounts = {
        remote.removeprefix("~/moe-sweep/"): local
        for remote, local in config["file_mounts"].items()
        if remote.startswith("~/moe-sweep/")
    }
    assert all(remote == local for remote, local in mounts.items())
    assert [local for local in mounts.values() if not (ROOT / local).exists()] == []
    needed = {"pyproject.toml", "constraints.txt", "Makefile", ".ci", "orchestrator", "workers"}
    assert needed <= set(mounts)
    assert "make -C ~/moe-sweep env EXTRA=cuda" in config["setup_commands"]


def test_both_clusters_mount_the_same() -> None:
    assert CLOUD["file_mounts"] == LOCAL["file_mounts"]
    assert CLOUD["worker_start_ray_commands"] == LOCAL["worker_start_ray_commands"]


def test_the_file_holds_no_secret() -> None:
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|BEGIN [A-Z ]*KEY", TEXT)
    assert not re.search(r"RAY_AUTH_TOKEN\b|[0-9a-f]{32}", TEXT)
