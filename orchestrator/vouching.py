"""What resuming says of the machines behind old records, a line each.

A record counts for this machine where the facts of its device agree (`workers.hardware.facts`).
Those of 0.1.0 hold the device's name alone, which machines of very different speed share: they are
taken by name, and it is said. Those that agree in name and differ in facts are measured again, and
it is said what differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import polars as pl

from orchestrator.store import Guard
from workers.hardware.facts import briefly, differences, loads

COLUMNS = ("device_facts",)
"""Columns of `records` that are needed beside those of resuming."""


def machines(
    records: pl.DataFrame, resumed: Collection[str], guards: Iterable[tuple[Guard, str | None]]
) -> Iterator[str]:
    """Lines for the user.

    Args:
        records: terminal records, with `COLUMNS`.
        resumed: trials that are taken as settled.
        guards: environments in hand, each with the facts of its device as a record holds them.
    """
    taken = pl.col("trial_id").is_in(list(resumed))
    for guard, facts in guards:
        if guard.device is None or guard.device_digest is None:
            continue
        ours = records.filter(pl.col("device") == guard.device)
        if guard.engine is not None:
            ours = ours.filter(pl.col("engine") == guard.engine)
        known = ours.filter(pl.col("device_digest") == guard.device_digest)
        silent = ours.filter(
            pl.col("device_digest").is_null() & taken,
            ~pl.col("trial_id").is_in(known.get_column("trial_id").to_list()),
        )
        if number := silent.get_column("trial_id").n_unique():
            runs = ", ".join(silent.get_column("run_id").unique(maintain_order=True))
            yield (
                f"cannot vouch for the machine of {number} resumed trial{'s' * (number > 1)} (run "
                f"{runs}): the records name their device, {guard.device}, and none of its facts"
            )
        others = ours.filter(pl.col("device_digest") != guard.device_digest, ~taken)
        for (digest,), rows in others.group_by("device_digest", maintain_order=True):
            number = rows.get_column("trial_id").n_unique()
            theirs, here = loads(rows.get_column("device_facts")[0]), loads(facts)
            told = briefly(differences(here or {}, theirs or {})) or str(digest)
            yield (
                f"{number} trial{'s' * (number > 1)} measured on another {guard.device} (here / "
                f"there: {told}) count for nothing here"
            )
