"""The default tests in parts, told together: `python -m tests.run [PYTEST ARGUMENT…]`.

Small tests (no engine, no Ray) run in two processes, file by file or test by test as they come.
Tests of engines that a process holds by itself run in two processes too, each bound to a core of
its own, or threads of one would wait for threads of the other; a file stays in one process, since
its tests share engines. Tests that start Ray run in two processes as well; each has a place of its
own for temporary files, and looks at its own processes only (`tests/own.py`). What needs every core
for itself (ranks, calibration, peaks) comes last and alone.

Every part gets the arguments. Where these choose tests by their marks (`-m slow`), there is one
part, which is pytest's as it is. The last line has pytest's form and adds all parts up; the exit
status is 0 only if no part failed and one had tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_USUAL = "not slow and not gpu"
_BIG_ONLY = ("--ignore=tests/unit", "--ignore=tests/golden")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One run of pytest."""

    name: str
    arguments: tuple[str, ...]
    pinned: bool = False
    """Whether each of its processes has a core of its own (`tests/conftest.py` binds it)."""


PARTS: tuple[Part, ...] = (
    Part(
        name="small tests, two processes",
        arguments=(
            *("-n2", "--dist=worksteal", "-m"),
            f"not engine and not cluster and {_USUAL}",
        ),
    ),
    Part(
        name="engines, two processes with a core each",
        arguments=(
            *("-n2", "--dist=loadfile", *_BIG_ONLY, "-m"),
            f"engine and not cluster and not alone and {_USUAL}",
        ),
        pinned=True,
    ),
    Part(
        name="Ray, two processes",
        arguments=(
            # A wait within Ray hears no signal: where it does not end, its process is ended.
            *("-n2", "--dist=loadfile", "-o", "timeout_method=thread", *_BIG_ONLY, "-m"),
            f"cluster and not alone and {_USUAL}",
        ),
    ),
    Part(
        name="whole machine, one process",
        arguments=(*_BIG_ONLY, "-m", f"(cluster or engine) and alone and {_USUAL}"),
    ),
)
TALLY, PINNED = "MOE_SWEEP_TEST_TALLY", "MOE_SWEEP_TEST_PINNED"
"""Variables for `tests/conftest.py`: where to count, and whether to bind processes to cores."""
NO_TESTS = 5
"""pytest's exit status where nothing was left to run."""
_ENDED = (2, 3, 4)
"""Those after which no further part makes sense: interrupted, internal error, wrong usage."""
_ORDER = ("failed", "error", "passed", "skipped", "xfailed", "xpassed", "warnings")


def parts_for(arguments: Sequence[str]) -> tuple[Part, ...]:
    """All parts; one, where the arguments choose by marks themselves."""
    if any(one.startswith(("-m", "--markexpr")) for one in arguments):
        return (Part(name="tests as asked", arguments=()),)
    return PARTS


def status_of(statuses: Sequence[int]) -> int:
    """The first failure; `NO_TESTS` only where no part had tests."""
    failures = [one for one in statuses if one not in (0, NO_TESTS)]
    if failures:
        return failures[0]
    return 0 if 0 in statuses else NO_TESTS


def closing(counts: Mapping[str, int], seconds: float) -> str:
    """`2 failed, 2870 passed in 512.30s`, as pytest ends."""
    words = [
        f"{number} {kind if number != 1 else kind.removesuffix('s')}"
        for kind in _ORDER
        if (number := counts.get(kind, 0))
    ]
    return f"{', '.join(words) or 'no tests ran'} in {seconds:.2f}s"


def main(arguments: Sequence[str]) -> int:
    """Runs the parts; the exit status."""
    began, total, lines = time.monotonic(), Counter[str](), []
    statuses: list[int] = []
    for part in parts_for(arguments):
        print(f"== {part.name}", flush=True)
        start = time.monotonic()
        status, counts = _run(part, arguments)
        statuses.append(status)
        total += counts
        lines.append(f"{part.name}: {closing(counts, time.monotonic() - start)}")
        if status in _ENDED or (status not in (0, NO_TESTS) and _stops_at_first(arguments)):
            break
    left = len(parts_for(arguments)) - len(statuses)
    print("\n".join(lines))
    if left:
        print(f"{left} more {'part was' if left == 1 else 'parts were'} not run")
    print(f" {closing(total, time.monotonic() - began)} ".center(80, "="), flush=True)
    return status_of(statuses)


def _stops_at_first(arguments: Sequence[str]) -> bool:
    return any(one in ("-x", "--exitfirst") or one.startswith("--maxfail") for one in arguments)


def _run(part: Part, arguments: Sequence[str]) -> tuple[int, Counter[str]]:
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        environment = os.environ | {TALLY: str(tally)} | ({PINNED: "1"} if part.pinned else {})
        command = [sys.executable, "-m", "pytest", *part.arguments, *arguments]
        with subprocess.Popen(command, env=environment) as child, _passing_on(child):
            status = child.wait()
        counts = json.loads(tally.read_text()) if tally.exists() else {}
    return status if status >= 0 else 128 - status, Counter(counts)


@contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C reaches pytest by itself; SIGTERM is passed on. This process waits for its end."""

    def wait(number: int, frame: FrameType | None) -> None: ...

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = signal.signal(signal.SIGINT, wait), signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
