"""What killed drivers leave, and a few of the faults of `inject.py`, once each."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from orchestrator import cluster


def test_folders_of_dead_drivers_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = Path(tempfile.mkdtemp(prefix=cluster.SESSION))
    lock = cluster._held(living)
    dead = Path(tempfile.mkdtemp(prefix=cluster.SESSION))
    (dead / "vllm_dist_abc").touch()
    segment = Path("/dev/shm") / "vllm_dist_abc_rank0"
    segment.touch()
    another = tmp_path / "somebody-elses"
    another.mkdir()
    cluster._clear_sessions()
    assert sorted(tmp_path.iterdir()) == sorted([living, another])
    assert not segment.exists()
    cluster._clear(living, lock)
    assert list(tmp_path.iterdir()) == [another]
