"""`models`, `devices` and `plan`: what follows from the catalogues, without any dataset."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from analysis.errors import OptionError
from analysis.options import Options

Command = TypeVar("Command", bound=Callable[..., Any])

_json = click.option("--json", "as_json", is_flag=True, help="Write a list of objects instead.")

_OPTIONS = (
    click.option("--model", "models", metavar="NAME", multiple=True, help="Repeatable."),
    click.option(
        "--device", "devices", metavar="NAME", multiple=True, help="Device class; repeatable."
    ),
    click.option(
        "--batch", "batches", metavar="N", type=int, multiple=True, help="Batch size; repeatable."
    ),
    click.option(
        "--tpot", "tpot_s", metavar="SECONDS", type=float, help="Longest time per output token."
    ),
    click.option(
        "--context", "--input-tokens", metavar="TOKENS", type=int, help="Tokens in the KV cache."
    ),
    click.option(
        "--dtype", metavar="NAME", help="bf16, fp16, fp32, fp8, int8, mxfp4; auto: as published."
    ),
    click.option(
        "--s-mbu", metavar="SHARE", type=float, help="Share of peak bandwidth that is reached."
    ),
)


def asks(command: Command) -> Command:
    """The options of `analysis.options.Options`, all but --s-mfu, as parameters."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("names", metavar="[NAME…]", nargs=-1)
@_json
def models(names: tuple[str, ...], as_json: bool) -> None:
    """List the catalogue's models; with one NAME, its parameters by kind of layer and part.

    NAME is of the catalogue, a folder with a config.json, or a hub id in the cache. A model whose
    structure is not known has a row without what does not follow. A NAME that means nothing is
    reported after the others, with status 2.
    """
    from analysis.breakdown import breakdown
    from analysis.figures.layers import pivots
    from analysis.listings import about, model_facts, models_table, stored_line
    from analysis.structures import known
    from analysis.tables import pivot_table, show
    from workers.moe.architecture import catalogue
    from workers.moe.structure import Architecture

    chosen = names or tuple(sorted(catalogue()))
    found, wrong = [], []
    for name in chosen:
        try:
            found.append((name, known(name)))
        except OptionError as error:
            wrong.append(str(error))
    if wrong and not found:
        raise OptionError("; ".join(wrong))
    facts = [model_facts(name, a) for name, a in found]
    if as_json:
        write_json(facts)
    else:
        show(models_table(facts))
    for one in facts:
        if one["note"] is not None:
            click.echo(f"{one['name']}: {one['note']}", err=True)
    if wrong:
        raise OptionError("; ".join(wrong))
    if as_json:
        return
    if len(names) == 1 and isinstance(a := found[0][1], Architecture):
        show(*(pivot_table(one) for one in pivots(breakdown(names[0], a))))
        click.echo(stored_line(facts[0]))
        if apart := facts[0]["params_vision"] + facts[0]["params_projector"]:
            click.echo(f"Vision tower and projector, counted apart: {apart:,} parameters.")
    if any(one["verified"] is False for one in facts):
        click.echo("? its configuration was not checked against the published one.")
    for line in (line for name in chosen for line in about(name, whole=len(names) == 1)):
        click.echo(line)


@click.command()
@click.argument("names", metavar="[NAME…]", nargs=-1)
@_json
@click.option("--sources", is_flag=True, help="Show where each device's figures come from.")
def devices(names: tuple[str, ...], as_json: bool, sources: bool) -> None:
    """List the catalogue's devices: dense peaks, and the vendors' sparse ones apart."""
    from analysis.listings import device_facts, devices_table, sources_table
    from analysis.structures import listed
    from analysis.tables import show

    found = sorted(listed(names), key=lambda one: (one.bandwidth_gb_s, one.name))
    facts = [device_facts(one) for one in found]
    if as_json:
        write_json(facts)
        return
    show(sources_table(facts) if sources else devices_table(facts))
    if not sources:
        click.echo("Peaks are dense; unverified figures were not checked against a data sheet.")


@click.command()
@asks
@click.option("--s-mfu", metavar="SHARE", type=float, help="Share of peak FLOP/s reached.")
@click.option(
    "--from",
    "dataset",
    metavar="DATASET",
    type=click.Path(path_type=Path),
    help="Take --s-mbu and --s-mfu from this dataset: medians of what was measured.",
)
@click.option(
    "--devices",
    "most",
    metavar="N",
    type=int,
    default=8,
    show_default=True,
    help="Most devices of a kind, in one node.",
)
@_json
def plan(dataset: Path | None, most: int, as_json: bool, s_mfu: float | None, **asked: Any) -> None:
    """Bandwidth, compute and memory that a model needs, and the devices that have them."""
    from analysis.plan_tables import needs_table, offers_table
    from analysis.planner import DEFAULTS, plan_facts, plans, sentence
    from analysis.reached import experts_behind, reached
    from analysis.structures import listed, structure
    from analysis.tables import show

    options = Options(s_mfu=s_mfu, **asked)
    if not options.models:
        raise OptionError("plan needs a model: --model NAME (python -m analysis models lists them)")
    if most < 1:
        raise OptionError(f"--devices {most}: at least one device is needed")
    defaults, origin = DEFAULTS, "unless given, assumed"
    if dataset is not None:
        if options.s_mbu is not None or options.s_mfu is not None:
            raise OptionError("--from takes S-MBU and S-MFU from a dataset: give no others")
        shares = reached(dataset)
        defaults, origin = shares.over(DEFAULTS), f"medians of what was measured in {dataset}"
        if sources := experts_behind(dataset):
            origin += f", experts {' and '.join(sources)}"
    filled = options.over(defaults)
    structures = [structure(name, filled.dtype or "auto") for name in filled.models]
    found = plans(structures, filled, listed(filled.devices), most)
    if as_json:
        write_json([plan_facts(one) for one in found])
        return
    show(needs_table(found), *filter(None, (offers_table(found, of) for of in structures)))
    for one in found:
        click.echo(sentence(one))
    click.echo(
        "Computed from structure and data sheets, not measured, with experts activated as by "
        "uniform routing; memory is weights and KV cache alone; "
        f"S-MBU {filled.s_mbu:.3g}, S-MFU {filled.s_mfu:.3g} ({origin})."
    )


def write_json(rows: list[dict[str, object]]) -> None:
    """`rows` on standard output, and nothing else there."""
    json.dump(rows, sys.stdout, allow_nan=False, indent=1)
    sys.stdout.write("\n")
