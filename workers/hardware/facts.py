"""What decides how fast a device is, apart from its name.

A virtual machine calls its processor 'Intel(R) Xeon(R) Processor' whatever lies below: two
machines of that name and of two cores each multiplied BF16 matrices at 0.16 and at 2.5 TFLOPS, one
without AMX, one with. So a device's identity is a list of facts: of a CPU which model it is, the
instructions that kernels choose by, caches, NUMA nodes, and the cores that this process may really
use; of a GPU the product, memory, power limit, ECC, MIG, links and driver. The name stays for
people. Two devices are one where all facts agree, and where they do not, what differs is told in
words.

What changes from minute to minute (clocks, temperature, load) is no fact of a device.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from workers.hardware import cgroup, nvml
from workers.hardware.caches import data_caches

Facts = Mapping[str, Any]
"""Name of a fact to its value: a number, text, true or false; null where it cannot be told."""

_X86 = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
"""Facts by the flag of `/proc/cpuinfo` that shows them: what kernels of matrix products use."""
_ARM = {"sve": "sve", "sve2": "sve2", "bf16": "bf16", "i8mm": "i8mm", "dot_product": "asimddp"}
_WORDS = {
    "product": "product",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_fp16": "AVX-512 FP16",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "sve": "SVE",
    "sve2": "SVE2",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "dot_product": "dot product",
    "l3_kib": "L3",
    "l2_kib": "L2",
    "l1_kib": "L1",
    "cores": "cores",
    "core_quota": "cores by quota",
    "memory_mib": "memory",
    "power_limit_w": "power limit",
    "ecc": "ECC",
    "mig": "MIG",
    "pcie": "PCIe",
    "nvlinks": "NVLinks",
    "numa_nodes": "NUMA nodes",
    "wsl": "WSL",
}
"""Facts as people read them, those first that explain most; others follow by their names."""
_UNITS = {"kib": "KiB", "mib": "MiB", "w": "W"}
_MOST_NAMED = 6
_CORES = Path("/sys/devices/system/cpu")


def dumps(facts: Facts) -> str:
    """Facts as a line of JSON, always the same for the same facts."""
    return json.dumps(dict(facts), sort_keys=True, allow_nan=False)


def loads(text: str | None) -> Facts | None:
    """Back from JSON; null where there is none, or another text than `dumps` writes."""
    try:
        found = json.loads(text) if text else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def digest(facts: Facts | str) -> str:
    """Twelve hexadecimal digits that stand for all facts."""
    text = facts if isinstance(facts, str) else dumps(facts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(one: Facts, other: Facts) -> list[str]:
    """What is not the same, fact by fact: `AMX: yes / no`, `L3: 32 MiB / 260 MiB`."""
    return [f"{name}: {first} / {second}" for name, first, second in apart(one, other)]


def apart(one: Facts, other: Facts) -> list[tuple[str, str, str]]:
    """Facts that are not the same: name and both values, as people read them.

    What only one side knows of is told too: its other value is a question mark.
    """
    known = {**one, **other}
    names = [*(name for name in _WORDS if name in known), *sorted(known.keys() - _WORDS.keys())]
    return [
        (
            _WORDS.get(name, name.replace("_", " ")),
            _told(name, one.get(name)),
            _told(name, other.get(name)),
        )
        for name in names
        if one.get(name) != other.get(name)
    ]


def briefly(different: Collection[str]) -> str:
    """The first of `differences` in one line."""
    few = list(different)[:_MOST_NAMED]
    more = len(different) - len(few)
    return ", ".join(few) + (f" and {more} more" if more else "")


def _told(name: str, value: Any) -> str:
    if value is None:
        return "?"
    if isinstance(value, bool):
        return "yes" if value else "no"
    unit = _UNITS.get(name.rpartition("_")[2])
    if unit == "KiB" and value % 1024 == 0:
        return f"{value // 1024} MiB"
    return f"{value} {unit}" if unit else str(value)


@cache
def of_cpu() -> Facts:
    """The processor, as far as this process may use it, as first asked: engines bind their
    threads later."""
    used = sorted(os.sched_getaffinity(0))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return from_cpuinfo(text) | {
        **{f"l{level}_kib": size // 1024 for level, size in sorted(data_caches(used).items())},
        "numa_nodes": _numa_nodes(used),
        "threads_per_core": _threads_per_core(used),
        "cores": len(used),
        "core_quota": cgroup.cpu_quota(),
    }


def from_cpuinfo(text: str, machine: str | None = None) -> dict[str, Any]:
    """What `/proc/cpuinfo` says of the processor: its first one, they are alike.

    Args:
        text: of the file.
        machine: architecture, as `platform.machine` tells it.
    """
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, sign, value = line.partition(":")
        if sign:
            first.setdefault(key.strip(), value.strip())
    machine = machine or platform.machine()
    flags = set((first.get("flags") or first.get("Features") or "").split())
    if machine.startswith(("aarch64", "arm")):
        variant, revision = first.get("CPU variant"), first.get("CPU revision")
        return {
            "architecture": machine,
            "vendor": first.get("CPU implementer"),
            "family": first.get("CPU architecture"),
            "model": first.get("CPU part"),
            "stepping": f"{variant}.{revision}" if variant and revision else None,
            **{fact: flag in flags for fact, flag in _ARM.items()},
        }
    return {
        "architecture": machine,
        "vendor": first.get("vendor_id"),
        "family": _number(first.get("cpu family")),
        "model": _number(first.get("model")),
        "stepping": _number(first.get("stepping")),
        **{fact: flag in flags for fact, flag in _X86.items()},
        "hypervisor": "hypervisor" in flags,
    }


def of_gpus(handles: Iterable[Any]) -> dict[str, Any]:
    """The GPUs behind these NVML handles: one value per fact where all agree, else one each.

    NVML must be initialised.
    """
    import pynvml

    each = [_of_gpu(handle) for handle in handles]
    if not each:
        return {}
    driver = None
    with suppress(pynvml.NVMLError):
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    found = {}
    for name in each[0]:
        values = [one[name] for one in each]
        alike = all(value == values[0] for value in values)
        found[name] = values[0] if alike else ", ".join(map(str, values))
    # Only where it is so: records of other machines keep the identity that they have.
    return {**found, "driver": driver} | ({"wsl": True} if under_wsl() else {})


def under_wsl(release: str | None = None) -> bool:
    """Whether this Linux runs under Windows, by its kernel's `release`."""
    return "microsoft" in (release or platform.release()).lower()


def _of_gpu(handle: Any) -> dict[str, Any]:
    import pynvml

    def asked(name: str, *arguments: Any) -> Any:
        return nvml.asked(pynvml, name, handle, *arguments)

    memory, power = asked("nvmlDeviceGetMemoryInfo"), asked("nvmlDeviceGetEnforcedPowerLimit")
    ecc, mig = asked("nvmlDeviceGetEccMode"), asked("nvmlDeviceGetMigMode")
    sliced = bool(asked("nvmlDeviceIsMigDeviceHandle"))  # the mode is that of the whole GPU
    generation = asked("nvmlDeviceGetMaxPcieLinkGeneration")
    width = asked("nvmlDeviceGetMaxPcieLinkWidth")
    links = [asked("nvmlDeviceGetNvLinkState", n) for n in range(pynvml.NVML_NVLINK_MAX_LINKS)]
    name = asked("nvmlDeviceGetName")
    return {
        "product": None if name is None else str(name),
        "memory_mib": None if memory is None else int(memory.total) // 2**20,
        "power_limit_w": None if power is None else round(power / 1000),
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig": sliced or (None if mig is None else bool(mig[0])),
        "pcie": None if None in (generation, width) else f"{generation}.0 x{width}",
        "nvlinks": sum(bool(one) for one in links),
    }


def _numa_nodes(cores: Iterable[int]) -> int | None:
    """Memory nodes that these cores belong to."""
    nodes = {path.name for core in cores for path in (_CORES / f"cpu{core}").glob("node[0-9]*")}
    return len(nodes) or None


def _threads_per_core(cores: Iterable[int]) -> int | None:
    """Most of these logical cores that share a physical one."""
    siblings: dict[str, int] = {}
    for core in cores:
        try:
            shared = (_CORES / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            return None
        siblings[shared] = siblings.get(shared, 0) + 1
    return max(siblings.values(), default=None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
