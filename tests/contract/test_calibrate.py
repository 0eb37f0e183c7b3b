"""The calibration, run for real on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.hardware import cpu, peaks
from workers.hardware.caches import cache_bytes
from workers.hardware.cpu import processor
from workers.hardware.device import CPU, device
from workers.hardware.host import Host, describe
from workers.hardware.peaks import Calibration

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What these tests measure is not kept for this machine."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def host() -> Host:
    return processor(describe())


@pytest.fixture(scope="module")
def found(host: Host) -> Calibration:
    return peaks.calibrate(host)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.engines.calibrate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_measures_with_the_engines_threads_over_more_than_the_caches_hold(
    found: Calibration, host: Host
) -> None:
    assert found.threads == host.cpus
    assert found.kind == "cpu"
    array = found.array_gib * 2**30
    assert array > 2 * cache_bytes()
    # Less than 2 GiB only where a quarter of the free memory is less.
    assert array > 1.99 * 2**30 or os.sysconf("SC_AVPHYS_PAGES") * 4096 < 16 * 2**30


def test_its_figures_are_plausible(found: Calibration) -> None:
    assert found.bandwidth_gb_s == max(found.patterns_gb_s.values())
    assert set(found.patterns_gb_s) == {"read", "copy", "triad"}
    assert all(0.5 < rate < 5000 for rate in found.patterns_gb_s.values())
    assert {"bf16", "fp32"} <= set(found.tflops)
    assert all(0.001 < rate < 500 for rate in found.tflops.values())
    assert 1e-7 < found.overhead_s < 1e-2
    assert set(found.spread) == {*found.patterns_gb_s, *found.tflops, "overhead"}
    assert all(0 <= spread < 1 for spread in found.spread.values())
    for share in (found.others, found.stolen, found.waiting):
        assert share is None or 0 <= share <= 1
    assert abs(time.time() - found.measured_at) < 600


def test_it_becomes_the_cpu_of_this_machine(
    found: Calibration, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_here", lambda: host)
    assert peaks.stored(host) == found
    start = time.monotonic()
    kept = peaks.calibrated(host)
    assert kept == found or (not found.quiet and kept.runs > found.runs)
    if found.quiet:  # otherwise it had a look at the machine, and measured again if that was quiet
        assert time.monotonic() - start < 0.5
    # Without instructions for BF16 a kernel multiplies in FP32.
    assert device(CPU).bf16_tflops == max(kept.tflops["bf16"], kept.tflops["fp32"])
    assert device(CPU).bandwidth_gb_s == kept.bandwidth_gb_s


def test_it_finds_the_same_again_within_a_factor_of_two(found: Calibration) -> None:
    ratios = []
    for _ in range(3):  # others on this machine may slow a run, hardly every run alike
        run = _run("--json", "--device", "cpu")
        assert run.returncode == 0, run.stderr
        (line,) = run.stdout.splitlines()
        again = Calibration.loads(line)
        assert again.device == found.device
        ratios.append(again.bandwidth_gb_s / found.bandwidth_gb_s)
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"bandwidth compared with the first run: {ratios}")


def test_on_one_thread_it_is_told_as_another_device(host: Host) -> None:
    run = _run("--device", "cpu", "--threads", "1", "--store")
    assert run.returncode == 0, run.stderr
    assert "1 cores, 1 threads" in run.stdout
    assert "bf16" in run.stdout and "others had" in run.stdout
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "moe-sweep"
    kept = [Calibration.loads(path.read_text()) for path in folder.glob("peaks-*.json")]
    (narrow,) = [one for one in kept if one.threads == 1]
    assert narrow.device == host.device.replace(f"{host.cpus} cores", "1 cores")
    assert narrow.device_digest != host.device_digest


def test_a_process_bound_to_one_core_gets_the_cores_of_the_engine(host: Host) -> None:
    """An engine leaves its process bound to one core; the measurement must not inherit it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        measured = peaks.calibrate(host)
    finally:
        os.sched_setaffinity(0, before)
    assert measured.threads == host.cpus == len(before)


def test_without_torch_or_cuda_it_cannot_run_and_says_so() -> None:
    blocked = "import sys; sys.modules['torch'] = None; sys.argv = ['calibrate', '--json']; "
    code = blocked + "from workers.engines.calibrate import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "torch is not installed" in run.stderr
    if not describe().gpus:
        run = _run("--device", "cuda", "--json")
        assert run.returncode == 2
        assert "finds no CUDA device; try --device cpu" in run.stderr
        assert run.stdout == ""


def test_its_json_is_one_object_without_nan(found: Calibration) -> None:
    assert json.loads(found.dumps())["format"] == 2
    assert Calibration.loads(found.dumps()) == found


def test_fp8_is_multiplied_with_fast_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As engines and data sheets have it; the product itself is torch's, here on a CPU."""
    import torch

    from workers.engines.calibrate import _product

    asked: list[dict[str, object]] = []
    real = torch._scaled_mm

    def watched(*args: object, **kw: object) -> object:
        asked.append(kw)
        return real(*args, **kw)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    _product(torch, "cpu", "fp8", (64, 64, 64), 0.1).work()
    assert [one["use_fast_accum"] for one in asked] == [True]
