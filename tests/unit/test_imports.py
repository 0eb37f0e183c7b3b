"""Guards the architecture: which way imports go, who may load what is heavy, what no file names.

The rules hold for imports inside functions too: a late import is still an import of that layer.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "workers", "analysis")
ENGINE_LIBRARIES = ("vllm", "torch", "transformers")
COMMANDS = {"workers/moe/pruning/calibration.py", "workers/moe/upcycle.py"}
"""Commands that work on weights: torch and transformers inside their functions, never vLLM."""
RAY_MODULES = {
    "orchestrator/cluster.py",
    "orchestrator/placement.py",
    "orchestrator/pool.py",
    "workers/actor.py",
}


def _imports(source: str) -> Iterator[str]:
    """Dotted names that `source` imports; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "relative imports hide which way they go"
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _broken_rule(file: str, name: str) -> str | None:
    """Why `file` (a path from the root) may not import `name`, or None if it may."""
    layer = file.split("/")[0]
    if layer == "workers" and _within(name, "orchestrator", "analysis"):
        return "workers know nothing of who runs or reads them"
    if layer == "orchestrator" and _within(name, "analysis"):
        return "orchestrator and analysis meet only on disk"
    if layer == "analysis" and _within(name, "orchestrator"):
        return "orchestrator and analysis meet only on disk"
    open_to_analysis = ("workers.contract", "workers.moe", "workers.hardware", "workers.output")
    if layer == "analysis" and _within(name, "workers") and not _within(name, *open_to_analysis):
        return "analysis reads values, structure and hardware, never an engine"
    if _within(name, "ray") and file not in RAY_MODULES:
        return "Ray stays behind the modules that own it"
    if file in COMMANDS and _within(name, "torch", "transformers"):
        return None
    if _within(name, *ENGINE_LIBRARIES) and not file.startswith("workers/engines/"):
        return "engine libraries stay behind workers/engines"
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = [
        f"{file} imports {name}: {reason}"
        for path in files
        for file in [path.relative_to(ROOT).as_posix()]
        for name in _imports(path.read_text())
        if (reason := _broken_rule(file, name))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("orchestrator/plan.py", "from workers.contract.trial import Trial", True),
        ("orchestrator/plan.py", "def f():\n    import ray", False),
        ("orchestrator/plan.py", "import raylib", True),
        ("orchestrator/plan.py", "from analysis import load", False),
        ("orchestrator/pool.py", "import ray", True),
        ("workers/runner.py", "import orchestrator.plan", False),
        ("workers/runner.py", "import importlib\nimportlib.import_module('torch')", False),
        ("workers/engines/vllm_engine.py", "from vllm import LLM", True),
        ("workers/engines/vllm_engine.py", "import ray", False),
        ("workers/moe/upcycle.py", "def f():\n    import torch", True),
        ("workers/moe/upcycle.py", "def f():\n    import vllm", False),
        ("analysis/load.py", "from workers import moe", True),
        ("analysis/load.py", "from workers import runner", False),
        ("analysis/load.py", "import workers", False),
    ],
)
def test_the_guard_itself(file: str, source: str, allowed: bool) -> None:
    assert all(_broken_rule(file, name) is None for name in _imports(source)) is allowed


@pytest.mark.parametrize(
    "entry", ["orchestrator.__main__", "analysis.__main__", "workers.moe.upcycle"]
)
def test_entry_points_load_nothing_heavy(entry: str) -> None:
    """`--help` and `--dry-run` must answer at once, on machines without an engine too."""
    heavy = {"ray", "pandas", *ENGINE_LIBRARIES}
    code = f"import sys, {entry}; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


FORBIDDEN = re.compile(
    r"\b(pypi|pythonhosted|npmjs|crates)\.(org|com|io)\b"
    r"|download\.pytorch\.org"
    r"|(?<![\w.~/-])/(work|root)/"
)


def test_no_file_names_a_registry_or_this_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listing.stdout.splitlines()]
    assert Path(__file__) in files
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files
        if file.is_file()
        for match in FORBIDDEN.finditer(file.read_text(errors="ignore"))
    ]
    assert not found, "\n".join(found)
