"""Lines for a file, a pipe or a batch system's log: what changed, once, in order.

The run loop does not tell what happened, it shows what is; so each line here is the
difference between two snapshots. Every line begins with the time since the start and can
be read, and searched, on its own. Where nothing ends for a while, a heartbeat at most
every 30 seconds tells the run from a hung one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from orchestrator.display.base import (
    Display,
    GroupView,
    LaneView,
    Snapshot,
    counted,
    rate,
    span,
    surviving_its_terminal,
)
from orchestrator.errors import one_line
from workers.contract.outcome import OUTCOMES, Outcome

HEARTBEAT_S = 30.0
"""Silence after which a line is written all the same, in seconds."""
LONGEST = 400
"""Characters of a line."""


class PlainDisplay(Display):
    """One line per trial that ends, per group that starts or ends, and per reason of a group."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: Snapshot | None = None
        self._spoke_at = 0.0
        self._closed = False

    def update(self, snapshot: Snapshot) -> None:
        """Writes what changed since the last snapshot."""
        if self._closed:
            return
        last, self._last = self._last, snapshot
        lines = [_begun(snapshot)] if last is None else []
        lines += _changes(last, snapshot)
        if not lines and snapshot.elapsed_s - self._spoke_at >= HEARTBEAT_S:
            lines = [_heartbeat(snapshot)]
        for line in lines:
            self._write(f"{_clock(snapshot.elapsed_s)}  {line}")
        if lines:
            self._spoke_at = snapshot.elapsed_s

    def say(self, line: str) -> None:
        """Writes the line."""
        elapsed = self._last.elapsed_s if self._last else 0.0
        self._write(f"{_clock(elapsed)}  {line}")

    def close(self) -> None:
        """Writes no more."""
        self._closed = True

    def _write(self, line: str) -> None:
        with surviving_its_terminal():
            self._console.print(Text(one_line(line, LONGEST)), soft_wrap=True)


def _begun(snapshot: Snapshot) -> str:
    resumed = f", {snapshot.resumed} of them from earlier runs" if snapshot.resumed else ""
    so_far = f"; so far {counted(snapshot.counts)}" if any(snapshot.counts.values()) else ""
    so_far += f", {snapshot.disturbed} of them disturbed" if snapshot.disturbed else ""
    return (
        f"{snapshot.sweep}: {snapshot.trials_total} trials{resumed}, {len(snapshot.groups)} "
        f"engines to build, profile {snapshot.profile}, {snapshot.device}{so_far}"
    )


def _changes(last: Snapshot | None, snapshot: Snapshot) -> Iterator[str]:
    """A line per start, end and trial between two snapshots."""
    before = {group.group_id: group for group in last.groups} if last else {}
    lanes = {lane.group_id: lane for lane in snapshot.lanes}
    earlier = {lane.group_id: lane for lane in last.lanes} if last else {}
    without = Counter(snapshot.counts)
    without.subtract(last.counts if last else snapshot.counts)
    for group in snapshot.groups:
        old = before.get(group.group_id)
        if old is not None and old.done == group.done and old.state == group.state:
            continue
        if group.state != "waiting" and (old is None or old.state == "waiting"):
            yield f"start   {group.label}{_place(lanes.get(group.group_id))}"
        ended = _gained(old.outcomes if old else {}, group.outcomes)
        for outcome, count in ended.items():
            lane = earlier.get(group.group_id) if sum(ended.values()) == 1 else None
            disturbed = group.disturbed - (old.disturbed if old else 0) if outcome == "ok" else 0
            yield _trials(group, outcome, count, lane, disturbed) + _progress(snapshot)
        if last is not None:
            without.subtract(ended)
        if group.state == "done" and (old is None or old.state != "done"):
            noise = f" · {group.disturbed} disturbed" if group.disturbed else ""
            yield f"end     {group.label}: {counted(group.outcomes) or 'nothing ran'}{noise}"
    for outcome, count in _gained({}, without).items():
        yield f"{outcome}: {count} that need no engine{_progress(snapshot)}"
    for why in snapshot.whys[len(last.whys) if last else 0 :]:
        yield f"why     {why.line}"


def _gained(before: Mapping[Outcome, int], after: Mapping[Outcome, int]) -> dict[Outcome, int]:
    gained = {name: after.get(name, 0) - before.get(name, 0) for name in OUTCOMES}
    return {name: count for name, count in gained.items() if count > 0}


def _place(lane: LaneView | None) -> str:
    return f" on {lane.devices} of {lane.node}" if lane else ""


def _trials(
    group: GroupView, outcome: Outcome, count: int, lane: LaneView | None, disturbed: int
) -> str:
    """`lane` is where the group's only trial since the last snapshot was seen running."""
    times = f" x {count}" if count > 1 else ""
    which = f" · {lane.trial}" if lane and lane.trial else ""
    speed = f", {rate(group.throughput_tok_s)} tok/s" if outcome == "ok" else ""
    noise = ""
    if disturbed:
        noise = f", {disturbed} of them disturbed" if count > 1 else ", disturbed"
    return f"{outcome + times:<7} {group.label}{which}{speed}{noise}"


def _progress(snapshot: Snapshot) -> str:
    return f"  [{sum(snapshot.counts.values())}/{snapshot.trials_total}]"


def _heartbeat(snapshot: Snapshot) -> str:
    running = [lane for lane in snapshot.lanes if lane.stage != "idle"]
    stages = Counter(lane.stage for lane in running)
    at_work = ", ".join(f"{count} in {stage}" for stage, count in stages.items()) or "none at work"
    eta = span(snapshot.eta_s) if snapshot.eta_s is not None else "unknown"
    return f"working: {at_work}, ETA {eta}{_progress(snapshot)}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
