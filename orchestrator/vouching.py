"""What resuming says of earlier records that it does not take for results, a line each.

A record counts if the content behind its names (`workers.identity`) and the facts of its device
(`workers.hardware.facts`) are those in hand. Version 0.1.0 noted neither: its records stay
readable, and their trials are measured anew. Those that agree in the device's name and differ in
its facts are measured again, too, and it is said what differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import polars as pl

from orchestrator.store import Guard
from workers.hardware.facts import briefly, differences, loads

COLUMNS = ("device_facts",)
"""Columns of `records` that are needed beside those of resuming."""
_NAMED_RUNS = 3


def models(records: pl.DataFrame, named: Collection[str]) -> str | None:
    """What cannot be taken for results, since nothing says which model was measured.

    Args:
        records: at least the columns `orchestrator.store.RESUME`.
        named: identities by name (`Trial.named_id`) of the trials that are asked for now.

    Returns:
        One line for the user; null where there are no such records.
    """
    old = records.filter(pl.col("model_digest").is_null(), pl.col("trial_id").is_in(list(named)))
    if old.is_empty():
        return None
    found = sorted(set(old["run_id"]))
    listed = ", ".join(found[:_NAMED_RUNS]) + (", …" if len(found) > _NAMED_RUNS else "")
    return (
        f"{len(old)} records of version 0.1.0 (run {listed}) do not say which model they measured "
        "(model_digest is null): nobody can vouch for them, so their trials are measured anew; "
        "the records stay beside the new ones"
    )


def machines(
    records: pl.DataFrame, resumed: Collection[str], guards: Iterable[tuple[Guard, str | None]]
) -> Iterator[str]:
    """Lines on records of other machines that have the name of one in hand.

    Args:
        records: terminal records, with `COLUMNS`.
        resumed: trials that are taken as settled.
        guards: environments in hand, each with the facts of its device as a record holds them.
    """
    taken = pl.col("trial_id").is_in(list(resumed))
    for guard, facts in guards:
        if guard.device is None or guard.device_digest is None:
            continue
        others = records.filter(
            pl.col("device") == guard.device, pl.col("device_digest") != guard.device_digest, ~taken
        )
        if guard.engine is not None:
            others = others.filter(pl.col("engine") == guard.engine)
        for (digest,), rows in others.group_by("device_digest", maintain_order=True):
            number = rows.get_column("trial_id").n_unique()
            theirs, here = loads(rows.get_column("device_facts")[0]), loads(facts)
            told = briefly(differences(here or {}, theirs or {})) or str(digest)
            yield (
                f"{number} trial{'s' * (number > 1)} measured on another {guard.device} (here / "
                f"there: {told}) count for nothing here"
            )
