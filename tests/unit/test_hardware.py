"""The device catalogue, and the peaks that were measured and kept."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from workers.hardware import cpu, peaks
from workers.hardware.caches import cache_bytes
from workers.hardware.cpu import _reachable
from workers.hardware.device import (
    COMPUTE,
    CPU,
    PEAKS,
    Device,
    UnknownDevice,
    classify,
    device,
    devices,
    names,
    provenance,
)
from workers.hardware.host import Host, describe, device_class
from workers.hardware.peaks import Calibration, CalibrationError

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE: dict[str, Any] = yaml.safe_load(
    (resources.files("workers.hardware") / "catalog" / "devices.yaml").read_text()
)
ENTRIES: dict[str, dict[str, Any]] = CATALOGUE["devices"]
ABOUT = {"kind", "aliases", "detect", "source", "sources", "unverified"}
FIGURES = {field.name for field in fields(Device)} - {
    "name", "kind", "source", "verified", "fp16_tflops",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes what was calibrated on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe-sweep"


# --- the catalogue


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_known_keys_each_with_a_source(entry: str) -> None:
    facts = ENTRIES[entry]
    figures = set(facts) - ABOUT
    assert figures <= FIGURES
    assert {"kind", "source", "bandwidth_gb_s", "bf16_tflops", "memory_gb"} <= set(facts)
    assert facts["kind"] in {"gpu", "soc", "server"}
    assert all(isinstance(facts[key], int | float) and facts[key] > 0 for key in figures)
    # What an entry says about a key must be about a key that it has.
    assert {*facts.get("unverified", ()), *facts.get("sources", {})} <= figures
    for key, origin in provenance(entry).items():
        assert origin.source, key
    assert set(provenance(entry)) == figures


@pytest.mark.parametrize("entry", ENTRIES)
def test_dense_and_sparse_stand_apart_and_are_each_whole(entry: str) -> None:
    facts = ENTRIES[entry]
    for dtype in ("bf16", "fp8"):
        if f"{dtype}_sparse_tflops" in facts:
            share = facts[f"{dtype}_sparse_tflops"] / facts[f"{dtype}_tflops"]
            assert 1.9 <= share <= 2.1
    assert facts.get("fp8_tflops", facts["bf16_tflops"]) >= facts["bf16_tflops"]
    assert facts.get("fp32_tflops", 0) < facts["bf16_tflops"]
    if "memory_gib" in facts:  # the driver never reports more than GiB of that number
        assert 0.85 * facts["memory_gb"] < facts["memory_gib"] <= facts["memory_gb"]


def test_every_source_is_used_and_every_spelling_stands_for_one_device() -> None:
    used = {facts["source"] for facts in ENTRIES.values()}
    used |= {one for facts in ENTRIES.values() for one in facts.get("sources", {}).values()}
    used |= set(CATALOGUE["defaults"]["sources"].values())
    assert used == set(CATALOGUE["sources"])
    spellings = [
        CPU,
        *ENTRIES,
        *(a for facts in ENTRIES.values() for a in facts.get("aliases", ())),
    ]
    assert len(spellings) == len(set(spellings))
    assert set(spellings) == set(names())
    detected = [name for facts in ENTRIES.values() for name in facts.get("detect", ())]
    assert len(detected) == len(set(detected))


@pytest.mark.parametrize(
    ("name", "bandwidth", "bf16", "fp8"),
    [
        ("a100", 2039, 312, None),
        ("a100-pcie", 1935, 312, None),
        ("h100", 3350, 989, 1979),
        ("h100-pcie", 2000, 756, 1513),
        ("h200", 4800, 989, 1979),
        ("b200", 8000, 2250, 4500),
        ("mi300x", 5300, 1307, 2615),
        ("rtx-4090", 1008, 165.2, 330.3),
        ("rtx-a5000", 768, 111.1, None),
    ],
)
def test_no_dense_peak_is_halved(
    name: str, bandwidth: float, bf16: float, fp8: float | None
) -> None:
    found = device(name)
    assert (found.bandwidth_gb_s, found.bf16_tflops, found.fp8_tflops) == (bandwidth, bf16, fp8)
    assert found.verified


def test_a_server_is_the_sum_of_its_gpus() -> None:
    server, gpu = device("dgx-h100"), device("h100")
    assert server.kind == "server"
    assert server.bandwidth_gb_s == 8 * gpu.bandwidth_gb_s
    assert server.bf16_tflops == 8 * gpu.bf16_tflops
    assert server.power_w is not None and gpu.power_w is not None
    assert server.power_w > 8 * gpu.power_w


def test_devices_are_found_by_class_and_alias() -> None:
    assert device("h100") is device("h100-sxm")
    assert [one.name for one in devices()] == list(ENTRIES)
    assert device("dgx-spark").name == "gb10"
    assert device("h100").link_gb_s == 450
    assert device("m3-max").price_usd is None


def test_a_device_is_verified_when_its_peaks_are() -> None:
    assert not device("gh200").verified
    assert device("mi300x").verified  # only its sparse figures are not
    assert not provenance("mi300x")["bf16_sparse_tflops"].verified
    assert not provenance("h100")["price_usd"].verified
    assert "data sheet" in provenance("h100-sxm")["bf16_tflops"].source
    for one in devices():
        found = provenance(one.name)
        assert one.verified == all(found[key].verified for key in PEAKS if key in found)


def test_memory_is_what_the_driver_reports_where_that_is_known() -> None:
    assert device("a100").memory_gib == 80
    assert device("orin-nx").memory_gib == pytest.approx(16e9 / 2**30)


def test_what_has_no_unit_is_computed_in_bf16() -> None:
    a100, h100 = device("a100"), device("h100")
    assert h100.tflops("fp8") == 1979
    assert a100.tflops("fp8") == a100.tflops("bf16") == a100.tflops("fp16") == 312
    assert a100.tflops("int8") == 624
    assert a100.tflops("fp32") == 19.5
    assert device("m3-max").tflops("int8") == 28
    assert h100.tflops("fp4") == 989  # 4-bit weights are unpacked there
    assert device("b200").tflops("fp4") == 9000
    assert device("b200").fp4_sparse_tflops == 18000  # never a peak
    assert all(h100.tflops(compute) > 0 for compute in COMPUTE)
    with pytest.raises(ValueError, match=r"'int4'.*bf16, fp16"):
        h100.tflops("int4")


def test_an_unknown_device_says_how_to_add_or_calibrate_it() -> None:
    with pytest.raises(UnknownDevice, match=r"'h900'.*h100.*devices\.yaml.*engines\.calibrate"):
        device("h900")
    with pytest.raises(UnknownDevice, match=r"'cpu'.*devices\.yaml"):
        provenance(CPU)


# --- the device in hand


def test_a_driver_name_stands_for_one_variant_only() -> None:
    assert classify("NVIDIA H100 80GB HBM3") == "h100"
    assert classify("NVIDIA H200") == "h200"
    assert classify("NVIDIA H20") == "h20"
    assert classify("NVIDIA L4") == "l4"
    assert classify("NVIDIA L40S") == "l40s"
    assert classify("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert classify("AMD Instinct MI300X OAM") == "mi300x"
    for other in (
        "Tesla K80",
        "NVIDIA H20-3e",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    ):
        assert classify(other) is None, other


def test_a_gpu_outside_the_catalogue_is_never_taken_for_another_class() -> None:
    odd = replace(describe(), device="Tesla K80", device_class=classify("Tesla K80"), gpus=1)
    with pytest.raises(UnknownDevice, match=r"Tesla K80 on .* --profile"):
        device_class(odd)
    assert device_class(replace(odd, device_class="h100")) == "h100"


# --- what was measured, and kept


def _here() -> Host:
    return replace(cpu.processor(describe()), torch_version="2.13.0+cpu")


def _calibration(host: Host, **other: Any) -> Calibration:
    found = Calibration(
        device=host.device,
        device_digest=host.device_digest,
        kind="cpu",
        threads=host.cpus,
        torch_version=str(host.torch_version),
        bandwidth_gb_s=25.0,
        patterns_gb_s={"read": 25.0, "copy": 20.0, "triad": 21.0},
        array_gib=2.0,
        tflops={"bf16": 2.5, "fp32": 0.3},
        overhead_s=4e-6,
        spread={"read": 0.02, "bf16": 0.1, "overhead": 0.0},
        others=0.0,
        stolen=0.0,
        waiting=0.01,
        runs=1,
        measured_at=time.time(),
        seconds=5.0,
    )
    return replace(found, **other)


def test_without_a_calibration_the_cpu_is_estimated_in_half_a_second() -> None:
    cpu._estimate.cache_clear()
    start = time.process_time()
    found = device(CPU)
    assert time.process_time() - start < 5.0  # of all threads; far above, for slow machines
    assert found.kind == "cpu" and not found.verified
    assert "estimate" in found.source and "engines.calibrate" in found.source
    assert 0.1 < found.bandwidth_gb_s < 10_000
    assert 0.001 < found.bf16_tflops < 1000
    assert found.memory_gib > 0.5
    assert device(CPU) == found  # once per process


def test_a_calibration_is_read_back_and_becomes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    host = _here()
    monkeypatch.setattr(cpu, "_here", lambda: host)
    assert peaks.stored(host) is None
    kept = peaks.store(_calibration(host), host)
    assert peaks.stored(host) == kept
    assert peaks.calibrated(host) == kept  # measures nothing
    found = device(CPU)
    assert (found.bandwidth_gb_s, found.bf16_tflops, found.fp32_tflops) == (25.0, 2.5, 0.3)
    assert found.tflops("int8") == 2.5
    assert found.verified and "calibrations with torch" in found.source


def test_a_disturbed_calibration_does_not_make_verified_peaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = _here()
    monkeypatch.setattr(cpu, "_here", lambda: host)
    peaks.store(_calibration(host, others=0.3), host)
    assert not device(CPU).verified
    assert "others had 30% of the cores" in device(CPU).source
    peaks.store(_calibration(host, waiting=0.4), host)
    assert not device(CPU).verified
    peaks.store(_calibration(host), host)
    assert device(CPU).verified
    peaks.store(_calibration(host, others=0.9), host)
    assert device(CPU).verified, "a quiet one stands, whatever comes later"
    assert "its threads waited for 1% of their time" in device(CPU).source


def test_the_best_of_all_runs_is_kept() -> None:
    host = _here()
    peaks.store(_calibration(host, others=0.2), host)
    peaks.store(
        _calibration(
            host,
            bandwidth_gb_s=30.0,
            patterns_gb_s={"read": 30.0, "copy": 10.0, "triad": 21.0},
            tflops={"bf16": 1.0, "int8": 2.0},
            overhead_s=8e-6,
            measured_at=2e9,
        ),
        host,
    )
    kept = peaks.stored(host)
    assert kept is not None
    assert kept.patterns_gb_s == {"read": 30.0, "copy": 20.0, "triad": 21.0}
    assert kept.tflops == {"bf16": 2.5, "fp32": 0.3, "int8": 2.0}
    assert (kept.bandwidth_gb_s, kept.overhead_s) == (30.0, 4e-6)
    assert (kept.others, kept.runs, kept.measured_at) == (0.0, 2, 2e9)
    # Its median was 10 % below its own best, so 64 % below the best of both.
    assert kept.spread == pytest.approx({"read": 0.02, "bf16": 0.64, "overhead": 0.5})


def test_a_disturbed_calibration_never_lowers_or_replaces_a_quiet_one() -> None:
    host = _here()
    quiet = peaks.store(_calibration(host), host)
    low = {"patterns_gb_s": {"read": 5.9, "copy": 4.0, "triad": 4.0}, "tflops": {"bf16": 0.4}}
    noisy = _calibration(host, bandwidth_gb_s=5.9, others=0.77, waiting=0.5, **low)
    kept = peaks.store(noisy, host)
    assert kept.quiet
    assert (kept.bandwidth_gb_s, kept.tflops) == (quiet.bandwidth_gb_s, quiet.tflops)
    assert (kept.others, kept.waiting) == (0.0, 0.01)


class _Machine:
    """Measurements and looks that go as they are told, in place of a child and of the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *measured: Calibration) -> None:
        self.left = list(measured)
        self.looks_quiet = True
        monkeypatch.setattr(peaks, "_measured", lambda host, timeout_s: self.left.pop(0))
        monkeypatch.setattr(peaks, "_looks_quiet", lambda: self.looks_quiet)
        monkeypatch.setattr(peaks, "WAIT_S", 0.0)


def _noisy(host: Host, rate: float) -> Calibration:
    return _calibration(
        host, bandwidth_gb_s=rate, patterns_gb_s={"read": rate}, others=0.77, waiting=0.5
    )


def test_a_first_calibration_is_tried_again_until_one_is_quiet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = _here()
    machine = _Machine(monkeypatch, _noisy(host, 5.9), _calibration(host), _noisy(host, 99.0))
    found = peaks.calibrated(host)
    assert (found.bandwidth_gb_s, found.quiet, found.runs) == (25.0, True, 2)
    assert peaks.calibrated(host) == found, "a quiet one is measured once"
    assert len(machine.left) == 1


def test_what_stayed_disturbed_is_kept_unverified_and_measured_at_the_next_quiet_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = _here()
    noise = [_noisy(host, rate) for rate in (5.9, 5.0)]
    machine = _Machine(monkeypatch, *noise, _calibration(host))
    machine.looks_quiet = False
    found = peaks.calibrated(host)
    assert (found.bandwidth_gb_s, found.quiet, found.runs) == (5.9, False, peaks.TRIES)
    assert peaks.calibrated(host) == found, "the machine is as busy as it was"
    machine.looks_quiet = True
    found = peaks.calibrated(host)
    assert (found.bandwidth_gb_s, found.quiet, found.runs) == (25.0, True, 3)


def test_a_try_that_fails_leaves_what_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    host = _here()
    kept = peaks.store(_noisy(host, 5.9), host)
    _Machine(monkeypatch)

    def fails(host: Host, timeout_s: float) -> Calibration:
        raise CalibrationError("no memory")

    monkeypatch.setattr(peaks, "_measured", fails)
    assert peaks.calibrated(host) == kept
    assert peaks.doubted(host) == kept


def test_a_doubted_peak_is_measured_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = _here()
    assert peaks.doubted(host) is None  # nothing is kept, so nothing can be in doubt
    again = [_calibration(host, bandwidth_gb_s=30.0 + n) for n in range(9)]
    machine = _Machine(monkeypatch, *again)
    peaks.store(_calibration(host), host)
    found = peaks.doubted(host)
    assert found is not None and found.bandwidth_gb_s == 30.0
    while peaks.doubted(host) is not None:
        pass
    assert len(machine.left) == 9 - (peaks.MOST_DOUBTS - 1)


def test_a_look_sees_who_has_the_cores() -> None:
    """Every core taken by somebody else is not quiet, whatever else runs on this machine."""
    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    cores = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(cores)]
    try:
        time.sleep(0.5)
        assert not peaks._looks_quiet()
    finally:
        for one in others:
            one.kill()
            one.wait()


def test_the_file_of_0_1_0_is_passed_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lay under the device's name alone, in another format."""
    host = _here()
    old = json.loads(_calibration(host).dumps()) | {"format": 1}
    for name in ("device_digest", "stolen", "waiting"):
        del old[name]
    key = json.dumps([host.device, host.cpus, host.torch_version])
    cache.mkdir(parents=True)
    text = json.dumps(old)
    (cache / f"peaks-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json").write_text(text)
    assert peaks.stored(host) is None
    _Machine(monkeypatch, _calibration(host))
    assert peaks.calibrated(host).runs == 1


def test_a_calibration_holds_for_its_device_cores_and_torch_only() -> None:
    host = _here()
    peaks.store(_calibration(host), host)
    assert peaks.stored(replace(host, cpus=host.cpus + 1)) is None
    assert peaks.stored(replace(host, device="another")) is None
    assert peaks.stored(replace(host, torch_version="9.9")) is None
    assert peaks.stored(replace(host, gpus=1)) is None
    assert peaks.stored(replace(host, device_facts="{}")) is None  # the same name, another machine
    assert peaks.stored(replace(host, hostname="renamed")) is not None


def _file(cache: Path) -> Path:
    (file,) = cache.glob("peaks-*.json")
    return file


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_file_is_as_if_absent(cache: Path, share: float) -> None:
    host = _here()
    peaks.store(_calibration(host), host)
    text = _file(cache).read_text()
    _file(cache).write_text(text[: int(len(text.rstrip()) * share)])
    assert peaks.stored(host) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"device": "another"},
        {"threads": 99},
        {"bandwidth_gb_s": -1.0},
        {"bandwidth_gb_s": "fast"},
        {"tflops": {"fp32": 0.3}},
        {"tflops": {"bf16": None}},
        {"patterns_gb_s": 3},
        {"others": "many"},
        {"waiting": -0.1},
        {"device_digest": "another"},
        {"unheard_of": 1},
    ],
)
def test_a_foreign_file_is_as_if_absent(cache: Path, change: dict[str, Any]) -> None:
    host = _here()
    peaks.store(_calibration(host), host)
    data = json.loads(_file(cache).read_text())
    _file(cache).write_text(json.dumps(data | change))
    assert peaks.stored(host) is None
    _file(cache).write_text(json.dumps(data))
    assert peaks.stored(host) is not None


def test_infinity_is_not_stored_as_a_peak() -> None:
    with pytest.raises(ValueError, match="not a positive number"):
        Calibration.loads(_calibration(_here()).dumps().replace("25.0", "1e999"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        _calibration(_here(), bandwidth_gb_s=float("inf")).dumps()


def _python(folder: Path, body: str) -> str:
    """A stand-in for the interpreter, to see what becomes of a child that fails."""
    script = folder / "child"
    script.write_text(f"#!{sys.executable}\nimport os, sys, time\n{body}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("print('first', file=sys.stderr); sys.exit('no such thing')", "status 1: no such thing"),
        ("os.kill(os.getpid(), 9)", "status -9: it said nothing"),
        ("print('hello')", "gave no result"),
        ("pass", "gave no result"),
        ("time.sleep(30)", "took longer than"),
    ],
)
def test_a_failed_measurement_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    monkeypatch.setattr(sys, "executable", _python(tmp_path, body))
    with pytest.raises(CalibrationError, match=says):
        peaks.calibrate(_here(), timeout_s=0.5 if "sleep" in body else 20)
    assert peaks.stored(_here()) is None


def test_a_measurement_of_another_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _calibration(replace(_here(), device="another"))
    monkeypatch.setattr(sys, "executable", _python(tmp_path, f"print('''{other.dumps()}''')"))
    with pytest.raises(CalibrationError, match="another was measured with"):
        peaks.calibrate(_here())


def test_without_torch_or_a_writable_cache_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match="torch is not installed"):
        peaks.calibrate(replace(_here(), torch_version=None))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CalibrationError, match="cannot be kept"):
        peaks.calibrate(_here())


_LANE = """
import sys
from workers.hardware import cpu, peaks
from workers.hardware.host import describe
from dataclasses import replace
sys.executable = sys.argv[1]
host = replace(cpu.processor(describe()), torch_version="2.13.0+cpu")
print(peaks.calibrate(host).bandwidth_gb_s)
"""


@pytest.mark.lengthy
def test_of_two_lanes_one_measures_and_the_other_takes_its_result(tmp_path: Path) -> None:
    host = _here()
    text = _calibration(host, measured_at=time.time() + 60).dumps()
    runs = tmp_path / "runs"
    # Each run of the child would give another bandwidth.
    body = f"""
with open({str(runs)!r}, 'a') as file: file.write('x')
time.sleep(2)
print('''{text}'''.replace('25.0', '25.' + str(os.getpid())))"""
    command = [sys.executable, "-c", _LANE, _python(tmp_path, body)]
    pipe = subprocess.PIPE
    lanes = [
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for _ in range(2)
    ]
    said = [lane.communicate(timeout=60) for lane in lanes]
    assert [lane.returncode for lane in lanes] == [0, 0], said
    assert runs.read_text() == "x"
    assert said[0] == said[1]
    stored = peaks.stored(host)
    assert stored is not None and stored.bandwidth_gb_s == float(said[0][0])


def test_who_waits_too_long_for_the_lock_is_told(cache: Path) -> None:
    cache.mkdir(parents=True)
    with (cache / "peaks.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CalibrationError, match="another calibration is still running"):
            peaks.calibrate(_here(), timeout_s=0.2)


def test_the_caches_of_this_machine_are_known_or_zero() -> None:
    assert 0 <= cache_bytes() < 2**36
    one = cache_bytes([min(os.sched_getaffinity(0))])
    assert one <= cache_bytes()
    assert cache_bytes([10**6]) == 0


def test_a_type_that_a_cpu_has_no_instructions_for_is_multiplied_in_fp32() -> None:
    slow = {"bf16": 0.0013, "fp32": 0.106, "int8": 0.004}
    assert _reachable(slow) == {"bf16": 0.106, "fp32": 0.106, "int8": 0.106}
    fast = {"bf16": 2.5, "fp32": 0.3, "fp16": 0.2}
    assert _reachable(fast) == {"bf16": 2.5, "fp32": 0.3, "fp16": 0.3}
