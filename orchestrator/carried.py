"""What of the driver's environment reaches the nodes of a cluster that was there before.

A cluster of our own inherits all of it; nodes that were started by somebody else inherit nothing,
so `HF_HUB_OFFLINE=1` or `NCCL_DEBUG=INFO` before the command would have no effect on any engine. A
list says what goes: variables of the libraries that engines are made of. They go in three ways:

    settings        in Ray's runtime environment, for every process of this run on every node.
                    Whoever can see Ray's dashboard reads it there
    paths           to hosts, which take those that exist on their node, and that it has not named
                    itself: `HF_HOME` of a laptop is no folder of a cluster
    the hub token   to hosts, by a call: Ray shows and writes down the arguments of none. A host
                    keeps it in memory, as a file that goes with its process

Other variables whose name or value looks like a secret (`VLLM_API_KEY`) stay here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.hardware import nvml
from workers.secrecy import TOKEN_FILE, hide, known_secrets

PREFIXES = (
    "FI_",
    "FLASHINFER_",
    "GLOO_",
    "HF_",
    "NCCL_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
    "VLLM_",
)
"""How the names of variables begin that go: of the hub, vLLM, torch, compilers, and networks."""
STAY = frozenset({"VLLM_HOST_IP", "VLLM_HOST_PORT", "VLLM_PORT", TOKEN_FILE})
"""They are of one machine."""
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where the hub's library looks for a token, in its order."""
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's own variable: what a job was submitted with."""
ALWAYS = {**nvml.ORDER, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""What every process of this run is told: how GPUs are numbered, and that who asks for none still
sees those of its node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """What goes to nodes."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """No secrets, and nothing that names a place on a machine."""
    paths: Mapping[str, str] = field(default_factory=dict)
    token: str | None = field(default=None, repr=False)
    """Of the hub. Never written down."""


def carried(environment: Mapping[str, str] = os.environ) -> Carried:
    """What goes of `environment`."""
    known = known_secrets(environment=environment)
    settings: dict[str, str] = {}
    paths: dict[str, str] = {}
    for name, value in environment.items():
        if not name.startswith(PREFIXES) or name in STAY or hide(value, name, known) != value:
            continue
        is_path = value.startswith(("/", "~"))
        (paths if is_path else settings)[name] = value
    token = next(filter(None, (environment.get(name, "").strip() for name in TOKENS)), None)
    there = _of_job(environment)
    wanted = {name: value for name, value in (settings | ALWAYS).items() if name not in there}
    return Carried(settings=wanted, paths=paths, token=token)


def _of_job(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Variables of the job that this driver is, where `ray job submit` started it: its processes
    have them already, and Ray takes no variable twice (`_merge_runtime_env`)."""
    try:
        told = json.loads(environment.get(JOB, "{}"))
        return dict(told["runtime_env"]["env_vars"])
    except (ValueError, LookupError, TypeError):
        return {}
