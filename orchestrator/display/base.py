"""What a display shows, and what it must be able to do.

The run loop hands over a snapshot of its whole state, often; a display decides what of it
is worth a line or a redraw. So the loop knows nothing of terminals, and a display can be
tested on values. `update` may be called many times a second: it only remembers or
compares, and never waits for a terminal to be drawn on.

A terminal that goes away (a closed pipe, a dropped connection) ends the display, never
the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from workers.contract.outcome import OUTCOMES, Outcome

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneView:
    """One process and what it is doing."""

    node: str
    """Host name."""
    devices: str
    """Devices it holds, in words."""
    group_id: str
    """Empty while idle."""
    label: str
    """What sets the group's engine apart."""
    stage: str
    """load | warmup | run | close | idle."""
    since_s: float
    """Seconds in this stage."""
    trial: str
    """The trial at hand, in words."""
    trials_done: int
    trials_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """One engine and its trials."""

    group_id: str
    label: str
    devices: int
    trials: int
    done: int
    outcomes: Mapping[Outcome, int]
    throughput_tok_s: float | None
    """Of the trial that was measured last."""
    state: Literal["waiting", "running", "done"]
    disturbed: int = 0
    """Records of it that something else disturbed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """A trial that did not end `ok`, and why: the first of its group with that reason."""

    label: str
    """Of its group; empty where it is in none."""
    outcome: Outcome
    reason: str

    @property
    def line(self) -> str:
        """In words."""
        return ": ".join(filter(None, (self.label, self.outcome, self.reason)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A whole run at one moment."""

    sweep: str
    profile: str
    device: str
    elapsed_s: float
    eta_s: float | None
    """Seconds left; null while nothing is known."""
    trials_total: int
    resumed: int
    """Trials that an earlier run settled."""
    counts: Mapping[Outcome, int]
    """Terminal records by outcome, resumed ones included."""
    lanes: tuple[LaneView, ...]
    groups: tuple[GroupView, ...]
    whys: tuple[Why, ...]
    """Why trials were not `ok`, once per group and reason, in the order in which they ended."""
    busy_share: float | None
    """Time in passes over time in which devices were held."""
    disturbed: int = 0
    """Records that something else disturbed, resumed ones included."""


class Display(Protocol):
    """Something that people watch a run on. A context manager: leaving it closes it."""

    def update(self, snapshot: Snapshot) -> None:
        """Takes the newest state."""

    def say(self, line: str) -> None:
        """Shows one line beside the state."""

    def close(self) -> None:
        """Ends; the last state stays visible. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class QuietDisplay(Display):
    """Shows nothing: standard output belongs to `--json`."""

    def update(self, snapshot: Snapshot) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def choose(*, plain: bool, json: bool, console: Console) -> Display:
    """The display that fits: none for `--json`, plain lines where there is no terminal.

    Args:
        plain: the user asked for plain lines.
        json: the user asked for machine-readable output.
        console: where to draw; the caller's own, apart from descriptors 1 and 2.
    """
    if json:
        return QuietDisplay()
    if plain or not console.is_terminal or console.is_dumb_terminal:
        from orchestrator.display.plain import PlainDisplay

        return PlainDisplay(console)
    from orchestrator.display.live import LiveDisplay

    return LiveDisplay(console)


@contextmanager
def surviving_its_terminal() -> Iterator[None]:
    """Drawing is given up where the terminal is gone; the run goes on."""
    try:
        yield
    except (OSError, ValueError):
        pass  # ValueError: the file was closed
    except SystemExit:
        pass  # rich's own answer to a closed pipe


def span(seconds: float) -> str:
    """A duration as people say it: `12 s`, `3 min 05 s`, `2 h 05 min`, `1 d 04 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def counted(outcomes: Mapping[Outcome, int]) -> str:
    """Outcomes that occurred, in the vocabulary's order: `ok 70 · oom 8`."""
    return " · ".join(f"{name} {outcomes[name]}" for name in OUTCOMES if outcomes.get(name))


def rate(tok_s: float | None) -> str:
    """Tokens per second with three digits or more: `3.14`, `31.4`, `3,141`."""
    if tok_s is None:
        return "–"
    return f"{tok_s:.2f}" if tok_s < 10 else f"{tok_s:.1f}" if tok_s < 100 else f"{tok_s:,.0f}"
