"""Which records are older, on machines whose clocks may be set back between two runs.

Runs of a dataset follow one another (its lock sees to that), and the manifest lists them as they
came. So what a run found out is newer than all that an earlier one did, whatever the clock said.
Between datasets nothing but clocks can tell: there a run counts as begun when its manifest says,
or when an earlier run of that manifest did, if that is later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def in_order(
    records: pl.DataFrame, manifests: Iterable[Iterable[Mapping[str, Any]]]
) -> pl.DataFrame:
    """Records by run, eldest first; those of one run by the time at which they were made.

    Args:
        records: with `run_id`, `attempt` and `finished_at`.
        manifests: `runs` of the manifest of each dataset that they are of. A run that no manifest
            knows counts as begun with its first record.
    """
    began: dict[str, tuple[datetime, int]] = {}
    for runs in manifests:
        latest = _LONG_AGO
        for number, run in enumerate(runs):
            latest = max(latest, _time(run.get("started_at")))
            began[str(run.get("run_id"))] = (latest, number)
    firsts = records.group_by("run_id").agg(pl.col("finished_at").min())
    for run_id, first in firsts.iter_rows():
        began.setdefault(run_id, (first or _LONG_AGO, -1))
    ranks = {name: place for place, name in enumerate(sorted(began, key=began.__getitem__))}
    if not ranks:
        return records
    rank = pl.col("run_id").replace_strict(ranks, return_dtype=pl.Int64)
    return records.sort(rank, "finished_at", "attempt", nulls_last=False, maintain_order=True)


def _time(text: object) -> datetime:
    """A stamp of a manifest; long ago if it is none."""
    try:
        at = datetime.fromisoformat(str(text))
    except ValueError:
        return _LONG_AGO
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
