"""Peaks that were measured on this machine: kept, read back, and measured where missing.

A calibration takes seconds and needs torch, so it runs once per machine, in a process of
its own (`workers.engines.calibrate`): no thread pool or memory of it is left in an engine's
process, and nothing here loads torch. What it found is kept in the user's cache under what
it holds for: the device, the cores in use and the version of torch.

Two lanes of one run may ask at once. Measured together, each would find half of what the
machine can do; so measuring is done under a lock, and who had to wait takes the other's
result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from workers import caches
from workers.hardware.host import Host

QUIET = 0.1
"""Share of the cores that others may have while a calibration counts as undisturbed."""
_FORMAT = 1
"""Of the stored file; another one is as if absent."""
_ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.05


class CalibrationError(RuntimeError):
    """The device could not be calibrated; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What one device was seen to reach. Rates are the best of several repeats."""

    device: str
    """Device as `Host.device` names it."""
    kind: Literal["cpu", "cuda"]
    threads: int
    """CPU threads that measured."""
    torch_version: str
    bandwidth_gb_s: float
    """Most memory traffic that any pattern reached, 10⁹ bytes per second."""
    patterns_gb_s: Mapping[str, float]
    """Traffic by access pattern: read, copy, triad; bytes read and bytes written count."""
    array_gib: float
    """What one pass of the patterns goes over, far more than the caches hold; GiB."""
    tflops: Mapping[str, float]
    """Rate of a large matrix product by data type (`bf16`, `fp32`, …), 10¹² operations per
    second; without those that the device or torch cannot do."""
    overhead_s: float
    """Time of a linear layer too small to compute anything, seconds."""
    spread: Mapping[str, float]
    """How far the median of the last run's repeats stays below the best of all, as a share
    of the best; by pattern and data type. Large where the machine is shared."""
    others: float
    """Share of the cores' time that other processes had meanwhile, in the quietest run; above
    `QUIET` the rates are too low to be called peaks."""
    runs: int
    """Measurements that this is the best of."""
    measured_at: float
    """End of the measurement, seconds since 1970."""
    seconds: float
    """What the measurement took, without starting the process."""

    def dumps(self) -> str:
        """As a line of JSON."""
        return json.dumps({"format": _FORMAT} | asdict(self), allow_nan=False)

    @classmethod
    def loads(cls, text: str) -> Calibration:
        """Back from JSON.

        Raises:
            ValueError: it is not JSON, of another format, or holds an impossible figure.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError("not a calibration of this format")
        if set(data) != {field.name for field in fields(cls)}:
            raise ValueError("other fields than a calibration has")
        _check(data)
        return cls(**data)


def stored(host: Host) -> Calibration | None:
    """The calibration that was kept for the device of `host`; null if there is none.

    A file that is torn, or of another device, is as if it were not there.
    """
    try:
        found = Calibration.loads(_path(host).read_text())
    except (OSError, ValueError):
        return None
    return found if _holds_for(found, host) else None


def store(calibration: Calibration, host: Host) -> Calibration:
    """Adds a measurement to what is kept for the device of `host`; what is kept now.

    That is the best of each figure: what disturbs a measurement only makes it slower, and
    not all that does can be seen from inside a virtual machine.

    Raises:
        OSError: the cache folder cannot be written.
    """
    there = stored(host)
    kept = calibration if there is None else _best(there, calibration)
    path = _path(host)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(kept.dumps() + "\n")
    draft.replace(path)
    return kept


def _best(old: Calibration, new: Calibration) -> Calibration:
    patterns = _higher(old.patterns_gb_s, new.patterns_gb_s)
    tflops = _higher(old.tflops, new.tflops)
    overhead = min(old.overhead_s, new.overhead_s)
    reached = {**new.patterns_gb_s, **new.tflops, "overhead": 1 / new.overhead_s}
    best = {**patterns, **tflops, "overhead": 1 / overhead}
    return replace(
        new,
        bandwidth_gb_s=max(old.bandwidth_gb_s, new.bandwidth_gb_s),
        patterns_gb_s=patterns,
        tflops=tflops,
        overhead_s=overhead,
        spread={
            name: 1 - (1 - share) * reached[name] / best[name] for name, share in new.spread.items()
        },
        others=min(old.others, new.others),
        runs=old.runs + new.runs,
    )


def _higher(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    return {name: max(old.get(name, 0.0), new.get(name, 0.0)) for name in {**old, **new}}


def calibrated(host: Host, *, timeout_s: float = 120.0) -> Calibration:
    """The stored calibration of the device of `host`, else a new one.

    Raises:
        CalibrationError: there is none and it could not be measured.
    """
    return stored(host) or calibrate(host, timeout_s=timeout_s)


def calibrate(host: Host, *, timeout_s: float = 120.0) -> Calibration:
    """Measures the device of `host` (this machine) in a process of its own, and adds that to
    what is kept.

    If another process is measuring already, waits for it and takes its result. The machine
    should be idle: what else runs makes the rates too low (see `Calibration.others`).

    Raises:
        CalibrationError: torch is missing, the measurement failed or took longer than
            `timeout_s` (waiting included), or the cache cannot be written.
    """
    if host.torch_version is None:
        raise CalibrationError("torch is not installed, and the measurement needs it")
    asked_at = time.time()
    deadline = time.monotonic() + timeout_s
    try:
        with _alone(deadline):
            found = stored(host)
            if found is None or found.measured_at < asked_at:
                found = store(_measured(host, deadline - time.monotonic()), host)
            return found
    except OSError as error:
        raise CalibrationError(f"the calibration cannot be kept: {error}") from error


def _measured(host: Host, timeout_s: float) -> Calibration:
    command = [sys.executable, "-m", "workers.engines.calibrate", "--json"]
    command += ["--device", "cuda" if host.gpus else "cpu", "--threads", str(host.cpus)]
    found_first = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    try:
        run = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": found_first},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CalibrationError(f"the measurement took longer than {timeout_s:.0f} s") from error
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if line.strip()]
        last = said[-1].strip() if said else "it said nothing"
        raise CalibrationError(f"the measurement ended with status {run.returncode}: {last}")
    try:
        found = Calibration.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise CalibrationError(f"the measurement gave no result: {error}") from error
    if not _holds_for(found, host):
        raise CalibrationError(
            f"{found.device} was measured with {found.threads} threads, but "
            f"{host.device} with {host.cpus} was asked for"
        )
    return found


def _holds_for(calibration: Calibration, host: Host) -> bool:
    return (
        calibration.device == host.device
        and calibration.torch_version == host.torch_version
        and calibration.kind == ("cuda" if host.gpus else "cpu")
        and (host.gpus > 0 or calibration.threads == host.cpus)
    )


def _path(host: Host) -> Path:
    cores = None if host.gpus else host.cpus
    key = json.dumps([host.device, cores, host.torch_version])
    return _folder() / f"peaks-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _folder() -> Path:
    return caches.own()


@contextlib.contextmanager
def _alone(deadline: float) -> Iterator[None]:
    """Holds the lock that lets one calibration at a time run on this machine."""
    _folder().mkdir(parents=True, exist_ok=True)
    with (_folder() / "peaks.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CalibrationError("another calibration is still running") from None
                time.sleep(_POLL_S)
        yield  # closing the file gives the lock back


def _check(data: Mapping[str, Any]) -> None:
    """Refuses what no measurement gives; the file may come from anywhere."""
    patterns, tflops = data["patterns_gb_s"], data["tflops"]
    if not isinstance(patterns, dict) or not isinstance(tflops, dict):
        raise ValueError("rates by pattern and data type are mappings")
    alone = (
        "bandwidth_gb_s",
        "overhead_s",
        "array_gib",
        "measured_at",
        "seconds",
        "threads",
        "runs",
    )
    for name, value in {**{key: data[key] for key in alone}, **patterns, **tflops}.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}, not a positive number")
    others = data["others"]
    if not isinstance(others, int | float) or not 0 <= others < math.inf:
        raise ValueError(f"others is {others!r}, not a share")
    if not isinstance(data["spread"], dict):
        raise ValueError("spread is a mapping")
    if "bf16" not in tflops:
        raise ValueError("bf16 was not measured")
