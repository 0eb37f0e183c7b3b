"""Keeps every test closed to the outside, and in the tier that it belongs to.

Closed: no usage report, no hub, no open Ray port. Set here, before any test imports Ray or vLLM,
because both read their environment once; the processes that tests start inherit it. A token of
this session's own keeps Ray from writing one into the home folder and from joining a cluster that
is not ours.

Tiers: a folder gives its tests their marks, `tests/unit` and `tests/golden` may have none, and a
test without a mark that loads an engine or joins Ray fails. Folders of which nothing can be wanted
are not read: their imports take longer than the small tests of a file.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import own
from tests.run import PINNED, TALLY

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
MARKS = {
    "contract": ("engine",),
    "cluster": ("cluster",),
    "integration": ("engine", "cluster"),
    "gpu": ("gpu",),
}
"""Marks of every test in a folder."""
SMALL = ("unit", "golden")
"""Folders without engines and without Ray."""

settings.register_profile("suite", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("suite")

_tally = os.environ.pop(TALLY, None)
"""A pytest that a test starts counts for itself."""


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if os.environ.get(PINNED) and worker.startswith("gw"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    if worker:
        own.claim()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != HERE:
        return None
    unwanted = config.getoption("markexpr", "")
    return any(f"not {mark}" in unwanted for mark in MARKS.get(collection_path.name, ())) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        for mark in MARKS.get(folder, ()):
            item.add_marker(mark)
        has = [mark for mark in ("engine", "cluster", "gpu") if item.get_closest_marker(mark)]
        if folder in SMALL and has:
            raise pytest.UsageError(
                f"{item.nodeid} is marked {has[0]}: tests of {' and '.join(SMALL)} start neither "
                "engines nor Ray"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that brings in an engine or Ray without saying so would slow the small ones."""
    before = _started()
    result = yield
    for mark in _started() - before:
        if not (item.get_closest_marker(mark) or item.get_closest_marker("gpu")):
            pytest.fail(f"it starts what @pytest.mark.{mark} stands for, and is not marked")
    return result


def _started() -> set[str]:
    """Marks of what this process holds by now."""
    ray = sys.modules.get("ray")
    joined = getattr(ray, "is_initialized", bool)()
    return {
        *(["engine"] if "vllm" in sys.modules else []),
        *(["cluster"] if joined else []),
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _tally is None:
        return
    found = {kind: len(some) for kind, some in terminalreporter.stats.items() if kind and some}
    Path(_tally).write_text(json.dumps(found))
