"""`make test-gpu` without a GPU: every test of `tests/gpu` is in it, in files that can be read
where there is no engine, and what a machine lacks is named."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import first
from tests.gpu.first import PARTS, TORCH, lacks

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests/gpu").glob("test_*.py"))


def _tests(file: Path) -> set[str]:
    body = ast.parse(file.read_text()).body
    return {one.name for one in body if isinstance(one, ast.FunctionDef) and "test_" in one.name}


def test_every_test_has_a_place_and_every_place_a_test() -> None:
    there = {f"{file.name}::{name}" for file in FILES for name in _tests(file)}
    named: set[str] = set()
    for part in PARTS:
        for one in part.tests:
            found = {test for test in there if test == one or test.startswith(f"{one}::")}
            assert found, f"{part.name}: {one} is no test"
            named |= found
    assert there == named


def test_what_needs_one_gpu_fits_the_time() -> None:
    assert sum(part.minutes for part in PARTS if part.gpus == 1) <= 15


@pytest.mark.parametrize("missing", ["vllm", "ray"])
def test_what_a_machine_lacks_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "find_spec", lambda name: None if name == missing else object())
    reasons = {part.name: lacks(part, gpus=1) for part in PARTS}
    assert reasons["replicas"] == (
        "needs vllm" if missing == "vllm" else "needs 2 GPUs, and 1 is here"
    )
    for part in PARTS:
        if part.needs == TORCH:
            assert reasons[part.name] is None
    assert f"needs {missing}" in reasons["the command line"]


@pytest.mark.lengthy
def test_a_machine_with_torch_alone_reads_its_tests() -> None:
    """No vLLM and no Ray, which is what most machines with a GPU have."""
    code = (
        "import sys, pytest\n"
        "for name in ('vllm', 'ray', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', '-p', 'no:xdist',\n"
        "    'tests/gpu/test_torch.py', 'tests/gpu/test_device.py']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_forced_routing_is_drawn_anew" in done.stdout
