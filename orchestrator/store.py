"""The dataset on disk: rows that were once committed stay, whatever happens next.

A sweep runs for a night on machines that die, disks that fill and drivers that are
killed, and somebody plots its records while it runs. So a commit is a new file that is
written whole beside the dataset, forced to disk, and renamed into place: at every moment
the folders hold whole Arrow IPC files of one schema and nothing else, which is all that
`pl.scan_ipc(folder)` and `pyarrow.dataset.dataset(folder, format="ipc")` need. A trial's
samples and activations are renamed before its record, so a record that can be seen has
its raw data beside it: the record is the commit point.

Thousands of one-row files would be slow to open, so small ones are merged now and then:
commits with one another, and what came of that when there is much of it, so that a row is
rewritten a few times however many follow it. A merged file names in its IPC schema metadata
the files that it replaces. They are deleted only after it is in place, and whoever opens the
dataset next finishes a deletion that was cut short, so a crash at any instruction loses
nothing. Between the rename and the last deletion (milliseconds) a reader can meet rows twice,
never less than once, and knows them by `KEYS`; a reader that listed the folder just before
gets "file not found" and reads again.

A file that nobody here wrote, or that a broken disk has torn, is moved to `quarantine/`
with a warning: one bad file costs the trials in it, not the resume of a whole night.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias, cast

import polars as pl
import pyarrow as pa

from workers.contract.order import in_order
from workers.contract.outcome import DISTURBED, OUTCOMES, Outcome, Rerun
from workers.contract.record import SCHEMA_VERSION, TABLES

SMALL_FILES = 64
"""Small files of a table, commits or merged ones, beyond which they are merged."""
SMALL_BYTES = 4 * 2**20
"""Files below this size count as small; 65 of them are merged in memory."""
RECENT_BYTES = 2**16
"""A commit up to this size is remembered until it is merged, so that it need not be read, and
is written as it is: zstd makes one record's hundred buffers larger, in four times the time."""
REPLACES = b"replaces"
"""IPC schema metadata key: JSON list of the file names that a merged file replaces."""
KEYS: Mapping[str, tuple[str, ...]] = {
    "records": ("run_id", "trial_id", "attempt"),
    "samples": ("run_id", "trial_id", "attempt", "kind", "repeat"),
    "activations": ("run_id", "trial_id", "phase", "layer", "expert"),
}
"""Per table, the columns that tell rows apart. Rows equal in them are the same row."""

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    **KEYS,
    "records": (*KEYS["records"], "schema_version", "sweep", "outcome"),
}
"""Runs that are named in one line; of more the first."""
_WRITE = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
_WRITE_SMALL = pa.ipc.IpcWriteOptions(use_threads=False)


Rows: TypeAlias = pa.RecordBatch | Sequence[pa.RecordBatch] | None
"""What there is to commit to a table."""


class StoreError(Exception):
    """The dataset cannot be used as asked; the message is for the user."""


class _NotOurs(Exception):
    """A file that this project did not write, or not whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: Path
    bytes: int
    replaces: tuple[str, ...]
    current: bool
    """Has exactly the columns of today's schema."""


class Dataset:
    """Every path under `DIR/<sweep>/`, held by one driver at a time.

    Not safe for use from several threads. A context manager: leaving it closes it.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        """Use `Dataset.open`."""
        self.folder = folder
        self.warnings: list[str] = []
        """What was set aside or put off, one line each, for the caller to show."""
        self._lock: int | None = lock
        self._token = secrets.token_hex(4)
        self._commits = 0
        self._small = dict.fromkeys(TABLES, 0)
        """Small files, merged ones on the way aside."""
        self._recent: dict[Path, pa.RecordBatch] = {}
        """What lies in files that this driver wrote."""

    @classmethod
    def open(cls, out: Path, sweep: str) -> Dataset:
        """Makes or opens `out/sweep`, takes its lock and mends what a crash left.

        Raises:
            StoreError: if another driver holds it, if the folder cannot be made or
                written, or if a newer version of this project wrote it.
        """
        _check_name("sweep", sweep)
        folder = out / sweep
        with _explained("open", folder):
            folder.mkdir(parents=True, exist_ok=True)
            dataset = cls(folder, _locked(folder))
            try:
                dataset._recover()
            except BaseException:
                dataset._release()
                raise
        return dataset

    @property
    def records(self) -> Path:
        """Folder: one row per trial."""
        return self.folder / "records"

    @property
    def samples(self) -> Path:
        """Folder: one row per pass."""
        return self.folder / "samples"

    @property
    def activations(self) -> Path:
        """Folder: one row per trial, phase, layer and expert."""
        return self.folder / "activations"

    @property
    def logs(self) -> Path:
        """Folder: output of engines and of the cluster."""
        return self.folder / "logs"

    @property
    def quarantine(self) -> Path:
        """Folder: files that were no part of the dataset. Made when first needed."""
        return self.folder / "quarantine"

    @property
    def manifest(self) -> Path:
        """File: see `orchestrator.manifest`."""
        return self.folder / "manifest.json"

    @property
    def _staging(self) -> Path:
        return self.folder / ".staging"

    def commit(
        self,
        run_id: str,
        *,
        records: Rows = None,
        samples: Rows = None,
        activations: Rows = None,
    ) -> None:
        """Adds rows, on disk for good when this returns. All of them, or none if it raises.

        Every row's `run_id` must be `run_id`. Tables that are None or empty are left alone. What
        is given in one call costs the disk as much as a single row.

        Raises:
            StoreError: if a batch is not of today's schema, or the disk refuses it.
        """
        _check_name("run", run_id)
        given = {"samples": samples, "activations": activations, "records": records}
        batches = {
            table: pa.concat_batches([_checked(table, run_id, batch) for batch in some])
            for table, rows in given.items()
            if (some := _some(rows))
        }
        self._commits += 1
        name = f"{run_id}-{self._commits:06d}-{self._token}.arrow"
        staged = {table: self._staging / f"{table}-{name}" for table in batches}
        targets = {table: self.folder / table / name for table in batches}
        try:
            with _explained("write to", self.folder):
                for table, batch in batches.items():
                    options = _WRITE_SMALL if batch.nbytes <= RECENT_BYTES else _WRITE
                    stage(staged[table], _writer([batch], TABLES[table], options))
                for table in batches:
                    place(staged[table], targets[table])
        except StoreError:
            for path in (*staged.values(), *targets.values()):
                with suppress(OSError):
                    path.unlink()
            raise
        for table, path in targets.items():
            self._small[table] += _is_small(path.stat().st_size)
            if batches[table].nbytes <= RECENT_BYTES:
                self._recent[path] = batches[table]
        if max(self._small.values()) > SMALL_FILES:
            self._compact_or_warn(step=True)

    def compact(self) -> None:
        """Merges the small files of each table into one, and brings old files up to date.

        Raises:
            StoreError: if the disk refuses it; the rows are all still there.
        """
        self._compact_all(step=False)

    def finished(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The terminal records so far, each (run, trial, attempt) once, in no fixed order.

        All runs of the sweep are in it, those under another engine or device too:
        `settled` picks the one that decides.

        Args:
            columns: which columns of `records` to read; by default those that resume needs.

        Raises:
            StoreError: if a file cannot be read for a reason outside it.
        """
        names = list(RESUME if columns is None else columns)
        read = [*names, *(key for key in KEYS["records"] if key not in names)]
        with _explained("read", self.records):
            tables = [
                table
                for file in self._files("records")
                if (table := self._table(file, "records", read)) is not None
            ]
        empty = TABLES["records"].empty_table().select(read)
        frame = pl.DataFrame(pa.concat_tables([empty, *tables]))
        return frame.unique(KEYS["records"], keep="last", maintain_order=True).select(names)

    def close(self) -> None:
        """Compacts and lets the next driver in. Safe to call twice."""
        if self._lock is None:
            return
        try:
            self._compact_or_warn()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _recover(self) -> None:
        """Clears what a dead driver was writing, finishes what it was merging."""
        for folder in (*(self.folder / table for table in TABLES), self.logs, self._staging):
            folder.mkdir(exist_ok=True)
        for path in self._staging.iterdir():
            path.unlink()
        for folder in (self.folder, self.folder.parent):
            _sync(folder)
        for table in TABLES:
            files = self._files(table)
            if not files:
                # No reader can infer a schema from an empty folder.
                self._put(table, f"empty-{self._token}", [], ())
                files = self._files(table)
            self._small[table] = sum(_is_small(file.bytes) for file in files)
            if self._small[table] > SMALL_FILES or not all(file.current for file in files):
                self._compact(table)

    def _release(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def _compact_or_warn(self, *, step: bool = False) -> None:
        """Rows are safe without a merge, so a merge that fails is no reason to stop."""
        try:
            self._compact_all(step=step)
        except StoreError as error:
            self.warnings.append(f"small files are left unmerged for now: {error}")
            self._small = dict.fromkeys(TABLES, 0)
            self._recent.clear()

    def _compact_all(self, *, step: bool) -> None:
        for table in TABLES:
            with _explained("compact", self.folder / table):
                self._compact(table, step=step)

    def _compact(self, table: str, *, step: bool = False) -> None:
        """Merges all small files; in a step on the way, merged ones only if they are many."""
        files = self._files(table)
        small = [file for file in files if _is_small(file.bytes)]
        commits = [file for file in small if not file.replaces]
        if step and len(small) - len(commits) <= SMALL_FILES:
            small = commits
        if len(small) > 1:
            self._merge(table, small)
        for file in files:
            if not file.current and (file not in small or len(small) == 1):
                self._merge(table, [file])
        self._small[table] = min(len(small), 1)

    def _merge(self, table: str, files: Sequence[_File]) -> None:
        read = {file.path: self._table(file, table) for file in files}
        whole = {path: rows for path, rows in read.items() if rows is not None}
        if whole:
            merged = pa.concat_tables(whole.values()).combine_chunks()
            name = f"merged-{secrets.token_hex(8)}"
            self._put(table, name, merged.to_batches(2**16), [path.name for path in whole])
            for path in whole:
                path.unlink()
                self._recent.pop(path, None)

    def _put(
        self, table: str, name: str, batches: Sequence[pa.RecordBatch], replaces: Sequence[str]
    ) -> None:
        schema = TABLES[table]
        if replaces:
            schema = schema.with_metadata(
                {**(schema.metadata or {}), REPLACES: json.dumps(list(replaces)).encode()}
            )
        staged = self._staging / f"{table}-{name}.arrow"
        stage(staged, _writer(batches, schema))
        place(staged, self.folder / table / f"{name}.arrow")

    def _files(self, table: str) -> list[_File]:
        """The files of a table, after setting strangers aside and deleting replaced files."""
        found: dict[str, _File] = {}
        for path in sorted((self.folder / table).iterdir()):
            try:
                found[path.name] = self._written(path) or _inspect(path, table)
            except _NotOurs as error:
                self._set_aside(path, error)
        replaced: set[str] = set()
        for file in list(found.values()):
            if left := found.keys() & set(file.replaces) - {file.path.name}:
                # The last copies go only once their successor has been read to its end.
                if self._table(file, table) is None:
                    del found[file.path.name]
                else:
                    replaced |= left
        for name in replaced & found.keys():
            found.pop(name).path.unlink()
        return list(found.values())

    def _written(self, path: Path) -> _File | None:
        """A file that this driver wrote and remembers."""
        if path not in self._recent:
            return None
        return _File(path=path, bytes=path.stat().st_size, replaces=(), current=True)

    def _table(
        self, file: _File, table: str, columns: Sequence[str] | None = None
    ) -> pa.Table | None:
        """The rows of a file under today's schema; None if it had to be set aside."""
        recent = self._recent.get(file.path)
        if recent is not None and columns is None:
            return pa.Table.from_arrays(recent.columns, schema=TABLES[table])
        try:
            return _read(file.path, table, columns)
        except _NotOurs as error:
            self._set_aside(file.path, error)
            return None

    def _set_aside(self, path: Path, why: _NotOurs) -> None:
        self.quarantine.mkdir(exist_ok=True)
        target = self.quarantine / f"{path.parent.name}-{path.name}"
        if target.exists():
            target = target.with_name(f"{target.stem}-{secrets.token_hex(4)}{target.suffix}")
        path.rename(target)
        self.warnings.append(f"moved {path} to {target}: {why}. What only it held will run again.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """The environment in which a result was made, as far as a trial does not fix it.

    None where the driver cannot know; then that part is not compared.
    """

    engine_version: str | None
    device: str | None
    device_digest: str | None = None
    """What decides the device's speed (`workers.hardware.facts`). Records of 0.1.0 tell nothing
    of it and fit by the device's name."""
    engine: str | None = None
    """Kind of engine: versions and devices of different kinds have nothing to do with each
    other."""


RESUME = (
    *KEYS["records"],
    "outcome",
    "skipped_by",
    "engine",
    "engine_version",
    "device",
    "device_digest",
    "finished_at",
    "throughput_tok_s",
    "disturbed",
    "model_digest",
)
"""Columns of `records` that resuming looks at."""


def settled(
    records: pl.DataFrame,
    *,
    guard: Guard,
    rerun: frozenset[Rerun] = frozenset(),
    runs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Outcome]:
    """Trials that need not run again, with how they ended.

    The newest record of a trial under the same guard decides: that of the latest run, whatever
    the clock said then. A record without an engine
    version or device ran on nothing (infeasible points, say) and fits every guard. A
    skipped trial stays skipped only while its witness is settled itself, and by running out
    of memory: what happened on one device says nothing about another.

    Args:
        records: at least the columns `RESUME` up to `finished_at`, and `disturbed` where that is
            asked for, from `finished`.
        guard: environment of the run that is about to start.
        rerun: outcomes to run again; `disturbed` is for those that something else disturbed.
        runs: as the manifest lists them, eldest first. Those that it does not know go by their
            records' time.
    """
    fitting = records
    asked = (
        ("engine", guard.engine),
        ("engine_version", guard.engine_version),
        ("device", guard.device),
        ("device_digest", guard.device_digest),
    )
    for column, wanted in asked:
        if wanted is not None:
            fitting = fitting.filter(pl.col(column).is_null() | (pl.col(column) == wanted))
    fitting = in_order(fitting, [runs])
    skipped = pl.col("outcome") == "skipped"
    newest = _newest(fitting.filter(~skipped), rerun)
    witnesses = [trial for trial, outcome in newest.items() if outcome == "oom"]
    valid = ~skipped | pl.col("skipped_by").is_null() | pl.col("skipped_by").is_in(witnesses)
    return _newest(fitting.filter(valid), rerun)


def _newest(records: pl.DataFrame, rerun: frozenset[Rerun]) -> dict[str, Outcome]:
    newest = records.unique("trial_id", keep="last", maintain_order=True)
    again = pl.col("outcome").is_in(list(rerun))
    if DISTURBED in rerun:
        again |= pl.col("disturbed").fill_null(False)
    kept = newest.filter(~again)
    return {
        trial: cast(Outcome, outcome)
        for trial, outcome in zip(kept["trial_id"], kept["outcome"], strict=True)
    }


def stage(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a new file whole and forces it to disk."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def place(staged: Path, target: Path) -> None:
    """Renames a staged file into its place, for good."""
    staged.replace(target)
    _sync(target.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writer(
    batches: Sequence[pa.RecordBatch], schema: pa.Schema, options: pa.ipc.IpcWriteOptions = _WRITE
) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(file, schema, options=options) as writer:
            for batch in batches:
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))

    return write


def _some(rows: Rows) -> list[pa.RecordBatch]:
    """The batches that have rows."""
    batches = [rows] if isinstance(rows, pa.RecordBatch) else rows or ()
    return [batch for batch in batches if batch.num_rows]


def _checked(table: str, run_id: str, batch: pa.RecordBatch) -> pa.RecordBatch:
    schema = TABLES[table]
    if not batch.schema.equals(schema):
        theirs, ours = set(batch.schema), set(schema)
        odd = ", ".join(sorted({field.name for field in theirs ^ ours})) or "their order"
        raise StoreError(
            f"{table} of run {run_id} differ from schema version {SCHEMA_VERSION} in {odd}: "
            "is the same version of the project on every node?"
        )
    if table == "records":
        versions = set(batch.column("schema_version").to_pylist()) - {SCHEMA_VERSION, None}
        if versions:  # equal columns may mean something else
            raise StoreError(
                f"records of run {run_id} have schema version {versions.pop()}, not "
                f"{SCHEMA_VERSION}: is the same version of the project on every node?"
            )
    columns = {name: batch.column(name) for name in _REQUIRED[table]}
    if empty := [name for name, column in columns.items() if column.null_count]:
        raise StoreError(f"{table} of run {run_id} have no value in {', '.join(empty)}")
    if others := set(columns["run_id"].to_pylist()) - {run_id}:
        raise StoreError(f"{table} of run {', '.join(sorted(others))} given as run {run_id}")
    if table == "records" and (new := set(columns["outcome"].to_pylist()) - set(OUTCOMES)):
        raise StoreError(f"{', '.join(sorted(new))} is no outcome; there are {', '.join(OUTCOMES)}")
    return batch


def _inspect(path: Path, table: str) -> _File:
    """What the file's footer says."""
    if path.suffix != ".arrow" or path.name.startswith((".", "_")) or not path.is_file():
        raise _NotOurs("no file that this project writes")
    with _torn(), pa.OSFile(str(path), "rb") as source:
        schema = pa.ipc.open_file(source).schema
        names = set(schema.names)
        metadata: dict[bytes, bytes] = schema.metadata or {}
    if metadata.get(b"table") != table.encode():
        raise _NotOurs(f"an Arrow file, but none of {table}")
    version = metadata.get(b"schema_version", b"").decode("ascii", "replace")
    if not version.isdecimal():
        raise _NotOurs("an Arrow file without a schema version")
    unknown = sorted(names - set(TABLES[table].names))
    if int(version) > SCHEMA_VERSION or unknown:
        raise StoreError(
            f"{path} was written by a newer version of this project (schema version {version}"
            f"{'; unknown: ' + ', '.join(unknown) if unknown else ''}); use that version, or "
            "another --out"
        )
    try:
        replaces = tuple(map(str, json.loads(metadata.get(REPLACES, b"[]"))))
    except (ValueError, TypeError):
        raise _NotOurs("its list of replaced files is unreadable") from None
    return _File(
        path=path,
        bytes=path.stat().st_size,
        replaces=replaces,
        current=schema.equals(TABLES[table]),
    )


def _read(path: Path, table: str, columns: Sequence[str] | None) -> pa.Table:
    """Rows of a file, checked to the last byte, with null in columns it is too old to have."""
    wanted = TABLES[table]
    if columns is not None:
        wanted = pa.schema([wanted.field(name) for name in columns])
    with _torn(), pa.OSFile(str(path), "rb") as source:
        own = {name: i for i, name in enumerate(pa.ipc.open_file(source).schema.names)}
        fields = sorted(own[name] for name in wanted.names if name in own)
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        rows = pa.ipc.open_file(source, options=options).read_all()
        rows.validate(full=True)
        if rows.schema.equals(wanted):
            return rows
        columns_now = [
            rows.column(field.name).cast(field.type)
            if field.name in own
            else pa.nulls(rows.num_rows, field.type)
            for field in wanted
        ]
        return pa.Table.from_arrays(columns_now, schema=wanted)


def _is_small(size: int) -> bool:
    return size < SMALL_BYTES


def _check_name(what: str, name: str) -> None:
    plain = bool(name) and name.isprintable() and Path(name).name == name
    if not plain or name.startswith((".", "_")):
        raise StoreError(
            f"{what} {name!r} cannot name files: it needs printable text, no '/', and no '.' "
            "or '_' in front"
        )


@contextmanager
def _torn() -> Iterator[None]:
    """Arrow's complaints about a file's content as `_NotOurs`; the system's own pass."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _NotOurs(f"no whole Arrow file ({str(error).splitlines()[0]})") from error


@contextmanager
def _explained(doing: str, path: Path) -> Iterator[None]:
    """The operating system's refusals as `StoreError`, with the path and its own words."""
    try:
        yield
    except OSError as error:
        culprit = error.filename or path
        raise StoreError(f"cannot {doing} {path}: {error.strerror or error} ({culprit})") from error


def _locked(folder: Path) -> int:
    """An open descriptor that holds the folder's lock; the system frees it when we die."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(about).encode(), 0)
    except BlockingIOError:
        holder = _holder(os.pread(lock, 4096, 0))
        os.close(lock)
        raise StoreError(
            f"{folder} is in use by {holder}; two drivers would run every trial twice. "
            "Wait for it, stop it, or choose another --out."
        ) from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _holder(text: bytes) -> str:
    try:
        about: dict[str, Any] = json.loads(text)
        return f"process {about['pid']} on host {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
