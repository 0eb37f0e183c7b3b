"""From the files of a dataset to one frame, at any moment, mid-run too.

A dataset is written while it is read: files appear by rename, and a compaction replaces
many by one. So a reader may list a file that is gone when it is opened (read again), and
may see a row in an old file and in its compacted successor (dropped by identity). Records
are small, so `load` takes them as a snapshot; samples and activations can be large, so
they stay on disk until they are collected.

Every run appends, so a trial that was repeated has several terminal records. Unless
`every` is set, the newest one of each trial and environment is kept, where environment
means engine version, device (by its name and its facts) and dtype: the same guard that decides
what a resumed run may reuse. Newest means of the run that the manifest lists last, whatever its
clock said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import polars as pl

from analysis.columns import derived
from analysis.errors import DatasetError
from workers.contract.order import in_order
from workers.contract.record import SCHEMA_VERSION, TABLES

Folder = str | os.PathLike[str]
Beside = Literal["samples", "activations"]
"""Tables beside the records."""
T = TypeVar("T")

_IDENTITY = {
    "records": ("run_id", "trial_id", "attempt"),
    "samples": ("run_id", "trial_id", "attempt", "kind", "repeat"),
    "activations": ("run_id", "trial_id", "phase", "layer", "expert"),
}
"""What makes a row one row, by table."""

_ENVIRONMENT = ("engine_version", "device", "dtype")
_DEVICE = "device_digest"
"""What tells devices of one name apart; records of 0.1.0 lack it and go by the name."""
_READS = 5
"""Tries to read while a compaction takes files away under the reader."""


class Loader:
    """The tables of one or several dataset folders (`DIR/<sweep>`)."""

    def __call__(self, *datasets: Folder, every: bool = False) -> pl.LazyFrame:
        """Records, one row per trial, with the derived columns of `analysis.columns`.

        Args:
            datasets: dataset folders; one that is missing or empty adds no rows.
            every: keep superseded records of repeated trials too.

        Raises:
            DatasetError: for a file that is torn, foreign, or of a newer schema version.
        """
        records = _settled(lambda: _table("records", datasets, pl.read_ipc).collect())
        newest = records.get_column("schema_version").max()
        if isinstance(newest, int) and newest > SCHEMA_VERSION:
            raise DatasetError(
                f"{_names(datasets)}: written with schema version {newest}, "
                f"but this version reads up to {SCHEMA_VERSION}"
            )
        if not every:
            records = current(records, [_runs_if_readable(Path(one)) for one in datasets])
        return derived(records)

    def samples(self, *datasets: Folder) -> pl.LazyFrame:
        """Raw stamps, one row per pass; as `table`."""
        return self.table("samples", *datasets)

    def activations(self, *datasets: Folder) -> pl.LazyFrame:
        """Expert choices, one row per trial, phase, layer and expert; as `table`."""
        return self.table("activations", *datasets)

    def table(self, name: Beside, *datasets: Folder) -> pl.LazyFrame:
        """A table beside the records. Read when collected; raises as `load` does."""
        return _settled(lambda: _table(name, datasets, pl.scan_ipc))


load = Loader()


def is_dataset(folder: Folder) -> bool:
    """Whether a run has begun to write there."""
    return (Path(folder) / "records").is_dir() or manifest(Path(folder)).is_file()


def manifest(folder: Path) -> Path:
    """Where a dataset says how it came about."""
    return folder / "manifest.json"


def runs(folder: Path) -> list[dict[str, Any]]:
    """The runs that a dataset's manifest knows, eldest first; none where there is no manifest.

    Raises:
        DatasetError: there is a file, and it cannot be read or is no manifest.
    """
    path = manifest(folder)
    try:
        found = json.loads(path.read_text("utf-8"))["runs"]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DatasetError(f"{path} is no manifest of a dataset") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DatasetError(f"{path} is no manifest of a dataset")
    return found


def _runs_if_readable(folder: Path) -> list[dict[str, Any]]:
    """Records can be read without a manifest, and nearly always ordered too."""
    try:
        return runs(folder)
    except DatasetError:
        return []


def current(
    records: pl.DataFrame, manifests: Sequence[Sequence[Mapping[str, Any]]] = ()
) -> pl.DataFrame:
    """The newest record of each trial and environment, in order of completion.

    A record without a device (a trial that was refused, skipped, or lost before an engine
    stood) belongs to no environment, so it stands only while its trial has no other under
    the same profile.

    Args:
        records: of any number of datasets.
        manifests: the runs of each; those that are in none go by their records' time.
    """
    trial = ("sweep", "trial_id", "profile")
    placed = pl.col("device").is_not_null()
    environment = [*trial, *_ENVIRONMENT]
    last = pl.int_range(1, pl.len() + 1).over(environment) == pl.len().over(environment)
    return (
        in_order(records, manifests)
        .filter(placed | placed.any().over(trial).not_())
        .unique([*environment, _DEVICE], keep="last", maintain_order=True)
        .filter(pl.col(_DEVICE).is_not_null() | last)
    )


def _table(
    table: str,
    datasets: Sequence[Folder],
    read: Callable[[Path], pl.DataFrame] | Callable[[Path], pl.LazyFrame],
) -> pl.LazyFrame:
    """All rows of one table, each once, with at least the columns of its schema."""
    schema = pl.Schema(TABLES[table])
    frames = [pl.LazyFrame(schema=schema)]
    for path in (path for folder in datasets for path in _files(Path(folder), table)):
        _check(path, table, schema)
        frames.append(read(path).lazy())
    frame = pl.concat(frames, how="diagonal_relaxed")
    found = frame.collect_schema()
    assert all(found[name] == kind for name, kind in schema.items()), "columns changed their type"
    return frame.unique(_IDENTITY[table], keep="first", maintain_order=True)


def _files(folder: Path, table: str) -> list[Path]:
    if folder.is_file():
        raise DatasetError(f"{folder}: a file, but a dataset is a folder with records/ inside")
    return sorted(
        path for path in (folder / table).glob("*.arrow") if not path.name.startswith(".")
    )


def _check(path: Path, table: str, schema: pl.Schema) -> None:
    """Refuse a file that is not Arrow, or whose columns are not those of `table`.

    Columns may be absent (older files) or unknown (newer ones); identity may not.
    """
    try:
        found = pl.read_ipc_schema(path)
    except FileNotFoundError:
        raise
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetError(f"{path}: not a whole Arrow file ({error})") from error
    if missing := [name for name in _IDENTITY[table] if name not in found]:
        raise DatasetError(f"{path}: no file of {table}, it has no column {', '.join(missing)}")
    for name, kind in schema.items():
        if found.get(name, kind) not in (kind, pl.Null):
            raise DatasetError(f"{path}: column {name} is {found[name]}, but {kind} is expected")


def _settled(read: Callable[[], T]) -> T:
    """`read()`, again while files that were listed vanish before they are opened."""
    for _ in range(_READS - 1):
        with suppress(FileNotFoundError):
            return read()
    try:
        return read()
    except FileNotFoundError as error:
        raise DatasetError(f"{error}: files vanish while they are read") from error


def _names(datasets: Sequence[Folder]) -> str:
    return ", ".join(str(folder) for folder in datasets)
