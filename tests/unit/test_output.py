"""Standard output that is closed, gone, full or ASCII, under real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lengthy

ROOT = Path(__file__).resolve().parents[2]
MODELS = "-m analysis models"
PLAN = f"-m orchestrator {ROOT}/sweeps/hparam.yaml --dry-run --profile h100"


def _shell(command: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", command.replace("PY", sys.executable)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("asked", [MODELS, f"{PLAN} --json"])
def test_a_full_disk_is_one_line_and_status_1(asked: str) -> None:
    done = _shell(f"PY {asked} >/dev/full")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "error: standard output cannot be written to: No space left on device"
    ]


def test_a_closed_output_and_a_reader_that_left_are_no_fault() -> None:
    closed = _shell(f"PY {PLAN} >&- 2>&- <&-")
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, b"", b"")
    left = _shell(f"PY {MODELS} | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}")
    assert (left.returncode, left.stderr) == (0, b"")


def test_a_reader_that_left_hides_no_fault() -> None:
    left = _shell("PY -m orchestrator none.yaml | true; exit ${PIPESTATUS[0]}")
    assert left.returncode == 2
    assert left.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "ascii_only",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
    ],
)
def test_ascii_output_can_be_read(ascii_only: dict[str, str]) -> None:
    done = _shell(f"PY {PLAN}", **ascii_only)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "ffn_dim 14336 - num_experts 16 - top_k 8" in text


@pytest.mark.parametrize("asked", ["figures", "plan --model deepseek-r1 --tpot 0.1 --batch 1"])
def test_ascii_reaches_what_click_prints_too(asked: str) -> None:
    done = _shell(f"PY -m analysis {asked}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and len(done.stdout) > 500


def test_characters_that_look_like_none_have_their_numbers() -> None:
    prepare_text = "from workers.output import prepare; prepare(); print('a × b … 漢 \\udc80 ≤ 1')"
    done = _shell(f'PY -c "{prepare_text}"', PYTHONIOENCODING="ascii")
    assert done.stdout == b"a x b ... \\u6f22 \\udc80 <= 1\n"


def test_what_opens_first_does_not_become_standard_output(tmp_path: Path) -> None:
    file = tmp_path / "file"
    code = (
        "from workers.output import prepare; prepare()\n"
        f"held = open({str(file)!r}, 'w')\n"
        "print('to nobody', flush=True)\n"
        "import subprocess; subprocess.run(['echo', 'nor this'])\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    assert _shell(f"PY {script} >&-").returncode == 0
    assert file.read_bytes() == b""
