"""Secrets planted everywhere, and every byte that a run leaves searched for them.

The runs are real: the command line, Ray, an engine that prints its arguments, errors that
quote them. What is searched is the output folder, standard output and error, and what
`analysis` makes of the dataset.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from tests.integration.harness import TINY, command, footprint, gone, records, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

CANARIES = {
    "HF_TOKEN": "hf_CanaryOfTheHub00000000000000000",
    "OPENAI_API_KEY": "sk-canary-of-the-endpoint-000000",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0000",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/cloud/0000000000000000000",
    "RAY_AUTH_TOKEN": "ca9a9700000000000000000000000000ca9a9700000000000000000000000000",
    "SOME_SERVICE_PASSWORD": "canary of the service 0",
    "file": "canary-in-the-file-0000",
    "header": "canary-in-a-header-0000",
    "axis 1": "canary-on-an-axis-00001",
    "axis 2": "canary-on-an-axis-00002",
    "override": "canary-in-an-override-0",
    "block": "canary-in-a-block-00000",
    "address": "canary-in-an-address-00",
}
IN_ENVIRONMENT = {name: value for name, value in CANARIES.items() if name.isupper()}
ARGS = {
    "api_key": CANARIES["file"],
    "headers": {"Authorization": f"Bearer {CANARIES['header']}"},
}
OVERRIDES = (
    f"base.engine.args.hf_token={CANARIES['override']}",
    f"base.engine.args.extra={{client_secret: {CANARIES['block']}, n: 1}}",
    f"base.engine.args.endpoint=https://me:{CANARIES['address']}@host.example/v1",
)


def _leaks(*texts: str | bytes, folder: Path | None = None) -> dict[str, list[str]]:
    """Where each canary is found, whole or from its seventh character on."""
    files = {} if folder is None else {p: p.read_bytes() for p in _files(folder)}
    places = {f"text {i}": t.encode() if isinstance(t, str) else t for i, t in enumerate(texts)}
    places |= {str(path): data for path, data in files.items()}
    found: dict[str, list[str]] = {}
    for name, canary in CANARIES.items():
        for place, data in places.items():
            if canary[6:].encode() in data or canary.encode("utf-16-le") in data:
                found.setdefault(name, []).append(place)
        found.setdefault(name, [])
        found[name] += [str(path) for path in files if canary in path.name]
    return {name: where for name, where in found.items() if where}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _run(*arguments: object, module: str = "orchestrator") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | IN_ENVIRONMENT,
    )


def _sweep(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(changes))
    return path


def _predicted(folder: Path) -> Path:
    base = {
        "model": {"name": "mixtral-8x7b", "weights": "dummy"},
        "layout": {"tensor": 4},
        "workload": {"batch_size": 4, "input_tokens": 64, "output_tokens": 8},
        "engine": {"kind": "roofline", "args": ARGS},
    }
    together = {
        "model.top_k": [1, 2, 16],  # the last one is infeasible
        "engine.args.hub_token": [CANARIES["axis 1"], CANARIES["axis 2"], "short"],
    }
    return _sweep(folder, name="tiny", base=base, zip=together)


def test_no_canary_leaves_a_run_or_its_reports(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    path, out = _predicted(tmp_path / "file"), tmp_path / "out"
    asked = (path, *OVERRIDES, "--out", out, "--profile", "h100")
    told = [_run(*asked, "--dry-run"), _run(*asked, "--dry-run", "--json")]
    told += [_run(*asked, "--plain"), _run(*asked, "--json", "--fresh")]
    assert [one.returncode for one in told] == [0, 0, 0, 0], told[-1].stderr
    assert records(out / "tiny").height == 6

    dataset = out / "tiny"
    for name in ("fig9.html", "fig9.svg", "fig9.csv"):
        told.append(_run("figure", "fig9", dataset, "-o", out / name, module="analysis"))
    told += [_run("table", dataset, module="analysis")]
    told += [_run("table", dataset, "--json", module="analysis")]
    assert [one.returncode for one in told[4:]] == [0] * 5, told[-1].stderr

    outputs = [text for one in told for text in (one.stdout, one.stderr)]
    assert _leaks(*outputs, folder=out) == {}
    manifest = (dataset / "manifest.json").read_text()
    assert manifest.count("***") >= 2 * 7, "the runs' settings are there, but for their secrets"
    axes = records(dataset)["axes"].unique().to_list()
    assert any('"engine.args.hub_token": "***"' in one for one in axes)


def test_no_canary_stands_in_what_a_user_is_told_about_mistakes(tmp_path: Path) -> None:
    path = _predicted(tmp_path)
    for override in (
        f"base.engine.arg.hf_token={CANARIES['override']}",
        f"bse.api_key={CANARIES['override']}",
        f"base.engine.args.api_key=[{CANARIES['override']}",
        f"grid.engine.args.api_key={CANARIES['override']}",
        f"cases=[{{engine.args.api_key: {CANARIES['axis 1']}}}, {{engine.args.api_key: "
        f"{CANARIES['axis 1']}}}]",
    ):
        done = _run(path, override, "--dry-run", "--profile", "h100")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert _leaks(done.stdout, done.stderr) == {}


@pytest.mark.engine
def test_no_canary_leaves_an_engine_that_prints_its_arguments(tmp_path: Path) -> None:
    """vLLM logs every argument but a few, and pydantic quotes what it refuses."""
    before = footprint()
    (tmp_path / "file").mkdir()
    token = CANARIES["override"]
    base = TINY["base"] | {"engine": {"eager": True, "args": _told_to_the_engine(token)}}
    refused = {"engine.args.seed": f"https://me:{CANARIES['address']}@host.example/v1"}
    quoted = {"engine.args.seed": IN_ENVIRONMENT["SOME_SERVICE_PASSWORD"]}
    path = _sweep(tmp_path / "file", name="tiny", base=base, cases=[{}, refused, quoted])
    out = tmp_path / "out"
    done = _run(path, "--out", out, "--plain")
    frame = records(out / "tiny").sort("outcome")
    assert frame["outcome"].to_list()[0] == "ok" and frame.height == 3, frame["outcome_reason"]
    assert not gone(before)
    assert _leaks(done.stdout, done.stderr, folder=out) == {}

    (told,) = frame.filter(pl.col("outcome") == "ok")["engine_args"].to_list()
    assert '"hf_token": "***"' in told and '"service_key": "***"' in told
    logs = "".join(one.read_text() for one in (out / "tiny" / "logs").rglob("*.log"))
    assert f"'service_key': '{'*' * len(token)}'" in logs, "printed by the engine, and scrubbed"
    reasons = frame.filter(pl.col("outcome") != "ok")["outcome_reason"].to_list()
    assert all("***" in reason for reason in reasons), reasons


@pytest.mark.slow
@pytest.mark.engine
def test_what_a_killed_driver_left_in_its_logs_is_scrubbed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    token = CANARIES["override"]
    base = TINY["base"] | {"engine": {"eager": True, "args": _told_to_the_engine(token)}}
    path, out = _sweep(tmp_path / "file", name="tiny", base=base), tmp_path / "out"
    driver = subprocess.Popen(
        command(path, "--out", out, "--plain"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | IN_ENVIRONMENT,
    )
    try:
        logs = out / "tiny" / "logs"
        until(lambda: any(token in one.read_text() for one in logs.rglob("*.log")))
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    until(lambda: not _alive_in(out))
    assert _leaks(folder=out) == {"override": [str(one) for one in _with(out, token)]}
    assert _run(path, "--out", out, "--plain").returncode == 0
    assert _leaks(folder=out) == {}


def _told_to_the_engine(token: str) -> dict[str, Any]:
    """vLLM keeps the first of these out of its log by itself."""
    return {"hf_token": token, "additional_config": {"service_key": token}}


def _with(folder: Path, token: str) -> list[Path]:
    return [path for path in _files(folder) if token.encode() in path.read_bytes()]


def _alive_in(folder: Path) -> bool:
    """Whether a log still grows."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*.log")}
    time.sleep(2)
    return sizes != {path: path.stat().st_size for path in folder.rglob("*.log")}
