"""The displays: what people read, in any window, with and without colour."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.display.base import (
    Display,
    GroupView,
    LaneView,
    QuietDisplay,
    Snapshot,
    Why,
    choose,
    counted,
    rate,
    span,
)
from orchestrator.display.live import LiveDisplay, choose_groups, compose
from orchestrator.display.plain import PlainDisplay

ROOT = Path(__file__).resolve().parents[2]


def console(width: int = 100, height: int = 30, *, terminal: bool = True, **more: Any) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=terminal,
        color_system=None,
        **more,
    )


def written(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def group(index: int, state: str = "waiting", **more: Any) -> GroupView:
    values: dict[str, Any] = {
        "group_id": f"g{index}",
        "label": f"ffn_dim {index} · experts 8",
        "devices": 2,
        "trials": 4,
        "done": 0,
        "outcomes": {},
        "throughput_tok_s": None,
        "state": state,
    }
    if state == "done":
        values |= {"done": 4, "outcomes": {"ok": 3, "oom": 1}, "throughput_tok_s": 1234.0}
    return GroupView(**{**values, **more})


def lane(of: GroupView, devices: str = "gpu 0,1", **more: Any) -> LaneView:
    values: dict[str, Any] = {
        "node": "node1",
        "devices": devices,
        "group_id": of.group_id,
        "label": of.label,
        "stage": "run",
        "since_s": 12.0,
        "trial": "batch 16",
        "trials_done": of.done,
        "trials_total": of.trials,
    }
    return LaneView(**{**values, **more})


def snapshot(*groups: GroupView, **more: Any) -> Snapshot:
    counts: dict[Any, int] = {}
    for one in groups:
        for outcome, count in one.outcomes.items():
            counts[outcome] = counts.get(outcome, 0) + count
    values: dict[str, Any] = {
        "sweep": "hparam",
        "profile": "h100",
        "device": "8 NVIDIA H100",
        "elapsed_s": 100.0,
        "eta_s": 3600.0,
        "trials_total": sum(one.trials for one in groups),
        "resumed": 0,
        "counts": counts,
        "lanes": tuple(
            lane(one, f"gpu {i}") for i, one in enumerate(groups) if one.state == "running"
        ),
        "groups": groups,
        "whys": (),
        "busy_share": None,
    }
    return Snapshot(**{**values, **more})


WHY = Why(label="old", outcome="oom", reason="2 GiB more than there are")
TOO_LONG = Why(label="x" * 300, outcome="crashed", reason="y" * 600)


def many(done: int, running: int, waiting: int) -> tuple[GroupView, ...]:
    states = ["done"] * done + ["running"] * running + ["waiting"] * waiting
    return tuple(group(i, state) for i, state in enumerate(states))


def picture(of: Snapshot, width: int = 100, height: int = 30, age_s: float = 0.0) -> list[str]:
    on = console(width, height)
    on.print(compose(of, width=width, height=height, age_s=age_s))
    return [line.rstrip() for line in written(on).splitlines()]


def test_the_picture_says_what_people_look_for() -> None:
    groups = (group(1, "done"), group(2, "running", done=1, outcomes={"ok": 1}), group(3))
    lines = picture(
        snapshot(*groups, resumed=2, whys=(WHY, replace(WHY, label="new")), busy_share=0.874)
    )
    text = "\n".join(lines)
    assert lines[0].startswith("hparam · h100 · 8 NVIDIA H100")
    assert lines[0].endswith("1 min 40 s elapsed · ETA 1 h 00 min")
    assert lines[1].endswith("5/12 trials · 41 %")
    assert lines[2] == "ok 4 · oom 1 (2 from earlier runs) · measuring 87 %"
    assert re.search(r"gpu 1 +run 12 s +ffn_dim 2 · experts 8 +batch 16 +1/4", text)
    assert re.search(r"done +ffn_dim 1 · experts 8 +2 +4/4 +ok 3 · oom 1 +1,234", text)
    assert re.search(r"running +ffn_dim 2 · experts 8 +2 +1/4 +ok 1 +–", text)
    assert re.search(r"waiting +ffn_dim 3 · experts 8 +2 +0/4 +– +–", text)
    newest, older = lines[-2:]
    assert newest == "oom  new: 2 GiB more than there are"
    assert older == "oom  old: 2 GiB more than there are"


@pytest.mark.parametrize("width", [60, 79, 80, 100, 200])
@pytest.mark.parametrize("height", [10, 11, 19, 20, 24, 60])
@pytest.mark.parametrize("lanes", [0, 1, 8, 64])
def test_the_picture_fits_its_window(width: int, height: int, lanes: int) -> None:
    groups = many(40, lanes, 40)
    long = tuple(replace(one, label=one.label + " · quantization fp8" * 9) for one in groups)
    lines = picture(
        snapshot(*long, whys=(TOO_LONG,) * 5, device="D" * 300, resumed=3, busy_share=0.5),
        width,
        height,
    )
    assert len(lines) <= height - 1
    assert max(map(len, lines)) <= width
    assert "elapsed" in lines[0]
    assert "160/" in lines[1]
    assert any("not" in line or "… and" in line for line in lines), "the rest is counted"
    assert sum(line.startswith("crashed  x") for line in lines) == (1 if height < 20 else 3)
    if lanes:
        assert any(line.startswith("running") for line in lines)
        assert any(" run 12 s" in line for line in lines)
    if height == 60 and lanes == 8:
        assert sum(" run 12 s" in line for line in lines) == lanes


def test_everything_is_shown_where_there_is_room() -> None:
    lines = picture(snapshot(*many(3, 2, 4)), height=40)
    assert sum(line.startswith(("done", "running", "waiting")) for line in lines) == 9
    assert not any("… and" in line for line in lines)


@pytest.mark.parametrize(
    ("done", "running", "waiting", "rows", "shown", "rest"),
    [
        (2, 1, 2, 5, "0 1 2 3 4", ""),
        (9, 1, 9, 6, "7 8 9 10 11", "7 done, 7 waiting"),
        (9, 2, 0, 6, "6 7 8 9 10", "6 done"),
        (0, 2, 9, 6, "0 1 2 3 4", "6 waiting"),
        (9, 9, 9, 4, "9 10 11", "6 running, 9 done, 9 waiting"),
        (9, 1, 9, 1, "", "1 running, 9 done, 9 waiting"),
        (1, 0, 9, 5, "0 1 2 3", "6 waiting"),
    ],
)
def test_running_groups_and_their_neighbours_are_chosen(
    done: int, running: int, waiting: int, rows: int, shown: str, rest: str
) -> None:
    chosen, words = choose_groups(many(done, running, waiting), rows)
    assert [one.group_id for one in chosen] == [f"g{i}" for i in shown.split()]
    assert words == rest


def test_clocks_run_on_between_snapshots() -> None:
    now = snapshot(group(1, "running"))
    lines = picture(now, age_s=75.0)
    assert lines[0].endswith("2 min 55 s elapsed · ETA 58 min 45 s")
    assert any(" run 1 min 27 s" in line for line in lines)
    assert picture(replace(now, eta_s=10.0), age_s=75.0)[0].endswith("ETA 0 s")
    assert picture(replace(now, eta_s=None))[0].endswith("ETA unknown")
    assert picture(snapshot(group(1, "done")))[0].endswith("1 min 40 s elapsed")


def test_idle_processes_give_way_and_nodes_are_named_where_there_are_several() -> None:
    groups = many(0, 3, 0)
    lanes = (
        lane(groups[0], "gpu 0", stage="idle", node="a"),
        lane(groups[1], "gpu 3", stage="load", node="b"),
        lane(groups[2], "gpu 4", stage="idle", node="b"),
    )
    text = "\n".join(picture(snapshot(*groups, lanes=lanes), height=10))
    assert "b gpu 3  load 12 s" in text
    assert "2 of 3" in text
    assert text.count("idle") == 1


def test_what_a_user_wrote_cannot_paint_the_screen() -> None:
    nasty = "[red]x[/red] \x1b[2J\x07\nnext"
    one = group(1, "running", label=nasty)
    text = "\n".join(
        picture(snapshot(one, sweep=nasty, whys=(replace(WHY, label=nasty, reason=""),)), width=140)
    )
    assert text.count("[red]x[/red]") == 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    on = console(terminal=False)
    with PlainDisplay(on) as display:
        display.update(snapshot(one))
        display.say(nasty)
    assert "[red]x[/red]" in written(on)
    assert "\x1b" not in written(on)
    assert len(written(on).splitlines()) == 3


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_the_live_table_ticks_by_itself_and_its_last_state_stays() -> None:
    on = console()
    now = 0.0
    with LiveDisplay(on, clock=lambda: now) as display:
        assert written(on) == ""
        display.update(snapshot(group(1, "running")))
        assert "1 min 40 s elapsed" in written(on)
        now = 5.0
        eventually(lambda: "1 min 45 s elapsed" in written(on))
        display.say("device not clean")
        assert "device not clean" in written(on)
        now = 7.0
        display.update(snapshot(group(1, "done")))
    final = written(on)
    assert "4/4 trials · 100 %" in final
    assert final.rstrip("\x1b[?25h").endswith("\n"), "the prompt starts a new line"
    assert "\x1b[?25h" in final, "the cursor is back"
    assert "\x1b[?1049h" not in final, "no second screen that vanishes"
    display.close()
    display.update(snapshot(group(1)))
    time.sleep(0.3)
    assert written(on) == final


def test_a_display_that_never_saw_a_state_ends_quietly() -> None:
    on = console()
    for display in (LiveDisplay(on), PlainDisplay(on), QuietDisplay()):
        with display:
            pass
    assert written(on) == ""


@pytest.mark.parametrize("terminal", [True, False], ids=["live", "plain"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_terminal_that_goes_away_does_not_end_the_run(terminal: bool, when: str) -> None:
    program = f"""
import os, sys, time
from rich.console import Console
from orchestrator.display.base import Snapshot, choose
def snapshot(elapsed):
    return Snapshot(sweep="s", profile="cpu", device="d", elapsed_s=elapsed, eta_s=None,
        trials_total=1, resumed=0, counts={{}}, lanes=(), groups=(), whys=(), busy_share=None)
console = Console(file=os.fdopen(os.dup(1), "w"), force_terminal={terminal}, _environ={{}})
with choose(plain=False, json=False, console=console) as display:
    if {when == "during"}:
        display.update(snapshot(0.0))
    os.write(2, b"ready\\n")
    sys.stdin.readline()
    for i in range(4):
        display.update(snapshot(31.0 * i))
        display.say("hello")
        time.sleep(0.15)
os.write(2, type(display).__name__.encode())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.flush()
        told = process.stderr.read()
        assert told == ("LiveDisplay" if terminal else "PlainDisplay")
        assert process.wait(10) == 0


def test_plain_lines_tell_each_event_once() -> None:
    on = console(terminal=False)
    with PlainDisplay(on) as display:
        first, second = group(1), group(2)
        display.update(snapshot(first, second, elapsed_s=0, resumed=3, trials_total=11))
        running = replace(first, state="running")
        display.update(snapshot(running, second, elapsed_s=1))
        display.update(snapshot(running, second, elapsed_s=2))
        one = replace(running, done=1, outcomes={"ok": 1}, throughput_tok_s=31.44)
        display.update(snapshot(one, second, elapsed_s=3))
        three = replace(one, done=3, outcomes={"ok": 1, "oom": 2})
        display.update(snapshot(three, second, elapsed_s=4))
        display.say("device not clean")
        four = replace(one, done=4, outcomes={"ok": 1, "oom": 2, "crashed": 1}, state="done")
        display.update(snapshot(four, second, elapsed_s=3725))
        display.update(
            snapshot(
                four,
                second,
                elapsed_s=3726,
                counts={"ok": 1, "oom": 2, "infeasible": 3},
                whys=(WHY, replace(WHY, label="", outcome="infeasible", reason="3 / 2")),
            )
        )
    assert written(on).splitlines() == [
        "0:00:00  hparam: 11 trials, 3 of them from earlier runs, 2 engines to build, "
        "profile h100, 8 NVIDIA H100",
        "0:00:01  start   ffn_dim 1 · experts 8 on gpu 0 of node1",
        "0:00:03  ok      ffn_dim 1 · experts 8 · batch 16, 31.4 tok/s  [1/8]",
        "0:00:04  oom x 2 ffn_dim 1 · experts 8  [3/8]",
        "0:00:04  device not clean",
        "1:02:05  crashed ffn_dim 1 · experts 8 · batch 16  [4/8]",
        "1:02:05  end     ffn_dim 1 · experts 8: ok 1 · oom 2 · crashed 1",
        "1:02:06  infeasible: 3 that need no engine  [6/8]",
        "1:02:06  why     old: oom: 2 GiB more than there are",
        "1:02:06  why     infeasible: 3 / 2",
    ]


def test_a_heartbeat_breaks_a_long_silence() -> None:
    on = console(terminal=False)
    running = group(1, "running")
    with PlainDisplay(on) as display:
        for second in range(0, 100, 5):
            display.update(snapshot(running, elapsed_s=float(second)))
    beats = written(on).splitlines()[2:]
    assert [beat.split()[0] for beat in beats] == ["0:00:30", "0:01:00", "0:01:30"]
    assert beats[0].endswith("working: 1 in run, ETA 1 h 00 min  [0/4]")


def test_long_plain_lines_are_not_folded() -> None:
    on = console(width=40, terminal=False)
    with PlainDisplay(on) as display:
        display.say("word " * 30)
    assert len(written(on).splitlines()) == 1


def test_the_display_fits_the_place() -> None:
    assert isinstance(choose(plain=False, json=False, console=console()), LiveDisplay)
    assert isinstance(choose(plain=True, json=False, console=console()), PlainDisplay)
    pipe = console(terminal=False)
    assert isinstance(choose(plain=False, json=False, console=pipe), PlainDisplay)
    dumb = console(_environ={"TERM": "dumb"})
    assert isinstance(choose(plain=False, json=False, console=dumb), PlainDisplay)
    on = console()
    for plain in (True, False):
        display = choose(plain=plain, json=True, console=on)
        with display:
            display.update(snapshot(group(1)))
            display.say("hello")
        assert written(on) == ""


@pytest.mark.parametrize("make", [LiveDisplay, PlainDisplay, lambda console: QuietDisplay()])
def test_an_update_of_a_thousand_groups_costs_under_a_millisecond(
    make: Callable[[Console], Display],
) -> None:
    """Least of many, so that a busy test machine does not decide."""
    states = [snapshot(*many(400 + i, 8, 592 - i), elapsed_s=1.0) for i in range(30)]
    took = []
    with make(console(terminal=make is not PlainDisplay)) as display:
        display.update(states[0])
        for state in states[1:]:
            start = time.perf_counter()
            display.update(state)
            took.append(time.perf_counter() - start)
    assert min(took) < 1e-3


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7505, "2 h 05 min"),
        (100_800, "1 d 04 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_figures_in_words() -> None:
    assert counted({"skipped": 1, "ok": 2, "oom": 0}) == "ok 2 · skipped 1"
    assert [rate(x) for x in (None, 3.14159, 31.4159, 3141.59)] == ["–", "3.14", "31.4", "3,142"]
