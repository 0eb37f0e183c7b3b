"""The manifests that the guides hand out, as far as they can be checked without a cluster.

KubeRay's own schema is a file of a megabyte in its repository and in no package that this project
could depend on. So the fields are written down here, as its reference has them
(https://docs.ray.io/en/master/cluster/kubernetes/references/api.html, ray.io/v1 of KubeRay 1.6.2),
of the objects that the manifest uses. With the variable `KUBERAY_CRD` set to a copy of
`ray-operator/config/crd/bases/ray.io_rayjobs.yaml` the manifest is checked against that, too.

The script for Slurm runs with stand-ins for what Slurm and Ray start: who is started where, in
which order, and what is left when it ends.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RAYJOB = yaml.safe_load((ROOT / "docs/guides/rayjob.yaml").read_text())
SBATCH = ROOT / "docs/guides/slurm.sbatch"


def _closed(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others, as the API server takes it."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, WHOLE, YES, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {}
TEXTS = {"type": "object", "additionalProperties": TEXT}
"""Keys and values: what looks like a number has to be quoted."""
QUANTITY = {"anyOf": [WHOLE, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}]}
CONTAINER = _closed(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    env={"type": "array", "items": _closed(("name",), name=TEXT, value=TEXT, valueFrom=ANY)},
    securityContext={"type": "object"},
    resources=_closed(
        requests={"type": "object", "additionalProperties": QUANTITY},
        limits={"type": "object", "additionalProperties": QUANTITY},
    ),
    volumeMounts={
        "type": "array",
        "items": _closed(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=YES),
    },
)
VOLUME = _closed(
    ("name",),
    name=TEXT,
    emptyDir=_closed(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    persistentVolumeClaim=_closed(("claimName",), claimName=TEXT, readOnly=YES),
)
TEMPLATE = _closed(
    ("spec",),
    metadata={"type": "object"},
    spec=_closed(
        ("containers",),
        nodeSelector=TEXTS,
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={"type": "array", "items": VOLUME},
    ),
)
HEAD = _closed(
    ("template",),
    template=TEMPLATE,
    rayStartParams=TEXTS,
    headService=ANY,
    enableIngress=YES,
    serviceType=TEXT,
    resources=TEXTS,
    labels=TEXTS,
)
WORKERS = _closed(
    ("groupName", "template"),
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    numOfHosts=WHOLE,
    idleTimeoutSeconds=WHOLE,
    suspend=YES,
    rayStartParams=TEXTS,
    template=TEMPLATE,
    scaleStrategy=ANY,
    resources=TEXTS,
    labels=TEXTS,
)
CLUSTER = _closed(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=_closed(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    autoscalerOptions=ANY,
    enableInTreeAutoscaling=YES,
    gcsFaultToleranceOptions=ANY,
    headServiceAnnotations=TEXTS,
    managedBy=TEXT,
    suspend=YES,
)
SCHEMA = _closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_closed(("name",), name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=_closed(
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        jobId=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate=ANY,
        submitterConfig=ANY,
        metadata=TEXTS,
        clusterSelector=TEXTS,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=TEXT,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        deletionStrategy=ANY,
        managedBy=TEXT,
        shutdownAfterJobFinishes=YES,
        suspend=YES,
        ttlSecondsAfterFinished=WHOLE,
        rayClusterSpec=CLUSTER,
    ),
)


def test_the_rayjob_has_kuberay_s_fields() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(RAYJOB, SCHEMA)


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="needs a copy of KubeRay's schema")
def test_the_rayjob_fits_kuberay_s_own_schema() -> None:
    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    jsonschema.validate(RAYJOB, version["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "python"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "name"), "h100"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "1"),
    ],
)
def test_a_slip_is_seen(path: tuple[str | int, ...], value: object) -> None:
    broken = copy.deepcopy(RAYJOB)
    at = broken
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_rayjob_keeps_the_promises_of_cluster_yaml() -> None:
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # tokens need that
    assert {"num-cpus": "0", "num-gpus": "0"}.items() <= head["rayStartParams"].items()
    groups = [head, *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        names = {one["name"] for one in group["template"]["spec"]["volumes"]}
        assert {one["name"] for one in container["volumeMounts"]} == names
        values = {one["name"]: one["value"] for one in container["env"]}
        assert values["RAY_worker_niceness"] == "0"
        assert values["HF_HOME"].startswith("/scratch/")
        assert container["resources"]["requests"] == container["resources"]["limits"]
    (worker,) = cluster["workerGroupSpecs"]
    (memory,) = [
        one["name"]
        for one in worker["template"]["spec"]["volumes"]
        if one.get("emptyDir", {}).get("medium") == "Memory"
    ]
    (container,) = worker["template"]["spec"]["containers"]
    assert {"name": memory, "mountPath": "/dev/shm"} in container["volumeMounts"]


STUBS = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    # Notes what would run where, then runs it here.
    "srun": """
        where=
        while [ "${1#--}" != "$1" ]; do where="$where $1"; shift; done
        echo "$where | $*" >> "$TRACE"
        exec "$@"
    """,
    "ray": """
        case "$1" in
            start) trap 'echo "end $2 $3" >> "$TRACE"; exit' TERM
                echo up >> "$TRACE"; sleep 30 & wait;;
            status) until grep -q ^up "$TRACE"; do sleep 0.02; done;;
        esac
    """,
    "python": """
        until [ "$(grep -c ^up "$TRACE")" = "$SLURM_JOB_NUM_NODES" ]; do sleep 0.02; done
        trap 'echo "driver stopped" >> "$TRACE"; exit 130' TERM
        echo "driver $*" >> "$TRACE"
        [ "$LONG" = 0 ] || { sleep 30 & wait; }
        exit 1
    """,
}


def _sbatch(folder: Path, *, nodes: int, long: bool) -> subprocess.Popen[bytes]:
    """The script as Slurm starts it on its first node, with stand-ins."""
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name, text in STUBS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    values = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder),
        "TRACE": str(folder / "trace"),
        "LONG": str(int(long)),
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    return subprocess.Popen(["bash", SBATCH, "sweeps/x.yaml", "--fresh"], env=values)


def _trace(folder: Path) -> list[str]:
    file = folder / "trace"
    return file.read_text().splitlines() if file.exists() else []


def test_slurm_starts_a_head_workers_and_the_driver_and_ends_them(tmp_path: Path) -> None:
    with _sbatch(tmp_path, nodes=2, long=False) as job:
        assert job.wait(20) == 1  # the driver's own status
    trace = _trace(tmp_path)
    (head,) = [one for one in trace if "| ray start --block --head" in one]
    assert "--nodelist=node1" in head and "--dashboard-host=127.0.0.1" in head
    (worker,) = [one for one in trace if "| ray start --block --address=" in one]
    assert "--exclude=node1" in worker and worker.endswith("--address=node1:24242")
    (driver,) = [one for one in trace if one.startswith("driver ")]
    words = "sweeps/x.yaml --fresh --address node1:24242 --plain"
    assert driver == f"driver -m orchestrator {words}"
    assert sum(one.startswith("end --block") for one in trace) == 2


def test_slurm_s_signal_reaches_the_driver_first(tmp_path: Path) -> None:
    with _sbatch(tmp_path, nodes=1, long=True) as job:
        deadline = time.monotonic() + 20
        while not any(one.startswith("driver -m") for one in _trace(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) == 130
    trace = _trace(tmp_path)
    assert not any("--exclude" in one for one in trace)  # no node beside the first
    ends = [one for one in trace if one == "driver stopped" or one.startswith("end ")]
    assert ends[0] == "driver stopped" and len(ends) == 2
