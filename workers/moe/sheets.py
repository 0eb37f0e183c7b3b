"""Activation sheets: what a probe found, kept for sweeps that do not probe.

MoE-CAP §5 stores activation sheets "for reuse in future evaluations". A sheet is the mean
number of distinct experts per layer and pass, of decode and prefill apart, and what it rests
on. It holds for one model with its weights, one structure, one arithmetic, one source of
prompts and one batch with its lengths: all of it is the key, since each moves the routing. One
sheet is one Arrow IPC file of one row, `<folder>/<subject>/<family>/<batch>.arrow`, written
whole and renamed into place, so that sweeps may share a folder and `polars.scan_ipc` reads it.
The subject is model, revision and source of prompts; the family is the key without its batch.

Of several probes of one key the latest stands. They differ by the seed of their prompts and by
what chance left, both small once the counts have settled, and a mean over runs would be a
number that no dataset holds; this one can be worked out again from the samples of its source.

A batch that was not probed is interpolated between the nearest that were, on both sides and
never beyond them, and says so. What is interpolated is the ratio to the uniform expectation,
linear in the logarithm of the batch: that keeps the curve's shape, which the numbers
themselves would cut across, and gives uniform routing back exactly. Only passes that held the
whole batch are interpolated: of others the size is a matter of the engine's budget.
"""

from __future__ import annotations

import io
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from workers.contract.fingerprint import fingerprint
from workers.contract.probed import PHASES, Phase
from workers.moe.accounting import distinct_experts
from workers.moe.structure import Architecture

FOLDER = "_activation-sheets"
"""Beside the datasets of sweeps, none of which begins with an underscore."""
FORMAT = 1
"""Version of the files; another one is refused."""
LARGEST_BYTES = 2**22
"""A file beyond it is no sheet: ten thousand layers need a tenth of that."""
ALIKE = 0.01
"""By how much passes may differ in their tokens and still count as alike."""

Numbers = tuple[float, ...]


class SheetError(ValueError):
    """A file that is no sheet, or a sheet that is not for this structure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetKey:
    """What a sheet holds for."""

    model: str
    """By the name that sweeps give it."""
    revision: str | None
    weights: str
    """dummy | checkpoint: random weights route otherwise."""
    content: str | None
    """What tells weights of one name apart: a digest of a folder's, the commit of a hub's, and
    of random ones their configuration and what they were drawn for; null where it cannot be
    told."""
    structure: str
    """`structure_of` the architecture that ran."""
    engine: str
    """Kind of engine."""
    dtype: str
    """Data type computed in."""
    quantization: str | None
    prune: str | None
    """Kind, share and criterion of pruning; null for none."""
    args: str | None
    """Digest of the engine's arguments that may change what is computed; null without such."""
    dataset: str | None
    """Source of prompts; null for random token ids."""
    texts: str | None
    """Digest of its texts, and of the tokenizer where that can be told."""
    routing: str | None
    """Null for the model's own router."""
    temperature: float
    """Of sampling: what is generated is routed too."""
    batch_size: int
    """Requests in flight together on one replica."""
    input_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a sheet is {getattr(self, name)}, below 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature of a sheet is {self.temperature}")

    @property
    def family(self) -> str:
        """The same for all batches: 16 hexadecimal digits."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != _BATCH})

    @property
    def subject(self) -> str:
        """Name of the folder for all sheets of this model, revision and source of prompts."""
        return subject(self.model, self.revision, self.dataset)

    def differences(self, other: SheetKey) -> list[str]:
        """Fields in which another key differs, as `temperature 0.7 instead of 0.0`."""
        return [
            f"{one.name} {theirs} instead of {ours}"
            for one in fields(self)
            if (theirs := getattr(other, one.name)) != (ours := getattr(self, one.name))
        ]


_BATCH = "batch_size"


def subject(model: str, revision: str | None, dataset: str | None) -> str:
    """Name of a folder: for people the last part of the model's name, then 12 hexadecimal
    digits."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", model.rstrip("/").rpartition("/")[2])[:60].strip("-.")
    return f"{plain or 'model'}-{fingerprint([model, revision, dataset])[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """Distinct experts per decoder layer and pass, and what is behind them."""

    key: SheetKey
    experts: tuple[int, ...]
    """Routed experts of each decoder layer; 0 for a dense one."""
    top_k: tuple[int, ...]
    """Routed experts per token of each decoder layer; 0 for a dense one."""
    decode: Numbers | None
    """Mean per decode pass, a number per decoder layer (0.0 for a dense one), as
    `workers.moe.accounting.forward` takes it; null where no decode pass was seen."""
    prefill: Numbers | None
    """The same of prefill passes."""
    decode_passes: int
    decode_tokens: int
    prefill_passes: int
    prefill_tokens: int
    settled: bool
    """Whether the distribution had settled (`workers.moe.activation.Settling`)."""
    source: str
    """Where it comes from, for people: dataset, run and trial."""
    between: tuple[int, int] | None = None
    """The batches that it was interpolated between; null as measured."""

    def __post_init__(self) -> None:
        if len(self.top_k) != len(self.experts):
            raise SheetError("experts and top_k of a sheet have a number per layer")
        if any(
            not min(1, num) <= k <= num for num, k in zip(self.experts, self.top_k, strict=True)
        ):
            raise SheetError("a layer of a sheet cannot choose so many of its experts")
        if any(getattr(self, f"{name}_{of}") < 0 for name in PHASES for of in ("passes", "tokens")):
            raise SheetError("passes and tokens of a sheet are at least 0")
        for name in PHASES:
            found = getattr(self, name)
            if found is None:
                continue
            if len(found) != len(self.experts):
                raise SheetError(
                    f"{name} of a sheet has {len(found)} numbers for {len(self.experts)} layers"
                )
            pairs = zip(found, self.experts, strict=True)
            if any(value is None or not 0 <= value <= most for value, most in pairs):
                raise SheetError(f"{name} of a sheet has a layer with more experts than it has")

    def tokens_per_pass(self, phase: Phase) -> float | None:
        """Of the passes that were counted; null where there was none. Interpolated ones hold
        the whole batch."""
        if getattr(self, phase) is None:
            return None
        if self.between is not None:
            return self._whole_batch(phase)
        passes, tokens = getattr(self, f"{phase}_passes"), getattr(self, f"{phase}_tokens")
        return float(tokens / passes) if passes else None

    def at_once(self, phase: Phase) -> bool:
        """Whether each of the passes held the whole batch."""
        tokens = self.tokens_per_pass(phase)
        return tokens is not None and alike(tokens, self._whole_batch(phase))

    def _whole_batch(self, phase: Phase) -> float:
        each = 1 if phase == "decode" else self.key.input_tokens
        return float(self.key.batch_size * each)

    def mean(self, numbers: Numbers | None) -> float | None:
        """Mean of `decode` or `prefill` over the MoE layers, dense ones left out."""
        if numbers is None:
            return None
        of_moe = [value for value, most in zip(numbers, self.experts, strict=True) if most]
        return math.fsum(of_moe) / len(of_moe) if of_moe else None

    def check(self, a: Architecture) -> None:
        """Raises SheetError where it is of another structure than `a`."""
        if structure_of(a) != self.key.structure:
            raise SheetError(
                f"the activation sheet of {self.key.model} (batch {self.key.batch_size}, "
                f"{self.source}) is of another structure: {_shape(self.experts, self.top_k)}, "
                f"but {_shape(*_routed(a))} runs"
            )


def alike(tokens: float, other: float) -> bool:
    """Whether passes of so many tokens may share the number of experts that ran."""
    return abs(tokens - other) <= ALIKE * other


def structure_of(a: Architecture) -> str:
    """16 hexadecimal digits of what routing depends on: family, widths, experts by layer."""
    experts, top_k = _routed(a)
    widths = [layer.experts.width if layer.experts else 0 for layer in a.layers]
    return fingerprint([a.family, a.hidden_size, a.vocab_size, experts, top_k, widths])


def spread(a: Architecture, of_moe: Sequence[float]) -> Numbers:
    """A number per MoE layer, as probes give them, to one per decoder layer, 0.0 where dense.

    Raises:
        SheetError: not one number per MoE layer of `a`.
    """
    moe = sum(layer.experts is not None for layer in a.layers)
    if len(of_moe) != moe:
        raise SheetError(f"{len(of_moe)} numbers for the {moe} MoE layers of {a.family}")
    rest = iter(of_moe)
    return tuple(float(next(rest)) if layer.experts else 0.0 for layer in a.layers)


def sheet(
    a: Architecture,
    key: SheetKey,
    *,
    decode: Sequence[float] | None,
    prefill: Sequence[float] | None,
    decode_passes: int,
    decode_tokens: int,
    prefill_passes: int,
    prefill_tokens: int,
    settled: bool,
    source: str,
) -> Sheet:
    """A sheet of `a` from means per MoE layer (`workers.moe.activation.mean_distinct`).

    Raises:
        SheetError: the key is of another structure, or the numbers do not fit it.
    """
    experts, top_k = _routed(a)
    made = Sheet(
        key=key,
        experts=experts,
        top_k=top_k,
        decode=None if decode is None else spread(a, decode),
        prefill=None if prefill is None else spread(a, prefill),
        decode_passes=decode_passes,
        decode_tokens=decode_tokens,
        prefill_passes=prefill_passes,
        prefill_tokens=prefill_tokens,
        settled=settled,
        source=source,
    )
    made.check(a)
    return made


class Sheets:
    """A folder of sheets. Several processes may use one."""

    def __init__(self, folder: Path) -> None:
        """The folder is made when the first sheet is put there."""
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, int, int], Sheet]] = {}
        """What was read, and the state of the file that it was read from."""

    def put(self, one: Sheet) -> Path:
        """Store a measured sheet; one of the same key is replaced, at once.

        Raises:
            SheetError: the sheet is an interpolated one.
            OSError: the disk refuses it.
        """
        if one.between is not None:
            raise SheetError("an interpolated sheet is not measured, so it is not stored")
        path = self._path(one.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with part.open("wb") as file:
                with pa.ipc.new_file(file, _SCHEMA) as writer:
                    writer.write_batch(to_rows([one]))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def get(self, key: SheetKey) -> Sheet | None:
        """The sheet of exactly `key`; null where there is none.

        Raises:
            SheetError: the file is torn, foreign, of another format or another key.
        """
        path = self._path(key)
        try:
            found = read(path)
        except FileNotFoundError:
            return None
        if found.key != key:
            raise SheetError(f"{path}: holds a sheet of another key, {found.key}")
        return found

    def find(self, key: SheetKey) -> Sheet | None:
        """`find` among the sheets of this folder.

        Raises:
            SheetError: as `get`.
        """
        batches = self.batches(key)
        near = [max((one for one in batches if one <= key.batch_size), default=None)]
        near.append(min((one for one in batches if one > key.batch_size), default=None))
        found = [self.get(replace(key, batch_size=one)) for one in near if one is not None]
        return find([one for one in found if one is not None], key)

    def batches(self, key: SheetKey) -> list[int]:
        """Batches that there is a measured sheet of, all else as in `key`, ascending."""
        names = (path.stem for path in self._path(key).parent.glob("*.arrow"))
        return sorted(int(name) for name in names if name.isdecimal())

    def about(
        self, model: str, revision: str | None, dataset: str | None
    ) -> tuple[list[Sheet], list[SheetError]]:
        """All sheets of a model, a revision and a source of prompts, and what was none."""
        found: list[Sheet] = []
        problems: list[SheetError] = []
        for path in sorted((self.folder / subject(model, revision, dataset)).glob("*/*.arrow")):
            try:
                if not path.name.startswith("."):
                    found.append(self._placed(path))
            except FileNotFoundError:  # taken away meanwhile
                continue
            except SheetError as error:
                problems.append(error)
        return found, problems

    def __iter__(self) -> Iterator[Sheet]:
        """All sheets, in the order of their paths.

        Raises:
            SheetError: as `get`.
        """
        for path in sorted(self.folder.glob("*/*/*.arrow")):
            if not path.name.startswith("."):
                yield self._placed(path)

    def _placed(self, path: Path) -> Sheet:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SheetError(f"{path}: {error.strerror}") from error
        state = status.st_mtime_ns, status.st_size, status.st_ino
        known = self._known.get(path)
        if known is not None and known[0] == state:
            return known[1]
        found = read(path)
        if self._path(found.key) != path:
            raise SheetError(f"{path}: holds a sheet of another key, {found.key}")
        self._known[path] = state, found
        return found

    def _path(self, key: SheetKey) -> Path:
        return self.folder / key.subject / key.family / f"{key.batch_size}.arrow"


def find(sheets: Iterable[Sheet], key: SheetKey) -> Sheet | None:
    """The sheet of `key`, else one interpolated between its neighbours, else null.

    Neighbours differ in the batch alone, and both sides need one. Of several sheets of one key
    the last stands. An interpolated sheet has `between` set and is settled where both
    neighbours are.
    """
    family = {
        one.key.batch_size: one
        for one in sheets
        if replace(one.key, batch_size=key.batch_size) == key
    }
    if key.batch_size in family:
        return family[key.batch_size]
    below = max((batch for batch in family if batch < key.batch_size), default=None)
    above = min((batch for batch in family if batch > key.batch_size), default=None)
    if below is None or above is None:
        return None
    made = interpolated(family[below], family[above], key.batch_size)
    return None if made.decode is None and made.prefill is None else made


def why_none(sheets: Iterable[Sheet], key: SheetKey) -> str:
    """Why `find` gives nothing, in words for people."""
    keys = [one.key for one in sheets]
    prompts = f"text {key.dataset}" if key.dataset is not None else "random token ids"
    if not keys:
        return f"there is none of {key.model} on {prompts}"
    family = sorted(
        one.batch_size for one in keys if replace(one, batch_size=key.batch_size) == key
    )
    if family:
        batches = ", ".join(map(str, family))
        if family[0] < key.batch_size < family[-1]:
            return f"those of batch {batches} were not of whole batches, so none lies between"
        return f"there are those of batch {batches}, and batch {key.batch_size} is outside"
    nearest = min((key.differences(one) for one in keys), key=len)
    return f"the nearest of {key.model} on {prompts} is for {', '.join(nearest)}"


def interpolated(low: Sheet, high: Sheet, batch: int) -> Sheet:
    """A sheet of `batch` between two measured ones that differ in the batch alone.

    Raises:
        SheetError: they differ in more, or `batch` is not between them.
    """
    first, last = low.key.batch_size, high.key.batch_size
    if replace(low.key, batch_size=last) != high.key or low.experts != high.experts:
        raise SheetError("sheets that differ in more than the batch are not interpolated")
    if not first < batch < last:
        raise SheetError(f"batch {batch} is not between {first} and {last}")
    part = math.log(batch / first) / math.log(last / first)

    def between(phase: Phase) -> Numbers | None:
        one: Numbers | None = getattr(low, phase)
        other: Numbers | None = getattr(high, phase)
        if one is None or other is None or not (low.at_once(phase) and high.at_once(phase)):
            return None
        tokens = 1 if phase == "decode" else low.key.input_tokens
        found = []
        for a, b, num, k in zip(one, other, low.experts, low.top_k, strict=True):
            if not num:
                found.append(0.0)
                continue
            at = [distinct_experts(num, k, size * tokens) for size in (first, last, batch)]
            ratio = (1 - part) * a / at[0] + part * b / at[1]
            found.append(min(max(ratio * at[2], min(a, b)), max(a, b)))
        return tuple(found)

    return replace(
        low,
        key=replace(low.key, batch_size=batch),
        decode=between("decode"),
        prefill=between("prefill"),
        decode_passes=low.decode_passes + high.decode_passes,
        decode_tokens=low.decode_tokens + high.decode_tokens,
        prefill_passes=low.prefill_passes + high.prefill_passes,
        prefill_tokens=low.prefill_tokens + high.prefill_tokens,
        settled=low.settled and high.settled,
        source=f"interpolated between batch {first} ({low.source}) and {last} ({high.source})",
        between=(first, last),
    )


def read(path: Path) -> Sheet:
    """The sheet in a file.

    Raises:
        FileNotFoundError: there is no such file.
        SheetError: it is torn, foreign or of another format.
    """
    try:
        if path.exists() and not path.is_file():
            raise SheetError(f"{path}: not a file")
        with path.open("rb") as file:
            whole = file.read(LARGEST_BYTES + 1)
        if len(whole) > LARGEST_BYTES:
            raise SheetError(f"{path}: too large for an activation sheet")
        table = pa.ipc.open_file(io.BytesIO(whole)).read_all()
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SheetError(f"{path}: not a whole Arrow file ({reason})") from error
    if (table.schema.metadata or {}).get(b"format") != str(FORMAT).encode():
        raise SheetError(f"{path}: no activation sheet of format {FORMAT}")
    if table.schema != _SCHEMA or table.num_rows != 1:
        raise SheetError(f"{path}: not one activation sheet")
    try:
        return _sheet(table.to_pylist()[0])
    except (ValueError, TypeError) as error:
        raise SheetError(f"{path}: {error}") from error


def to_rows(sheets: Iterable[Sheet]) -> pa.RecordBatch:
    """Measured sheets as rows, to travel or to be stored."""
    return pa.RecordBatch.from_pylist([_row(one) for one in sheets], schema=_SCHEMA)


def from_rows(rows: pa.RecordBatch) -> list[Sheet]:
    """The sheets of `to_rows`.

    Raises:
        SheetError: they are no such rows.
    """
    if rows.schema != _SCHEMA:
        raise SheetError("rows of activation sheets in the form of another version")
    return [_sheet(row) for row in rows.to_pylist()]


def _sheet(row: dict[str, Any]) -> Sheet:
    """
    Raises:
        ValueError, TypeError: the row is none of a sheet.
    """
    if empty := [name for name in _NEEDED if row[name] is None]:
        raise ValueError(f"no value in {', '.join(empty)}")
    key = SheetKey(**{one.name: row.pop(one.name) for one in fields(SheetKey)})
    lists = {name: row[name] for name in ("experts", "top_k", *PHASES)}
    row |= {name: None if found is None else tuple(found) for name, found in lists.items()}
    return Sheet(key=key, **row)


_LIST = pa.list_(pa.float64())
_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("revision", pa.string()),
        ("weights", pa.string()),
        ("content", pa.string()),
        ("structure", pa.string()),
        ("engine", pa.string()),
        ("dtype", pa.string()),
        ("quantization", pa.string()),
        ("prune", pa.string()),
        ("args", pa.string()),
        ("dataset", pa.string()),
        ("texts", pa.string()),
        ("routing", pa.string()),
        ("temperature", pa.float64()),
        ("batch_size", pa.int64()),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("experts", pa.list_(pa.int64())),
        ("top_k", pa.list_(pa.int64())),
        ("decode", _LIST),
        ("prefill", _LIST),
        ("decode_passes", pa.int64()),
        ("decode_tokens", pa.int64()),
        ("prefill_passes", pa.int64()),
        ("prefill_tokens", pa.int64()),
        ("settled", pa.bool_()),
        ("source", pa.string()),
    ],
    metadata={"table": "activation_sheet", "format": str(FORMAT)},
)
_NULLABLE = ("revision", "content", "quantization", "prune", "args", "dataset", "texts", "routing")
_NEEDED = tuple(name for name in _SCHEMA.names if name not in (*_NULLABLE, *PHASES))


def _row(one: Sheet) -> dict[str, Any]:
    row = asdict(one)
    del row["between"]
    of_key: dict[str, Any] = row.pop("key")
    return of_key | row


def _routed(a: Architecture) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Experts and top-k of each decoder layer; 0 for a dense one."""
    experts = tuple(layer.experts.num if layer.experts else 0 for layer in a.layers)
    top_k = tuple(layer.experts.top_k if layer.experts else 0 for layer in a.layers)
    return experts, top_k


def _shape(experts: Sequence[int], top_k: Sequence[int]) -> str:
    """`24 layers, 24 of them MoE with top-2 of 8`."""
    kinds = sorted({(num, k) for num, k in zip(experts, top_k, strict=True) if num})
    words = " or ".join(f"top-{k} of {num}" for num, k in kinds) or "no experts"
    return f"{len(experts)} layers, {sum(map(bool, experts))} of them MoE with {words}"
