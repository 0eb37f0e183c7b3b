"""cluster.yaml, checked as far as that goes without a cloud: by Ray's own schema, and by the
promises that the file makes about who may reach the cluster and what runs on the head.

The file holds a second cluster, for machines that one already has, as a commented block; it
is uncommented here just as the file tells a reader to do it.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
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
_, _, SEVERAL = TEXT.partition("\n# ---- several nodes ----\n")
SEVERAL, _, _ = SEVERAL.partition("\n# ---- machines that you already have ----\n")

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


def test_ray_accepts_nodes_with_fast_links_beside_the_others() -> None:
    """As the file tells a reader to add them; AWS's own keys are AWS's to check."""
    (added,) = yaml.safe_load(re.sub(r"^# ?", "", SEVERAL, flags=re.MULTILINE)).items()
    config = copy.deepcopy(CLOUD)
    config["available_node_types"] |= dict([added])
    validate_config(prepare_config(config))
    node = config["available_node_types"][added[0]]
    used = node["node_config"]
    # What Ray asks of interfaces, in `_private/aws/config.py`, which needs boto3.
    assert not {"SubnetId", "SubnetIds", "SecurityGroupIds"} & set(used)
    assert all(one["SubnetId"] and one["Groups"] for one in used["NetworkInterfaces"])
    assert used["NetworkInterfaces"][0]["InterfaceType"] == "efa"
    assert node["resources"] == CLOUD["available_node_types"]["h100"]["resources"]
    assert {"Placement", "CapacityReservationSpecification"} <= set(used)


@both
@pytest.mark.parametrize("role", ["head", "worker"])
def test_what_is_large_lies_on_the_folder_for_it(config: dict[str, Any], role: str) -> None:
    """Engines get the folders of caches from `ray start`, shells from the profile."""
    (profile,) = [command for command in config["setup_commands"] if ".bashrc" in command]
    for told in (_ray_start(config, role), profile):
        assert "HF_HOME=$HOME/scratch/huggingface VLLM_CACHE_ROOT=$HOME/scratch/vllm " in told
    assert any("~/scratch" in command for command in config["setup_commands"])


@pytest.mark.parametrize("disk", [True, False], ids=["with disks", "without"])
def test_the_folder_is_made_once_and_on_the_node_s_own_disks(disk: bool, tmp_path: Path) -> None:
    (command,) = [one for one in CLOUD["setup_commands"] if "/opt/dlami/nvme" in one]
    home, nvme = tmp_path / "home", tmp_path / "nvme"
    home.mkdir()
    if disk:
        nvme.mkdir()
    command = command.replace("/opt/dlami/nvme", str(nvme)).replace("sudo ", "")
    names = {"HOME": str(home), "USER": str(os.getuid()), "PATH": os.environ["PATH"]}
    for _ in range(2):  # Ray runs it again when the file has changed
        subprocess.run(["bash", "-c", command], env=names, check=True, timeout=20)
    assert (home / "scratch").is_dir()
    assert ((home / "scratch").resolve() == nvme / "scratch") is disk


def test_disks_are_as_fast_as_their_kind_goes() -> None:
    """A gp3 volume has 125 MB/s unless asked, and at most 0.25 MB/s per operation/s."""
    for node in CLOUD["available_node_types"].values():
        (disk,) = node["node_config"]["BlockDeviceMappings"]
        assert 125 < disk["Ebs"]["Throughput"] <= 0.25 * disk["Ebs"]["Iops"]


@both
@pytest.mark.parametrize("role", ["head", "worker"])
def test_engines_may_pin_memory_and_open_files(config: dict[str, Any], role: str) -> None:
    before, _, _ = _ray_start(config, role).partition("ray start")
    assert "ulimit -n 65536;" in before and "ulimit -l unlimited 2>/dev/null;" in before


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
