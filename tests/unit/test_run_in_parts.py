"""`make test`: which parts there are, that every test is in one, and what is said at the end."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from tests import run
from tests.run import NO_TESTS, PARTS, closing, parts_for, status_of

ROOT = Path(__file__).resolve().parents[2]


def expression(arguments: tuple[str, ...]) -> str:
    return arguments[arguments.index("-m") + 1]


def _holds(has: dict[str, bool], mark: str, **_: object) -> bool:
    return has[mark]


def test_every_combination_of_marks_is_in_one_part_or_is_left_out_on_purpose() -> None:
    marks = ("engine", "cluster", "alone", "slow", "gpu")
    for bits in range(2 ** len(marks)):
        has = {mark: bool(bits >> place & 1) for place, mark in enumerate(marks)}
        chosen = [
            Expression.compile(expression(part.arguments)).evaluate(partial(_holds, has))
            for part in PARTS
        ]
        assert sum(chosen) == (0 if has["slow"] or has["gpu"] else 1)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], 4),
        (["tests/unit", "-k", "m", "-x"], 4),
        (["-m", "slow"], 1),
        (["-mslow"], 1),
        (["--markexpr=slow"], 1),
        (["--maxfail=1"], 4),
    ],
)
def test_marks_of_the_users_own_make_one_part(arguments: list[str], parts: int) -> None:
    assert len(parts_for(arguments)) == parts


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([0, 0, 0], 0),
        ([0, NO_TESTS, NO_TESTS], 0),
        ([NO_TESTS] * 3, NO_TESTS),
        ([0, 1, 0], 1),
        ([NO_TESTS, 0, 1], 1),
        ([2], 2),
        ([0, 137], 137),
    ],
)
def test_one_failed_part_is_a_failure(statuses: list[int], status: int) -> None:
    assert status_of(statuses) == status


def test_the_last_line_is_pytests() -> None:
    counts = {"passed": 7, "failed": 2, "warnings": 1, "": 30}
    assert closing(counts, 61.5) == "2 failed, 7 passed, 1 warning in 61.50s"
    assert closing({}, 0) == "no tests ran in 0.00s"


SUITE = {
    "unit/test_small.py": "def test_small(): pass\ndef test_other(): pass\n",
    "contract/test_engine.py": "def test_engine(): pass\n",
    "cluster/test_ray.py": "def test_ray(): pass\n",
    "contract/test_ranks.py": "import pytest\n@pytest.mark.alone\ndef test_ranks(): pass\n",
    "gpu/test_gpu.py": "def test_gpu(): assert False\n",
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A checkout with this project's settings and mechanism, and five tests."""
    for name in ("pyproject.toml", "tests/conftest.py", "tests/run.py", "tests/own.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name, text in SUITE.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def ran(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.run", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={  # only the plugins that are needed: each takes its time in every process
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(folder),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "-p xdist -p pytest_timeout",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.lengthy
def test_folders_give_marks_and_one_failure_is_the_whole_runs(suite: Path) -> None:
    (suite / "tests/cluster/test_ray.py").write_text("def test_ray(): assert False\n")
    status, lines = ran(suite)
    assert status == 1
    assert [line.partition(" in ")[0] for line in lines[-5:-1]] == [
        "small tests, two processes: 2 passed",
        "engines, two processes with a core each: 1 passed",
        "Ray, two processes: 1 failed",
        "whole machine, one process: 1 passed",
    ]
    assert " 1 failed, 4 passed in " in lines[-1]


def test_after_wrong_usage_no_further_part_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_run", lambda part, arguments: (4, Counter[str]()))
    assert run.main([]) == 4
    assert "3 more parts were not run" in capsys.readouterr().out


@pytest.mark.lengthy
def test_a_small_test_may_not_be_marked_otherwise(suite: Path) -> None:
    text = "import pytest\n@pytest.mark.engine\ndef test_small(): pass\n"
    (suite / "tests/unit/test_small.py").write_text(text)
    status, _ = ran(suite, "-m", "engine", "tests/unit")
    assert status not in (0, 1, NO_TESTS)


@pytest.mark.lengthy
def test_a_test_that_loads_an_engine_without_its_mark_fails(suite: Path) -> None:
    (suite / "vllm.py").write_text("")
    (suite / "tests/unit/test_small.py").write_text("def test_small():\n    import vllm\n")
    status, lines = ran(suite, "-m", "not engine", "tests/unit")
    assert status == 1
    assert any("@pytest.mark.engine" in line and "not marked" in line for line in lines)
