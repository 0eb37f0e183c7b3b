"""`python -m orchestrator SWEEP.yaml [KEY=VALUE …]`.

Only the command line lives here, and only what it needs is imported before it is known
what was asked: `--help` and `--dry-run` load neither Ray nor an engine.
"""

from __future__ import annotations

import json as jsonlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from workers.contract.outcome import FAULTS, RERUNS, Rerun
from workers.output import OutputLost, command

if TYPE_CHECKING:
    from orchestrator.plan import Plan
    from orchestrator.request import Request, SideBySide
    from orchestrator.run import Summary

NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
PIPE_WIDTH = 120
"""Columns of a plan that goes to a file or a pipe, and of a reason."""
SHOWN_REASONS = 8


def _outcomes(ctx: click.Context, param: click.Parameter, value: str) -> frozenset[Rerun]:
    asked = {part.strip() for part in value.split(",") if part.strip()}
    if unknown := sorted(asked.difference(RERUNS)):
        known = ", ".join(RERUNS)
        raise click.BadParameter(f"{', '.join(unknown)}: no such outcome; known are {known}")
    return frozenset(one for one in RERUNS if one in asked)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sweep", type=click.Path(path_type=Path), metavar="SWEEP.yaml")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results"),
    show_default=True,
    help="Folder of datasets; this one is OUT/<name of the sweep>.",
)
@click.option(
    "--sheets",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of activation sheets, which probes fill.  [default: OUT/_activation-sheets]",
)
@click.option("--profile", help="Device class to plan for.  [default: what the cluster has]")
@click.option(
    "--address",
    help="Ray cluster.  [default: RAY_ADDRESS, else a running one, else a local one]",
)
@click.option("--dry-run", is_flag=True, help="Show the plan; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable standard output.")
@click.option("--plain", is_flag=True, help="Plain lines instead of a live table.")
@click.option("--fresh", is_flag=True, help="Ignore earlier results instead of resuming.")
@click.option(
    "--rerun",
    callback=_outcomes,
    metavar="OUTCOME[,…]",
    default="",
    help="Run trials again that ended this way, for example: crashed,timeout; or that something "
    "else disturbed: disturbed.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Run at most this many trials.")
@click.option(
    "--no-skip",
    is_flag=True,
    help="Run points too that need no less memory than one that ran out of it; those that an "
    "earlier run skipped are run now.",
)
@click.option(
    "--node-wait",
    type=click.FloatRange(min=0),
    default=900,
    show_default=True,
    metavar="SECONDS",
    help="Wait for nodes that trials need, where they can be asked for or went away.",
)
@click.option(
    "--side-by-side",
    type=click.Choice(["check", "always", "never"]),
    default="check",
    show_default=True,
    help="Engines on one machine at the same time, each on GPUs of its own: where a check shows "
    "that figures stay within 2 %, always, or never.",
)
def main(
    sweep: Path,
    overrides: tuple[str, ...],
    out: Path,
    sheets: Path | None,
    profile: str | None,
    address: str | None,
    dry_run: bool,
    as_json: bool,
    plain: bool,
    fresh: bool,
    rerun: frozenset[Rerun],
    limit: int | None,
    no_skip: bool,
    node_wait: float,
    side_by_side: SideBySide,
) -> None:
    """Measures every point of a sweep and keeps the records as an Arrow dataset.

    KEY=VALUE overrides the sweep file, for example base.workload.batch_size=4 or
    grid.model.top_k=[1,2].

    Exit status: 0 every trial has a terminal record and none crashed or timed out, 1 some
    did, 2 the sweep or the arguments are wrong, 3 the cluster cannot be reached, lost its
    head or can never run a trial, 130 interrupted.
    """
    from orchestrator.request import Request

    request = Request(
        sweep=sweep,
        overrides=overrides,
        out=out,
        sheets=sheets,
        profile=profile,
        address=address,
        fresh=fresh,
        rerun=rerun | {"skipped"} if no_skip else rerun,
        limit=limit,
        no_skip=no_skip,
        side_by_side=side_by_side,
        node_wait_s=node_wait,
        plain=plain,
        json=as_json,
    )
    sys.exit(_explained(request, dry_run=dry_run))


def _explained(request: Request, *, dry_run: bool) -> int:
    """Exit status; whatever a user can cause ends in one line on standard error."""
    from orchestrator.errors import ClusterError, HeadLost, SweepError
    from orchestrator.request import planned_here
    from workers.hardware.device import UnknownDevice

    try:
        if dry_run:
            plan, notes = planned_here(request)
            _show_plan(plan, [*notes, *_notes(request, plan)], as_json=request.json)
            return 0
        return _run(request)
    except (SweepError, UnknownDevice) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HeadLost as error:
        _leave(f"error: {error}", 3)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        _leave("interrupted before the first trial", 130)


def _leave(last_words: str, status: int) -> NoReturn:
    """Ends the process at once. Ray's way out of the interpreter waits for a head that is gone,
    and crashes after a beginning that was interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    print(last_words, file=sys.stderr, flush=True)
    os._exit(status)


def _run(request: Request) -> int:
    from orchestrator.run import execute
    from orchestrator.store import StoreError

    try:
        summary = execute(request)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _show_summary(summary, as_json=request.json)
        sys.stdout.flush()
    except OutputLost as lost:
        return lost.answer(summary.status, f"the records are in {summary.dataset}")
    return summary.status


def _show_plan(plan: Plan, notes: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        import msgspec

        told = plan.to_json() | ({"notes": notes} if notes else {})
        text = msgspec.json.encode(told).decode()
        print(NOT_ASCII.sub(lambda found: _escaped(found[0]), text))
        return
    from rich.console import Console

    from orchestrator.display.preview import preview

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(preview(plan, notes))


def _notes(request: Request, plan: Plan) -> list[str]:
    """What the plan says; which names nobody can resolve; which trials will find no activation
    sheet, and what is none."""
    said = [*plan.notes, *filter(None, [plan.by_name])]
    if not plan.asks_for_sheets:
        return said
    from orchestrator.sheets import shelf

    missing = shelf(request, said.append).missing(plan.groups)
    return [*said, *filter(None, [plan.by_name, missing])]


@cache
def _escaped(text: str) -> str:
    """As JSON spells it for terminals and pipes of any encoding."""
    return jsonlib.dumps(text)[1:-1]


def _show_summary(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        print(
            jsonlib.dumps(
                {
                    "sweep": summary.sweep,
                    "run_id": summary.run_id,
                    "dataset": str(summary.dataset),
                    "trials": summary.trials,
                    "resumed": summary.resumed,
                    "outcomes": dict(summary.counts),
                    "disturbed": summary.disturbed,
                    "seconds": summary.seconds,
                    "busy_share": summary.busy_share,
                    "interrupted": summary.interrupted,
                    "reasons": [asdict(one) for one in summary.reasons],
                }
            )
        )
        return
    made = sum(summary.counts.values())
    words = ", ".join(f"{count} {outcome}" for outcome, count in summary.counts.items())
    if summary.disturbed:
        words += f", {summary.disturbed} disturbed"
    print(f"{made} of {summary.trials} trials have a record: {words or 'none'}")
    if summary.disturbed:
        print(
            "disturbed: something else took part in their figures (column disturbed_reason); "
            "--rerun disturbed measures them again"
        )
    if summary.resumed:
        print(f"{summary.resumed} of them from earlier runs (--fresh measures them again)")
    for line in _reasons(summary):
        print(line)
    print(f"dataset  {summary.dataset}")
    dataset = shlex.quote(str(summary.dataset))
    print(f"table    python -m analysis table {dataset}")
    print("figures  python -m analysis figures     (lists their names)")
    print(f"draw     python -m analysis figure NAME {dataset} -o NAME.png")
    if summary.interrupted:
        print("interrupted: the same command goes on where this one stopped")


def _reasons(summary: Summary) -> Iterator[str]:
    """Why trials did not end `ok`: a line each, and where to read on."""
    from orchestrator.errors import one_line

    if not summary.reasons:
        return
    yield "why"
    for one in summary.reasons[:SHOWN_REASONS]:
        yield f"{one.trials:>6} {one.outcome:<11} {one_line(one.text, PIPE_WIDTH)}"
        if one.log is not None and one.outcome in FAULTS | {"unsupported"}:
            yield f"{'log':>10}         {summary.dataset / one.log}"
    if (left := len(summary.reasons) - SHOWN_REASONS) > 0:
        yield f"       and {left} more reasons, which the table has"


if __name__ == "__main__":
    command(lambda: main(prog_name="python -m orchestrator"))
