"""A table that stands still while a night's work goes through it.

Redrawn by rich's own thread from the newest snapshot, so that clocks tick between events
and the run loop never waits for a terminal. Laying a table out takes a core some 10 ms,
which on a small machine would be taken from the engine under measurement, so it is done
when an event or the next second asks for it, not at each of the four redraws a second.

The picture must fit whatever window it is given, or it scrolls and tears: the rows are
chosen to the line before anything is drawn. What runs comes first, then what finished
last and what waits next; the rest is counted. State is spelt out in words, so nothing is
lost without colour.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from orchestrator.display.base import (
    Display,
    GroupView,
    Snapshot,
    Why,
    rate,
    span,
    surviving_its_terminal,
)
from orchestrator.errors import one_line
from workers.contract.outcome import OUTCOMES, Outcome

REDRAWS_PER_S = 4
LONGEST = 200
"""Characters of a cell before the window cuts it."""
ROOMY = 20
"""Lines from which blank lines and several lines of reasons fit."""
WHY_LINES = 3
_HEAD_LINES = 3

_COLOUR = {
    "ok": "green",
    "oom": "magenta",
    "infeasible": "dim",
    "unsupported": "yellow",
    "timeout": "red",
    "crashed": "red",
    "skipped": "dim",
    "load": "yellow",
    "warmup": "yellow",
    "run": "green",
    "running": "green",
    "close": "dim",
    "idle": "dim",
    "waiting": "dim",
    "done": "",
}


class LiveDisplay(Display):
    """The table, for terminals of at least 10 lines and 60 columns."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: tuple[Snapshot, float] | None = None
        self._closed_at: float | None = None
        self._drawing = False
        self._drawn: tuple[object, _Segments] | None = None
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=REDRAWS_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def update(self, snapshot: Snapshot) -> None:
        """Remembers the newest state; the first one starts the drawing."""
        first = self._latest is None
        self._latest = (snapshot, self._clock())
        if first and self._closed_at is None:
            with surviving_its_terminal():
                self._live.start(refresh=True)
                self._drawing = True

    def say(self, line: str) -> None:
        """Writes one line above the table."""
        with surviving_its_terminal():
            self._live.console.print(Text(one_line(line, 4 * LONGEST)))

    def close(self) -> None:
        """Draws the last state once more and leaves it standing."""
        if self._closed_at is None:
            self._closed_at = self._clock()
            if self._drawing:
                with surviving_its_terminal():
                    self._live.stop()

    def _draw(self) -> RenderableType:
        if self._latest is None:
            return ""
        snapshot, seen_at = self._latest
        now = self._clock() if self._closed_at is None else self._closed_at
        age_s = max(0.0, now - seen_at)
        console = self._live.console
        width, height = console.size
        seen = (
            int(snapshot.elapsed_s + age_s),
            dict(snapshot.counts),
            len(snapshot.whys),
            [(lane.group_id, lane.stage, lane.trial) for lane in snapshot.lanes],
            (width, height),
        )
        if self._drawn is None or self._drawn[0] != seen:
            picture = compose(snapshot, width=width, height=height, age_s=age_s)
            self._drawn = (seen, _Segments(tuple(console.render(picture))))
        return self._drawn[1]


@dataclass(frozen=True, slots=True)
class _Segments:
    """A picture that is laid out already."""

    segments: tuple[Segment, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return self.segments


def compose(snapshot: Snapshot, *, width: int, height: int, age_s: float) -> RenderableType:
    """The whole picture in at most `height` - 1 lines.

    Args:
        snapshot: the newest state.
        width: columns of the terminal.
        height: lines of the terminal.
        age_s: how long ago the snapshot was taken; its clocks have run on since, seconds.
    """
    room = Room.of(snapshot, height)
    gap = [Text()] if room.roomy else []
    parts: list[RenderableType] = [
        *_head(snapshot, width, age_s),
        *gap,
        _lanes(snapshot, room.lanes, width, age_s),
        *gap,
        _groups(snapshot.groups, room.groups, width),
        *(_whys(snapshot, room.whys)),
    ]
    return Group(*parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How many lines each part may have."""

    roomy: bool
    whys: int
    lanes: int
    """Rows below their heading."""
    groups: int
    """Rows below their heading, the counting one included."""

    @classmethod
    def of(cls, snapshot: Snapshot, height: int) -> Room:
        """Shares out `height` - 1 lines: the last one is the cursor's."""
        roomy = height >= ROOMY
        whys = min(len(snapshot.whys), WHY_LINES if roomy else 1)
        left = height - 1 - _HEAD_LINES - (2 if roomy else 0) - whys - 2
        lanes = min(len(snapshot.lanes), max(1, left // 2))
        groups = min(len(snapshot.groups), left - lanes)
        return cls(roomy=roomy, whys=whys, lanes=lanes, groups=max(0, groups))


def _head(snapshot: Snapshot, width: int, age_s: float) -> list[RenderableType]:
    """What runs and since when, a bar, counts."""
    done, total = sum(snapshot.counts.values()), snapshot.trials_total
    times = f"{span(snapshot.elapsed_s + age_s)} elapsed"
    if done < total:
        left = "unknown" if snapshot.eta_s is None else span(snapshot.eta_s - age_s)
        times += f" · ETA {left}"
    title = Text(f"{_cell(snapshot.sweep)} · {_cell(snapshot.profile)}", style="bold")
    title.append(f" · {_cell(snapshot.device)}", style="not bold")
    title.truncate(max(10, width - len(times) - 2), overflow="ellipsis")
    title.append(" " * (width - title.cell_len - len(times)) + times, style="not bold")

    progress = f" {done}/{total} trials · {100 * done // max(1, total)} %"
    length = max(0, width - len(progress))
    full = length * done // max(1, total)
    bar = Text.assemble(("━" * full, "green"), ("─" * (length - full), "dim"), progress)

    counts = _outcomes(snapshot.counts)
    if snapshot.resumed:
        counts.append(f" ({snapshot.resumed} from earlier runs)")
    if snapshot.disturbed:
        counts.append(f" · {snapshot.disturbed} disturbed", "yellow")
    if snapshot.busy_share is not None:
        counts.append(f" · measuring {100 * snapshot.busy_share:.0f} %")
    return [_one_line(line) for line in (title, bar, counts)]


def _lanes(snapshot: Snapshot, rows: int, width: int, age_s: float) -> RenderableType:
    """What each process is doing. Idle ones give way."""
    lanes = sorted(snapshot.lanes, key=lambda lane: lane.stage == "idle")
    several = len({lane.node for lane in lanes}) > 1
    heading = "devices" if rows >= len(lanes) else f"{rows} of {len(lanes)}"
    table = _table()
    _column(table, heading, max_width=max(14, width // 4))
    _column(table, "stage", min_width=13)
    _column(table, "engine", ratio=3)
    if width >= 90:
        _column(table, "trial", ratio=2)
    _column(table, "done", justify="right")
    for lane in lanes[:rows]:
        place = f"{lane.node} {lane.devices}" if several else lane.devices
        stage = Text(f"{lane.stage} {span(lane.since_s + age_s)}", _COLOUR.get(lane.stage, ""))
        busy = lane.stage != "idle"
        cells: list[RenderableType] = [_cell(place), stage, _cell(lane.label)]
        if width >= 90:
            cells.append(_cell(lane.trial))
        cells.append(f"{lane.trials_done}/{lane.trials_total}" if busy else "")
        table.add_row(*(Text(one) if isinstance(one, str) else one for one in cells))
    return table


def _groups(groups: Sequence[GroupView], rows: int, width: int) -> RenderableType:
    """Running groups and their neighbours in the plan."""
    shown, rest = choose_groups(groups, rows)
    table = _table()
    _column(table, "state", min_width=7)
    _column(table, "engine", ratio=1)
    if width >= 100:
        _column(table, "devices", justify="right")
    _column(table, "done", justify="right")
    _column(table, "outcomes", min_width=8, max_width=max(18, width // 3))
    _column(table, "tok/s", justify="right", min_width=6)
    for group in shown:
        cells = [
            Text(group.state, _COLOUR.get(group.state, "")),
            Text(_cell(group.label)),
            Text(f"{group.done}/{group.trials}"),
            _outcomes(group.outcomes, group.disturbed),
            Text(rate(group.throughput_tok_s)),
        ]
        if width >= 100:
            cells.insert(2, Text(str(group.devices)))
        table.add_row(*cells)
    if not rest:
        return table
    return Group(table, _one_line(Text(f"        … and {rest}", style="dim")))


def choose_groups(groups: Sequence[GroupView], rows: int) -> tuple[list[GroupView], str]:
    """The groups for `rows` lines, in their order, and a count of the others in words.

    Where not all fit, one line goes to the count; running groups come first, what is left
    is shared between those that finished last and those that wait next.
    """
    if len(groups) <= rows:
        return list(groups), ""
    at: dict[str, list[int]] = {"running": [], "done": [], "waiting": []}
    for index, group in enumerate(groups):
        at[group.state].append(index)
    room = max(0, rows - 1)
    running = min(len(at["running"]), room)
    room -= running
    done = min(len(at["done"]), max(room // 2, room - len(at["waiting"])))
    waiting = min(len(at["waiting"]), room - done)
    shown = [
        *at["running"][:running],
        *at["done"][len(at["done"]) - done :],
        *at["waiting"][:waiting],
    ]
    hidden = {
        "running": len(at["running"]) - running,
        "done": len(at["done"]) - done,
        "waiting": len(at["waiting"]) - waiting,
    }
    words = ", ".join(f"{count} {state}" for state, count in hidden.items() if count)
    return [groups[index] for index in sorted(shown)], words


def _whys(snapshot: Snapshot, lines: int) -> list[RenderableType]:
    """Why trials were not `ok`, the last ones, newest first."""
    last = snapshot.whys[::-1][:lines]
    return [
        _one_line(Text.assemble((f"{one.outcome}  ", _COLOUR[one.outcome]), _cell(_of(one))))
        for one in last
    ]


def _of(why: Why) -> str:
    return ": ".join(filter(None, (why.label, why.reason)))


def _outcomes(outcomes: Mapping[Outcome, int], disturbed: int = 0) -> Text:
    words = [(f"{name} {outcomes[name]}", _COLOUR[name]) for name in OUTCOMES if outcomes.get(name)]
    if disturbed:
        words.append((f"{disturbed} disturbed", "yellow"))
    return Text(" · ").join(Text(*one) for one in words) if words else Text("–", "dim")


def _table() -> Table:
    return Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _column(table: Table, name: str, **how: Any) -> None:
    table.add_column(name, no_wrap=True, overflow="ellipsis", **how)


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _cell(text: str) -> str:
    return one_line(text, LONGEST)
