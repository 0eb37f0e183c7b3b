"""GPUs as NVML tells of them, made up: names, slices, displays and drivers."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from orchestrator.errors import ClusterError
from orchestrator.request import Request
from orchestrator.run import execute
from tests.nvml import FakeNvml, gpu
from workers.hardware import facts, nvml, occupancy
from workers.hardware.fitness import remark, unfit
from workers.hardware.host import Host, describe, gpu_memory_used, torch_cuda
from workers.hardware.occupancy import leftovers, occupancies

CUDA = {"engine_version": "0.32.0", "torch_version": "2.13.0+cu130", "torch_cuda": "13.0"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNvml:
    return FakeNvml(monkeypatch, tmp_path / "gpus.json")


def _cuda_host() -> Host:
    return replace(describe(), **CUDA)


@pytest.mark.parametrize(
    ("named", "uuids", "device"),
    [
        (None, ["GPU-0a-1", "GPU-0b-2"], "NVIDIA H100 80GB HBM3"),
        ("1", ["GPU-0b-2"], "NVIDIA L4"),
        ("GPU-0b", ["GPU-0b-2"], "NVIDIA L4"),
        ("GPU-0b, GPU-0a-1", ["GPU-0b-2", "GPU-0a-1"], "NVIDIA L4"),
        ("1,-1,0", ["GPU-0b-2"], "NVIDIA L4"),
        ("MIG-s1", ["MIG-s1"], "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    ],
)
def test_a_machine_is_the_gpus_that_may_be_used_there(
    fake: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    uuids: list[str],
    device: str,
) -> None:
    fake.tell(gpu("GPU-0a-1", slices=["MIG-s1"]), gpu("GPU-0b-2", name="NVIDIA L4", used_mib=7))
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    host = describe()
    assert (host.gpus, host.device) == (len(uuids), device)
    assert gpu_memory_used("GPU-0b") == gpu_memory_used("1") == 7 * 2**20
    if not uuids[0].startswith("MIG-"):  # whose memory the fake does not tell
        assert list(occupancies()) == uuids


def test_hidden_gpus_leave_a_cpu_and_so_does_no_driver(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.tell(gpu())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    host = describe()
    assert (host.gpus, host.device_class, unfit(host)) == (0, "cpu", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("FAKE_NVML")
    assert describe() == replace(host, driver=None, driver_cuda=None)
    assert gpu_memory_used("0") == 0 and occupancies() == {} and leftovers("0", {}, ()) == []


def test_memory_that_a_gpu_shares_with_its_cpu_is_the_machines(fake: FakeNvml) -> None:
    fake.tell(gpu(total_mib=None))
    host = describe()
    fake.tell(driver="580.65.06")
    assert host.gpus == 1 and host.memory_gib == describe().memory_gib
    assert occupancies() == {}


# --- what is in use


DESKTOP = {"11": 300, "12": 120}
PROGRAMS = {"11": "/usr/lib/xorg/Xorg -nolisten tcp", "12": "gnome-shell", "77": "python -m x"}


def test_a_display_is_no_leftover_and_one_that_grows_is_none_either(fake: FakeNvml) -> None:
    fake.tell(gpu(used_mib=430, compute={}, graphics=DESKTOP), programs=PROGRAMS)
    before = occupancies()
    assert str(before["GPU-0a"]) == (
        "430 MiB in use: Xorg (pid 11) 300 MiB, gnome-shell (pid 12) 120 MiB"
    )
    assert leftovers("0", before, {77}) == [] != leftovers("0", {}, {11, 12})

    grown = {"11": 900, "12": 120, "13": 2000}  # and somebody opens a browser
    fake.tell(gpu(used_mib=3040, compute={}, graphics=grown), programs=PROGRAMS)
    assert leftovers("0", before, {77}) == leftovers("GPU-0a", before, {77}) == []
    fake.tell(gpu(used_mib=10, compute={}, graphics={}), programs=PROGRAMS)
    assert leftovers("0", before, {77}) == []


def test_what_an_engine_left_is_told_with_its_holder(fake: FakeNvml) -> None:
    fake.tell(gpu(used_mib=430, compute={}, graphics=DESKTOP), programs=PROGRAMS)
    before = occupancies()
    left = {"77": 900}
    fake.tell(gpu(used_mib=1340, compute=left, graphics=DESKTOP), programs=PROGRAMS)
    assert leftovers("0", before, {77}) == [
        "910 MiB more than before the first group on GPU 0; 1340 MiB in use: python (pid 77) "
        "900 MiB, Xorg (pid 11) 300 MiB, gnome-shell (pid 12) 120 MiB"
    ]
    assert leftovers("0", before, ()) == [], "another user's program of the same size"


def test_memory_that_nobody_owns_up_to_counts_as_the_engines(fake: FakeNvml) -> None:
    """A dead process's, in a container, or under Windows, which tells no sizes."""
    fake.tell(gpu(used_mib=300, compute={}, graphics={}))
    before = occupancies()
    fake.tell(gpu(used_mib=1000))
    assert leftovers("0", before, {77}) == [
        "700 MiB more than before the first group on GPU 0; 1000 MiB in use: no process that NVML "
        "names"
    ]
    fake.tell(gpu(used_mib=1000, compute={"77": None}, graphics={"5": None}))
    (told,) = leftovers("0", before, {77})
    assert told.endswith("1000 MiB in use: a process (pid 5), a process (pid 77)")
    fake.tell(gpu(used_mib=300 + occupancy.CLEAN_BYTES // 2**20))
    assert leftovers("0", before, {77}) == []
    assert leftovers("5", before, {77}) == [], "there is no such GPU to be asked"


# --- what engines can run on


def test_a_driver_that_is_older_than_the_wheels_cuda_is_named_with_both(fake: FakeNvml) -> None:
    fake.tell(gpu(), driver="570.86.15", cuda=12080)
    told = unfit(_cuda_host())
    assert told is not None
    for part in ("570.86.15", "CUDA up to 12.8", "torch 2.13.0+cu130", "CUDA 13.0", "driver 580"):
        assert part in told
    assert "cuda-compat-13-0" in told and "/usr/local/cuda-13.0/compat" in told

    fake.tell(gpu(), driver="570.86.15", cuda=None)
    told = unfit(_cuda_host())
    assert told is not None and "570.86.15" in told and "too old" in told


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [
        ("580.65.06", 13000),
        ("590.10", 14010),
        ("570.86.15", 13000),  # with the forward-compatibility package in use
        ("580.65.06", None),
    ],
)
def test_drivers_that_are_new_enough(fake: FakeNvml, driver: str, cuda: int | None) -> None:
    fake.tell(gpu(), driver=driver, cuda=cuda)
    host = _cuda_host()
    assert unfit(host) is None
    assert unfit(replace(host, torch_cuda="13.2")) is None, "minor versions are compatible"


def test_a_cpu_build_among_gpus_is_refused(fake: FakeNvml) -> None:
    fake.tell(gpu(), gpu("GPU-0b"))
    for build in (
        CUDA | {"engine_version": "0.32.0+cpu", "torch_version": "2.13.0+cpu", "torch_cuda": None},
        CUDA | {"torch_version": "2.13.0+cpu", "torch_cuda": None},
    ):
        told = unfit(replace(describe(), **build))
        assert told is not None and "2 x NVIDIA H100 80GB HBM3" in told
        assert "torch 2.13.0+cpu" in told and "CUDA_VISIBLE_DEVICES=" in told
    assert unfit(replace(describe(), engine_version=None)) is None, "the engine itself will say so"


@pytest.mark.parametrize("named", [None, "MIG-s1"])
def test_slices_of_a_gpu_are_refused(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    fake.tell(gpu("GPU-0a", mig=1, slices=["MIG-s1", "MIG-s2"]), gpu("GPU-0b"))
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    told = unfit(_cuda_host())
    assert told is not None and "MIG mode" in told
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0b")
    assert unfit(_cuda_host()) is None


def test_wsl_is_a_fact_of_its_gpus_and_a_remark(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.tell(gpu())
    bare = describe()
    assert "wsl" not in json.loads(bare.device_facts or "") and remark(bare) is None
    monkeypatch.setattr("platform.release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    host = describe()
    assert json.loads(host.device_facts or "")["wsl"] is True and unfit(_cuda_host()) is None
    told = remark(host)
    assert told is not None and "No Sysmem Fallback" in told
    assert facts.differences(
        json.loads(bare.device_facts or ""), json.loads(host.device_facts or "")
    ) == ["WSL: ? / yes"]


def test_torchs_cuda_is_read_and_torch_is_not_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def installed(text: str) -> str | None:
        (tmp_path / "version.py").write_text(text)
        spec = importlib.util.spec_from_loader("torch", None, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr("workers.hardware.host.find_spec", lambda name: spec)
        return torch_cuda()

    lines = "from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {}\n"
    assert installed(lines.format("'13.0'")) == "13.0"
    assert installed(lines.format("None")) is None
    assert installed("cuda = '12.8'\n") == "12.8", "as versions before wrote it"
    monkeypatch.setattr("workers.hardware.host.find_spec", lambda name: None)
    assert torch_cuda() is None
    monkeypatch.undo()
    before = "torch" in sys.modules
    assert torch_cuda() is None and ("torch" in sys.modules) is before, "the build here is a CPU's"


def test_the_version_comes_from_the_libcuda_in_use() -> None:
    """A forward-compatibility package shows in the second question alone."""

    def library(**answers: int) -> ModuleType:
        module = ModuleType("fake")
        vars(module).update(
            {"NVMLError": ValueError} | {k: lambda v=v: v for k, v in answers.items()}
        )
        return module

    both = {"nvmlSystemGetCudaDriverVersion": 12040, "nvmlSystemGetCudaDriverVersion_v2": 13000}
    assert nvml.cuda_version(library(**both)) == "13.0"
    assert nvml.cuda_version(library(nvmlSystemGetCudaDriverVersion=12080)) == "12.8"
    assert nvml.cuda_version(library()) is None


def test_a_run_here_is_refused_before_ray_starts(fake: FakeNvml, tmp_path: Path) -> None:
    """With the CPU build that the tests have."""
    fake.tell(gpu())
    file = tmp_path / "one.yaml"
    file.write_text("name: one\nbase: {model: {name: mixtral-8x7b, weights: dummy}}\n")
    request = Request(sweep=file, out=tmp_path / "out", address="local", json=True)
    with pytest.raises(ClusterError, match=r"1 x NVIDIA H100 80GB HBM3, but the CPU builds"):
        execute(request)
    assert not (tmp_path / "out").exists()
