"""The manifest: what surrounds the numbers, without anybody's secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orchestrator import manifest
from orchestrator.store import StoreError

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2025, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))


def begun(run_id: str = "r1") -> manifest.Manifest:
    return manifest.started(
        manifest.empty("hparam"),
        run_id,
        at=START,
        command=["python", "-m", "orchestrator", "sweeps/hparam.yaml", "base.engine.args.token=x"],
        profile="cpu",
        sweep={"name": "hparam", "base": {"engine": {"args": {"api_key": "x", "max_len": 8}}}},
        driver={"host": "a"},
    )


def test_a_run_from_start_to_end() -> None:
    first = begun()
    noded = manifest.with_node(first, "r1", "node1", {"device": "H100", "driver": "580.1"})
    done = manifest.finished(noded, "r1", at=START + timedelta(hours=1), counts={"oom": 2, "ok": 1})
    assert first["runs"][0]["finished_at"] is None
    assert first["runs"][0]["environment"]["nodes"] == {}
    (run,) = done["runs"]
    assert run == {
        "run_id": "r1",
        "started_at": "2025-01-01T10:00:00.000+00:00",
        "finished_at": "2025-01-01T11:00:00.000+00:00",
        "command": [
            "python",
            "-m",
            "orchestrator",
            "sweeps/hparam.yaml",
            "base.engine.args.token=***",
        ],
        "profile": "cpu",
        "sweep": {"name": "hparam", "base": {"engine": {"args": {"api_key": "***", "max_len": 8}}}},
        "counts": {"ok": 1, "oom": 2},
        "environment": {
            "driver": {"host": "a"},
            "nodes": {"node1": {"device": "H100", "driver": "580.1"}},
        },
    }
    with pytest.raises(KeyError, match="r9"):
        manifest.finished(done, "r9", at=START, counts={})


def test_writing_and_reading_back(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert manifest.read(path, "hparam") == manifest.empty("hparam")
    manifest.write(path, begun())
    old = path.stat().st_ino
    assert manifest.read(path, "hparam") == begun()
    manifest.write(path, manifest.finished(begun(), "r1", at=START, counts={"ok": 3}))
    assert path.stat().st_ino != old, "replaced, not rewritten in place"
    assert manifest.read(path, "hparam")["runs"][0]["counts"] == {"ok": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_what_a_later_version_added_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    added: Any = {**begun(), "mood": "fine"}
    added["runs"][0]["weather"] = "rain"
    path.write_text(json.dumps(added))
    again = manifest.finished(manifest.read(path, "hparam"), "r1", at=START, counts={})
    manifest.write(path, again)
    kept = json.loads(path.read_text())
    assert kept["mood"] == "fine"
    assert kept["runs"][0]["weather"] == "rain"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "cannot read"),
        (b"[]", "is no manifest"),
        (b'{"schema_version": 1, "sweep": "hparam", "runs": [1]}', "is no manifest"),
        (b'{"schema_version": 99, "sweep": "hparam", "runs": []}', "newer version"),
        (b'{"schema_version": 1, "sweep": "other", "runs": []}', "belongs to sweep 'other'"),
    ],
)
def test_a_file_that_cannot_be_extended_is_named(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=words) as caught:
        manifest.read(path, "hparam")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*: Not a directory"):
        manifest.write(tmp_path / "file" / "manifest.json", begun())


def test_the_driver_says_where_it_runs() -> None:
    here = manifest.environment()
    assert here["python"] == ".".join(map(str, sys.version_info[:3]))
    assert here["packages"]["pyarrow"] == pa.__version__
    assert here["cpus"] >= 1
    assert here["memory_gib"] > 0
    assert json.loads(json.dumps(here)) == here
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if git.returncode == 0:
        assert here["git"]["commit"] == git.stdout.strip()
    else:
        assert here["git"] is None


def test_asking_for_versions_loads_no_engine() -> None:
    program = (
        "import sys; from orchestrator.manifest import environment; environment();"
        "print([m for m in ('ray', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout == "[]\n"


def test_git_outside_a_checkout_says_nothing(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert manifest._git(tmp_path) is None
    git("init", "-q")
    assert manifest._git(tmp_path) is None, "no commit yet"
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-q", "-m", "first")
    clean = manifest._git(tmp_path)
    assert clean is not None
    assert clean["dirty"] is False
    assert len(clean["commit"]) == 40
    (tmp_path / "f").write_text("2")
    assert manifest._git(tmp_path) == {"commit": clean["commit"], "dirty": True}
    assert manifest._git(inner) is None, "somebody else's repository"
