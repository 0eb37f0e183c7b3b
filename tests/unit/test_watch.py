"""The counters of this process, read around work of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from workers import disturbance
from workers.contract.reading import Reading
from workers.hardware.watch import Watch


def _busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture
def one_core() -> object:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield min(before)
    os.sched_setaffinity(0, before)


def _read(watch: Watch, seconds: float) -> Reading:
    watch.begin()
    _busy(seconds)
    return watch.end()


def test_a_busy_neighbour_is_seen_on_the_core_that_is_shared(one_core: int) -> None:
    """Both want one core for 0.4 s: the pass waits, others have it, and switches are counted."""
    spin = (
        f"import os, time; os.sched_setaffinity(0, {{{one_core}}}); print('go', flush=True)\n"
        "end = time.monotonic() + 10\nwhile time.monotonic() < end: pass"
    )
    rival = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    watch = Watch()
    try:
        assert rival.stdout is not None
        rival.stdout.readline()
        watch._pids = [os.getpid()]  # the rival is a child, and would count as the engine's
        _read(watch, 0.1)
        found = _read(watch, 0.4)
    finally:
        rival.kill()
        rival.communicate()
        watch.close()
    assert found.cores == 1 and found.machine_cores == os.cpu_count()
    assert found.wall_s == pytest.approx(0.4, rel=0.5)
    assert found.run_delay_s is not None and found.run_delay_s > 0.1
    assert found.others_cpu_s is not None and found.others_cpu_s > 0.05
    assert found.involuntary_switches is not None and found.involuntary_switches > 10
    assert found.own_cpu_s is not None and found.own_cpu_s < 0.35
    verdict = disturbance.of_reading(found)
    assert verdict.disturbed and verdict.reason


def test_threads_that_come_and_go_between_passes_leave_no_file_open() -> None:
    watch = Watch()
    stop = threading.Event()
    more = [threading.Thread(target=stop.wait) for _ in range(4)]
    _read(watch, 0.01)
    alone = len(watch._threads)
    for one in more:
        one.start()
    _read(watch, 0.01)
    assert len(watch._threads) == alone + 4
    stop.set()
    for one in more:
        one.join()
    while len(os.listdir("/proc/self/task")) > alone:  # noqa: PTH208  it takes the kernel a moment
        time.sleep(0.01)
    found = _read(watch, 0.01)
    assert len(watch._threads) == alone and found.own_cpu_s is not None
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    watch.close()
    assert len(os.listdir("/proc/self/fd")) <= held - 2 * alone  # noqa: PTH208


def test_of_very_many_threads_some_are_read_without_staying_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.hardware.watch._MOST_KEPT", 0)
    watch = Watch()
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    found = _read(watch, 0.02)
    assert len(os.listdir("/proc/self/fd")) == held  # noqa: PTH208
    watch.close()
    assert found.own_cpu_s is not None and found.own_cpu_s > 0.001


def test_a_thread_that_ends_within_a_pass_is_no_failure() -> None:
    watch = Watch()
    short = threading.Thread(target=_busy, args=(0.02,))
    short.start()
    watch.begin()
    short.join()
    found = watch.end()
    watch.close()
    assert found.run_delay_s is not None and found.check_s > 0
