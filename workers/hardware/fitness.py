"""Whether engines can measure on a machine's GPUs, said in words before one is built.

Each of these would otherwise show in every group, late and in other words, or not at all. A driver
that is older than the CUDA of the wheels: a crash per group. A CPU build on a machine with GPUs:
vLLM then computes on the CPU (`cuda_platform_plugin` of `vllm/platforms/__init__.py`), and the
record would name the GPU. A GPU that is cut into MIG slices: Ray counts it whole, CUDA takes its
first slice, and the record would name the whole.
"""

from __future__ import annotations

from workers.hardware import facts
from workers.hardware.host import Host

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA → first driver that runs all of its minor versions (NVIDIA's 'CUDA Compatibility', minor
version compatibility)."""


def unfit(host: Host) -> str | None:
    """Why engines cannot measure on the GPUs of `host`, and what to do; null where they can, and
    where there is no GPU or no engine to tell."""
    if not host.gpus or host.engine_version is None or host.torch_version is None:
        return None
    what = f"{host.hostname} has {host.gpus} x {host.device}"
    if host.engine_version.endswith("+cpu") or host.torch_cuda is None:
        return (
            f"{what}, but the CPU builds of the engine's libraries: vLLM {host.engine_version}, "
            f"torch {host.torch_version}. Install the extra `cuda` instead of `cpu`, or hide the "
            "GPUs with CUDA_VISIBLE_DEVICES= (before `ray start`, if Ray runs there already) to "
            "measure the CPU"
        )
    if (facts.loads(host.device_facts) or {}).get("mig") not in (False, None):
        return (
            f"{what} in MIG mode: slices of a GPU are not measured. Leave that mode with "
            "`nvidia-smi -mig 0`, or name other GPUs in CUDA_VISIBLE_DEVICES"
        )
    return _too_old(host)


def _too_old(host: Host) -> str | None:
    """What to do about a driver that is older than the CUDA that torch was built for."""
    assert host.torch_cuda is not None, "asked of CUDA builds"
    wanted = int(host.torch_cuda.partition(".")[0])
    least = LEAST_DRIVER.get(wanted)
    if host.driver_cuda is not None:  # where a forward-compatibility package is in use, its CUDA
        enough = int(host.driver_cuda.partition(".")[0]) >= wanted
    else:
        major = (host.driver or "").partition(".")[0]
        enough = least is None or not major.isdecimal() or int(major) >= least
    if enough:
        return None
    runs = f" runs CUDA up to {host.driver_cuda}" if host.driver_cuda else ""
    newer = f"driver {least} or newer" if least else "a newer driver"
    package = f"cuda-compat-{host.torch_cuda.replace('.', '-')}"
    return (
        f"the NVIDIA driver {host.driver} of {host.hostname}{runs or ' is too old'}, and torch "
        f"{host.torch_version} was built for CUDA {host.torch_cuda}: install {newer}; or on a "
        f"data-centre GPU the package {package}, and put /usr/local/cuda-{host.torch_cuda}/compat "
        "first in LD_LIBRARY_PATH before Ray starts; or wheels for the driver's CUDA"
    )


def remark(host: Host) -> str | None:
    """What a user should know of figures from `host`; null if nothing."""
    if host.gpus and facts.under_wsl(host.system):
        return (
            f"{host.hostname} runs under WSL 2: Windows may lend a GPU the host's memory where its "
            "own runs out, and what would be `oom` is then slow. Choose 'Prefer No Sysmem "
            "Fallback' in NVIDIA's control panel"
        )
    return None
