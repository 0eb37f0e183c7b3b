"""What of the driver's environment goes to nodes, and how a host takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.carried import ALWAYS, JOB, carried
from workers import given
from workers.secrecy import TOKEN_FILE

TOKEN = "hf_CanaryOfTheHub00000000000000000"
ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_AnotherOne0000000000000000000",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/data/hub",
    "HF_ENDPOINT": "https://me:canary-in-an-address@hub.example",
    "HF_HUB_CACHE": f"/data/{TOKEN}",
    "NCCL_DEBUG": "INFO",
    "NCCL_TOPO_FILE": "/etc/topology.xml",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_API_KEY": "canary of vLLM",
    "VLLM_HOST_IP": "10.0.0.1",
    "VLLM_CACHE_ROOT": "~/vllm",
    "CUDA_VISIBLE_DEVICES": "0",
    "AWS_SECRET_ACCESS_KEY": "canary of the cloud",
    "TMPDIR": "/tmp/driver",
    "PATH": "/bin",
}


def test_only_what_is_listed_goes_and_no_secret_but_the_token() -> None:
    found = carried(ENVIRONMENT)
    wanted = {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "VLLM_LOGGING_LEVEL": "DEBUG"}
    assert found.settings == wanted | ALWAYS
    assert found.paths == {
        "HF_HOME": "/data/hub",
        "NCCL_TOPO_FILE": "/etc/topology.xml",
        "VLLM_CACHE_ROOT": "~/vllm",
    }
    assert found.token == TOKEN and TOKEN not in repr(found)
    assert carried({}).token is carried({"HF_TOKEN": " "}).token is None
    assert carried({"HUGGING_FACE_HUB_TOKEN": TOKEN}).token == TOKEN


def test_what_a_job_was_submitted_with_is_not_said_twice() -> None:
    job = json.dumps({"runtime_env": {"env_vars": {"NCCL_DEBUG": "WARN"}}, "metadata": {}})
    assert "NCCL_DEBUG" not in carried(ENVIRONMENT | {JOB: job}).settings
    for other in ("", "[]", '{"runtime_env": null}', '{"runtime_env": {}}'):
        assert carried(ENVIRONMENT | {JOB: other}).settings["NCCL_DEBUG"] == "INFO"


def test_a_node_takes_the_paths_that_it_has_and_does_not_name_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.setenv(name, "set by this node")  # so that it is put back afterwards
    monkeypatch.delenv("HF_HOME")
    absent = str(tmp_path / "absent")
    told = given.take_paths(
        {"HF_HOME": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path), "NCCL_TOPO_FILE": absent}
    )
    assert os.environ["HF_HOME"] == str(tmp_path)
    assert os.environ["VLLM_CACHE_ROOT"] == "set by this node"
    assert "NCCL_TOPO_FILE" not in os.environ
    assert told == [
        f"NCCL_TOPO_FILE={absent} of the driver is not used: this node has no such path"
    ]


def test_the_token_is_a_file_that_goes_with_its_process() -> None:
    ask = "from huggingface_hub import get_token; print(get_token())"
    code = (
        "import os, subprocess, sys; from workers import given;"
        f"given.take_token({TOKEN!r}); assert {TOKEN!r} not in str(os.environ);"
        "print(os.environ[given.TOKEN_FILE], flush=True);"
        f"subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", TOKEN_FILE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    path, read = done.stdout.split()
    assert read == TOKEN and not Path(path).exists()
