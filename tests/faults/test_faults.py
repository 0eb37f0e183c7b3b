"""What killed drivers leave, and a few of the faults of `inject.py`, once each."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from orchestrator import cluster
from tests.faults.inject import length
from tests.faults.registry import AT_ANY_MOMENT, FAULTS, NotHere
from tests.faults.scene import play


def test_folders_of_dead_drivers_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = cluster._Session.begin(())
    dead, fresh = (Path(tempfile.mkdtemp(prefix=cluster.SESSION)) for _ in range(2))
    (dead / "vllm_dist_abc").touch()
    segment = Path("/dev/shm") / "vllm_dist_abc_rank0"
    segment.touch()
    another = tmp_path / "somebody-elses"
    another.mkdir()
    for folder in (living.folder, dead, another):
        os.utime(folder, (0, 0))
    cluster._Session.begin(()).end()
    assert sorted(tmp_path.iterdir()) == sorted([living.folder, fresh, another])
    assert not segment.exists()
    living.end()
    assert sorted(tmp_path.iterdir()) == sorted([fresh, another])


QUICK = ("files-spoiled", "second-driver", "other-version")
"""Faults of the default suite; the others take minutes."""


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS],
)
def test_a_fault_costs_nothing_but_what_it_hit(name: str) -> None:
    fault = FAULTS[name]
    length_s = length(fault) if fault.inject in AT_ANY_MOMENT else None
    try:
        row = play(fault, 1, length_s)
    except NotHere as error:
        pytest.skip(str(error))
    assert (row.lost, row.doubled, row.again, row.unreadable) == (0, 0, 0, 0)
    assert row.wrong == [] and row.right == row.planned
    assert row.left == [] and row.gone_s is not None
