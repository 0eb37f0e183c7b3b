"""`python -m analysis`: figures and tables of datasets.

What each command needs is imported inside it, so that `--help` answers at once. A message
on standard error and status 2 answer the user's mistakes; a traceback is a defect.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analysis.catalogue_commands import asks, devices, models, plan
from analysis.errors import AnalysisError, DatasetError, OptionError
from analysis.options import Options
from workers.output import command

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table
    from rich.text import Text

    from analysis.figures.figure import Figure


class _Refusal(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AnalysisError as error:
            raise _Refusal(str(error)) from error


_datasets = click.argument(
    "datasets", metavar="[DATASET…]", nargs=-1, type=click.Path(path_type=Path)
)
_only = click.option(
    "--only",
    metavar="COLUMN=VALUE",
    multiple=True,
    help="Take only these records; repeatable, the same column twice means either.",
)


_drift = click.option(
    "--correct-drift",
    is_flag=True,
    help="Scale times to the machine's usual speed, by the reference loads around each trial: "
    "prompts by multiplying matrices, decoding by reading memory.",
)


@click.group(cls=_Commands)
def main() -> None:
    """Figures and tables of what was measured, and what follows from the catalogues.

    DATASET is a folder DIR/SWEEP.
    """


@main.command()
def figures() -> None:
    """List the figures, with the paper's figure that each reproduces."""
    from analysis.figures.registry import FIGURES

    width = max(len(_names(figure.name, figure.aliases)) for figure in FIGURES)
    for figure in FIGURES:
        names = _names(figure.name, figure.aliases)
        click.echo(f"{names:<{width}}  {figure.title} ({figure.paper})")


@main.command()
@click.argument("name")
@_datasets
@click.option(
    "-o",
    "--output",
    "outputs",
    metavar="FILE",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="File to write, .png, .svg, .html or .csv; repeatable.",
)
@_only
@_drift
@asks
def figure(
    name: str,
    datasets: tuple[Path, ...],
    outputs: tuple[Path, ...],
    only: tuple[str, ...],
    correct_drift: bool,
    **asked: Any,
) -> None:
    """Draw the figure NAME and print what follows from it.

    Figures of records need a DATASET; figures of the catalogues take --model and so on.
    """
    from analysis import marks
    from analysis.figures.registry import find
    from analysis.figures.write import check, write

    chosen = find(name)
    for path in outputs:
        check(path)
    frame = _frame(chosen, datasets, only, Options(**asked), correct_drift=correct_drift)
    for path in outputs:
        write(chosen, frame, path)
    click.echo(chosen.insight(frame))
    for said in marks.lines(frame):
        click.echo(f"{said}.")


@main.command()
@_datasets
@_only
@click.option("--figure", "name", metavar="NAME", help="Show the grid of this figure instead.")
@click.option("--every", is_flag=True, help="Show superseded records of repeated trials too.")
@click.option("--json", "as_json", is_flag=True, help="Write a list of objects instead.")
@_drift
@asks
def table(
    datasets: tuple[Path, ...],
    only: tuple[str, ...],
    name: str | None,
    every: bool,
    as_json: bool,
    correct_drift: bool,
    **asked: Any,
) -> None:
    """Show one row per trial, or with --figure what that figure draws."""
    from analysis import marks
    from analysis.figures.registry import find
    from analysis.insights import summary
    from analysis.tables import pivot_table, reasons, records_table, show

    if name is not None:
        chosen = find(name)
        frame = _frame(
            chosen, datasets, only, Options(**asked), every=every, correct_drift=correct_drift
        )
        shown: list[Table | Text] = [pivot_table(pivot) for pivot in chosen.pivots(frame)]
        sentence = chosen.insight(frame)
        for said in marks.lines(frame):
            sentence += f" {said}."
    else:
        if not datasets:
            raise OptionError("a table of records: name a DATASET, or a --figure of the catalogues")
        Options(**asked).over(Options(), takes=(), what="a table of records")
        frame = _records(datasets, only, every=every, correct_drift=correct_drift).collect()
        shown = [records_table(frame), *reasons(frame)] if len(frame) else []
        sentence = summary(frame)
    if as_json:
        _write_json(frame.to_dicts())
        return
    if shown:
        show(*shown)
    click.echo(sentence)


@main.command()
@click.argument("trial_id")
@_datasets
@_only
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of replays; the new record is in DIR/<name of the sweep>.  [default: replays]",
)
@click.option(
    "--print", "printed", is_flag=True, help="Write the sweep of this point; run nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Write one object instead.")
@click.option(
    "--across-models",
    is_flag=True,
    help="Measure and compare too where the model, draft or text is another one by now.",
)
def replay(
    trial_id: str,
    datasets: tuple[Path, ...],
    only: tuple[str, ...],
    out: Path | None,
    printed: bool,
    as_json: bool,
    across_models: bool,
) -> None:
    """Measure the trial of a record again, alone, and show both.

    TRIAL_ID is its identity, or the first digits of it. Without a DATASET, those in results
    are searched. Where the files behind its names are other ones by now, what differs is named
    and nothing is measured, unless --across-models asks for it. Ends with the exit status of
    python -m orchestrator.
    """
    from analysis.replay import check, find, rebuilt, run, written
    from analysis.replay_tables import replay_facts, replay_table, sentences
    from analysis.tables import show

    if printed and (as_json or out is not None):
        raise OptionError(f"--print runs nothing: it takes no {'--json' if as_json else '--out'}")
    found = find(trial_id, _replayable(datasets), only)
    text = written(found, rebuilt(found))
    if printed:
        click.echo(text, nl=False)
        check(found, text, across_models=across_models)
        return
    status, again = run(
        found, text, out or Path("replays"), quiet=as_json, across_models=across_models
    )
    facts = replay_facts(found, again, status=status, across_models=across_models)
    if as_json:
        _write_json(facts)
    else:
        if again is not None:
            show(replay_table(facts))
        for sentence in sentences(facts):
            click.echo(sentence)
    sys.exit(status)


def _replayable(datasets: tuple[Path, ...]) -> tuple[Path, ...]:
    """The given datasets or, where none is, those in the folder that sweeps write to."""
    from analysis.dataset import is_dataset

    found = datasets or tuple(
        path for path in sorted(Path("results").glob("*")) if is_dataset(path)
    )
    if not found:
        raise OptionError("name the DATASET of the record: there is none in results")
    _exist(found)
    return found


def _frame(
    chosen: Figure,
    datasets: tuple[Path, ...],
    only: tuple[str, ...],
    options: Options,
    *,
    every: bool = False,
    correct_drift: bool = False,
) -> pl.DataFrame:
    """What `chosen` draws: from datasets or from the catalogues, never from both."""
    from analysis import load
    from analysis.figures.figure import CatalogueFigure, RecordsFigure

    if isinstance(chosen, CatalogueFigure):
        if datasets or only or correct_drift:
            given = "--only" if only else "--correct-drift"
            given = f"dataset ({datasets[0]})" if datasets else given
            raise OptionError(
                f"figure {chosen.name!r} comes from the catalogues: it takes no {given}"
            )
        return chosen.frame(options)
    assert isinstance(chosen, RecordsFigure)
    if not datasets:
        raise OptionError(f"figure {chosen.name!r} is drawn from records: name a DATASET")
    options.over(Options(), takes=(), what=f"figure {chosen.name!r}")
    records = _records(datasets, only, every=every, correct_drift=correct_drift)
    return chosen.prepare(records, *(load.table(one, *datasets) for one in chosen.beside))


def _records(
    datasets: tuple[Path, ...],
    only: tuple[str, ...],
    *,
    every: bool = False,
    correct_drift: bool = False,
) -> pl.LazyFrame:
    from analysis import load
    from analysis.conditions import only as choose

    _exist(datasets)
    return choose(load(*datasets, every=every, correct_drift=correct_drift), only)


def _exist(datasets: tuple[Path, ...]) -> None:
    """Raises DatasetError for a folder that is no dataset."""
    from analysis.dataset import is_dataset

    for folder in datasets:
        if not is_dataset(folder):
            near = sorted(path for path in folder.glob("*") if is_dataset(path))
            hint = (
                f"did you mean {near[0]}?" if near else "it has neither records/ nor manifest.json"
            )
            raise DatasetError(f"no dataset in {folder}; {hint}")


def _write_json(answer: object) -> None:
    import json

    json.dump(answer, sys.stdout, default=datetime.isoformat, allow_nan=False, indent=1)
    sys.stdout.write("\n")


for _command in (plan, models, devices):
    main.add_command(_command)


def _names(name: str, aliases: tuple[str, ...]) -> str:
    return ", ".join((name, *aliases))


if __name__ == "__main__":
    command(lambda: main(prog_name="python -m analysis"))
