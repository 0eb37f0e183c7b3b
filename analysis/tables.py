"""Records and figures as tables in a terminal, readable without colour."""

from __future__ import annotations

import sys

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import preempted
from analysis.conditions import varying
from analysis.disturbed import MARK
from analysis.figures.figure import Pivot
from analysis.insights import percent
from analysis.marks import mark
from analysis.subtitle import subtitle

_MOST_REASONS = 8
_STYLES = {"ok": "green", "oom": "yellow", "crashed": "red", "timeout": "red"}
_HEADINGS = (
    *("tokens/s", "TTFT\nms", "TPOT\nms", "ITL\nms"),
    *("peak\nGiB", "limit\nGiB", "time ÷\npredicted"),
)

_WIDE, _ENDLESS = 500, 10_000
"""Characters of a line in a file or a pipe, and where nothing is ever wrapped."""
_SHARES = {"s_mbu": "S-MBU", "s_mfu": "S-MFU"}
"""Columns with headings, shown where a record has them."""
_EXPECTED = ("uniform", "dense")
"""Sources of the number of experts behind S-MBU that need no probe; others are shown."""


def show(*renderables: Table | Text) -> None:
    """Print on standard output, as wide as the terminal or as the widest table needs: a line
    that the terminal wraps can be read, a number cut short cannot."""
    paper = Console(width=_ENDLESS)
    tables = [paper.measure(one).maximum for one in renderables if isinstance(one, Table)]
    width = Console().width if sys.stdout.isatty() else _WIDE
    Console(width=max([width, *tables]), highlight=False).print(*renderables, sep="\n")


def records_table(records: pl.DataFrame) -> Table:
    """One row per trial: what tells it from the others, how it ended, its headline figures.

    Conditions that all records share stand in the title instead of in a column.
    """
    sweeps = ["sweep"] if records.get_column("sweep").n_unique() > 1 else []
    varied = [*sweeps, *varying(records)]
    title = Text("\n".join(subtitle(records)))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("trial", overflow="ellipsis", min_width=6)
    for name in varied:
        table.add_column(name.replace("_", "_\n", 1), no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    shares = [name for name in _SHARES if records.get_column(name).count()]
    for name in (*_HEADINGS, *(_SHARES[share] for share in shares)):
        table.add_column(name, justify="right", no_wrap=True)
    sources = records.get_column("activation_source").drop_nulls()
    told = not sources.is_in(_EXPECTED).all()
    if told:
        table.add_column("experts\nfrom", no_wrap=True)
    for row in records.sort(varied, nulls_last=True).iter_rows(named=True):
        cells = [_text(row["trial_id"]), *(_text(row[name]) for name in varied), _outcome(row)]
        cells += [Text(figure) for figure in _figures(row)]
        cells += [Text("" if row[one] is None else f"{100 * row[one]:.3g} %") for one in shares]
        cells += [_text(row["activation_source"])] if told else []
        table.add_row(*cells)
    return table


def reasons(records: pl.DataFrame) -> list[Text]:
    """What disturbed some; then why trials are not `ok`, or what of them is not known though they
    are: a line per outcome and reason, the most frequent first."""
    groups = (
        records.filter((pl.col("outcome") != "ok") | pl.col("outcome_reason").is_not_null())
        .with_columns(pl.col("outcome_reason").fill_null("no reason recorded"))
        .group_by("outcome", "oom_stage", "outcome_reason")
        .len("trials")
        .sort("trials", "outcome", "outcome_reason", descending=[True, False, False])
    )
    noisy = records.filter(pl.col("disturbed").fill_null(False))
    why = noisy.get_column("disturbed_reason").drop_nulls()
    lines = []
    if len(noisy):
        reason = _text(f": {'for instance ' if len(noisy) > 1 else ''}{why[0]}" if len(why) else "")
        lines.append(Text.assemble(f"{len(noisy)} × disturbed ({MARK})", reason))
    if put_back := preempted.line(records):
        lines.append(Text(put_back))
    lines += [
        Text.assemble(f"{row['trials']} × ", _outcome(row), ": ", _text(row["outcome_reason"]))
        for row in groups.head(_MOST_REASONS).iter_rows(named=True)
    ]
    if (left := len(groups) - _MOST_REASONS) > 0:
        lines.append(Text(f"and {left} more reasons (see --json)"))
    return lines


def pivot_table(pivot: Pivot) -> Table:
    """One panel of a figure."""
    table = Table(title=pivot.title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(pivot.corner)
    for column in pivot.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in pivot.rows:
        table.add_row(*(Text(cell, style="yellow" if cell == "OOM" else "") for cell in row))
    return table


def _figures(row: dict[str, object]) -> list[str]:
    width = row["ci_width"]
    interval = f" ±{percent(width / 2)}" if isinstance(width, float) else ""
    milliseconds = [_number(row[name], 1000) for name in ("ttft_s", "tpot_s", "itl_s")]
    memory = [_number(row[name], 1) for name in ("peak_memory_gib", "memory_limit_gib")]
    throughput = _number(row["throughput_tok_s"], 1) + interval
    return [throughput, *milliseconds, *memory, _number(row["prediction_ratio"], 1)]


def _number(value: object, factor: float) -> str:
    """Four significant digits, or nothing."""
    if not isinstance(value, float):
        return ""
    shown = value * factor
    return f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:.4g}"


def _outcome(row: dict[str, object]) -> Text:
    outcome = str(row["outcome"])
    stage = f" ({row['oom_stage']})" if row["oom_stage"] else ""
    style = "yellow" if row.get("disturbed") else _STYLES.get(outcome, "")
    return Text(outcome + stage + mark(row), style=style)


def _text(value: object) -> Text:
    """One printable line: a reason is an engine's output and may hold anything."""
    words = "" if value is None else str(value)
    return Text("".join(letter if letter.isprintable() else " " for letter in words))
