"""Who else wanted the cores: differences of what the kernel counts, and the kernel itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from workers.hardware import cgroup
from workers.hardware.contention import Cores, Snapshot, Thread, between, snapshot

FIRST = Snapshot(
    at=100.0,
    cores=frozenset({0, 1}),
    threads={
        (7, 7): Thread(run_s=10.0, wait_s=1.0, involuntary=5),
        (7, 8): Thread(run_s=4.0, wait_s=0.0, involuntary=0),
    },
    time=Cores(busy_s=50.0, stolen_s=2.0),
    pressure_s=3.0,
    throttled_s=None,
)
LAST = Snapshot(
    at=102.0,
    cores=frozenset({0, 1}),
    threads={
        (7, 7): Thread(run_s=11.0, wait_s=1.5, involuntary=25),
        (7, 9): Thread(run_s=0.5, wait_s=0.25, involuntary=1),  # began in between
    },
    time=Cores(busy_s=52.5, stolen_s=2.4),
    pressure_s=4.0,
    throttled_s=None,
)


def test_the_difference_of_two_snapshots() -> None:
    found = between(FIRST, LAST)
    assert (found.wall_s, found.cores) == (2.0, 2)
    assert (found.run_s, found.wait_s, found.involuntary) == (1.5, 0.75, 21)
    assert found.waiting == pytest.approx(1 / 3)
    assert found.others == pytest.approx((2.5 - 1.5) / 4)  # of 2 cores over 2 s
    assert found.stolen == pytest.approx(0.1)
    assert found.pressure == pytest.approx(0.5)
    assert found.throttled is None


def test_what_the_system_does_not_tell_is_null_and_never_nothing() -> None:
    silent = {key: Thread(run_s=None, wait_s=None, involuntary=None) for key in LAST.threads}
    blind = replace(LAST, threads=silent, time=None, pressure_s=None)
    found = between(replace(FIRST, threads={}), blind)
    assert (found.run_s, found.wait_s, found.involuntary) == (None, None, None)
    assert (found.waiting, found.others, found.stolen, found.pressure) == (None,) * 4
    moved = between(FIRST, replace(LAST, cores=frozenset({0})))
    assert moved.others is moved.stolen is None  # times of other cores have no difference
    ended = between(FIRST, replace(LAST, threads={}))
    assert ended.run_s is ended.others is None


def test_a_process_on_the_same_core_is_seen_as_waiting() -> None:
    """Two processes that want all of one core: each waits about half of the time."""
    core = min(os.sched_getaffinity(0))
    spin = (
        f"import os, time; os.sched_setaffinity(0, {{{core}}}); print('go', flush=True)\n"
        "end = time.monotonic() + 10\nwhile time.monotonic() < end: pass"
    )
    rival = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    own = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    try:
        assert own.stdout is not None
        own.stdout.readline()
        first = snapshot([own.pid])
        time.sleep(0.5)
        found = between(first, snapshot([own.pid]))
    finally:
        for one in (rival, own):
            one.kill()
            one.communicate()
    if found.waiting is None:
        pytest.skip("this kernel keeps no schedstat")
    assert found.cores == 1
    assert found.waiting > 0.2
    assert found.others is not None
    assert found.others > 0.1


def test_a_process_that_is_gone_has_no_threads() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert snapshot([gone.pid]).threads == {}


def test_the_tightest_quota_counts_and_both_versions_are_read(tmp_path: Path) -> None:
    one = tmp_path / "one" / "cpu" / "box"
    one.mkdir(parents=True)
    (tmp_path / "groups").write_text("4:memory:/m\n1:cpu,cpuacct:/box\n0::/elsewhere\n")
    assert [*cgroup._find(tmp_path / "groups", tmp_path / "one")] == [one, one.parent]
    two = tmp_path / "two"
    (two / "a" / "b").mkdir(parents=True)
    (two / "cgroup.controllers").touch()
    (tmp_path / "groups").write_text("0::/a/b\n")
    folders = [*cgroup._find(tmp_path / "groups", two)]
    assert folders == [two / "a" / "b", two / "a", two]
    (two / "a" / "cpu.max").write_text("150000 100000\n")
    (two / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cgroup.quota_of(folders) == 1.5
    (one / "cpu.cfs_quota_us").write_text("50000\n")
    (one / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup.quota_of([one]) == 0.5
    (one / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup.quota_of([one]) is None
