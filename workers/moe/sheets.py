"""Activation sheets: what a probe found, kept for sweeps that do not probe.

MoE-CAP §5 stores activation sheets "for reuse in future evaluations". A sheet is the mean
number of distinct experts per layer and pass, of decode and prefill apart, and what it rests
on. It holds for one model with its weights, one structure, one source of prompts and one batch
with its lengths: all of it is the key, since each moves the routing. One sheet is one Arrow
IPC file of one row, `<folder>/<key without batch>/<batch>.arrow`, written whole and renamed
into place, so that sweeps may share a folder and `polars.scan_ipc` reads it.

A batch that was not probed is interpolated between the nearest that were, on both sides and
never beyond them, and says so. What is interpolated is the ratio to the uniform expectation,
linear in the logarithm of the batch: that keeps the curve's shape, which the numbers
themselves would cut across, and gives uniform routing back exactly.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from workers.contract.fingerprint import fingerprint
from workers.moe.accounting import distinct_experts
from workers.moe.structure import Architecture

FORMAT = 1
"""Version of the files; another one is refused."""

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
    structure: str
    """`structure_of` the architecture that ran."""
    dataset: str | None
    """Source of prompts; null for random token ids."""
    routing: str | None
    """Null for the model's own router."""
    batch_size: int
    """Requests in flight together, of all data-parallel replicas."""
    input_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a sheet is {getattr(self, name)}, below 1")

    @property
    def family(self) -> str:
        """The same for all batches: 16 hexadecimal digits."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != _BATCH})


_BATCH = "batch_size"


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
        for name in ("decode", "prefill"):
            found = getattr(self, name)
            if found is None:
                continue
            if len(found) != len(self.experts):
                raise SheetError(
                    f"{name} of a sheet has {len(found)} numbers for {len(self.experts)} layers"
                )
            if any(not 0 <= value <= most for value, most in zip(found, self.experts, strict=True)):
                raise SheetError(f"{name} of a sheet has a layer with more experts than it has")

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

    def put(self, one: Sheet) -> Path:
        """Store a measured sheet; one of the same key is replaced, at once.

        Raises:
            SheetError: the sheet is an interpolated one.
        """
        if one.between is not None:
            raise SheetError("an interpolated sheet is not measured, so it is not stored")
        path = self._path(one.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with part.open("wb") as file:
                with pa.ipc.new_file(file, _SCHEMA) as writer:
                    writer.write_batch(pa.RecordBatch.from_pylist([_row(one)], schema=_SCHEMA))
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
        """The sheet of `key`, else one interpolated between its neighbours, else null.

        Neighbours differ in the batch alone, and both sides need one. An interpolated sheet
        has `between` set and is settled where both neighbours are.

        Raises:
            SheetError: as `get`.
        """
        exact = self.get(key)
        if exact is not None:
            return exact
        batches = self.batches(key)
        below = max((batch for batch in batches if batch < key.batch_size), default=None)
        above = min((batch for batch in batches if batch > key.batch_size), default=None)
        if below is None or above is None:
            return None
        ends = [self.get(replace(key, batch_size=batch)) for batch in (below, above)]
        if ends[0] is None or ends[1] is None:  # taken away meanwhile
            return None
        return interpolated(ends[0], ends[1], key.batch_size)

    def batches(self, key: SheetKey) -> list[int]:
        """Batches that there is a measured sheet of, all else as in `key`, ascending."""
        names = (path.stem for path in self._path(key).parent.glob("*.arrow"))
        return sorted(int(name) for name in names if name.isdecimal())

    def __iter__(self) -> Iterator[Sheet]:
        """All sheets, in the order of their paths.

        Raises:
            SheetError: as `get`.
        """
        for path in sorted(self.folder.glob("*/*.arrow")):
            if not path.name.startswith("."):
                yield read(path)

    def _path(self, key: SheetKey) -> Path:
        return self.folder / key.family / f"{key.batch_size}.arrow"


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

    def between(one: Numbers | None, other: Numbers | None, tokens: int) -> Numbers | None:
        if one is None or other is None:
            return None
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
        decode=between(low.decode, high.decode, 1),
        prefill=between(low.prefill, high.prefill, low.key.input_tokens),
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
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise SheetError(f"{path}: not a whole Arrow file ({error})") from error
    if (table.schema.metadata or {}).get(b"format") != str(FORMAT).encode():
        raise SheetError(f"{path}: no activation sheet of format {FORMAT}")
    if table.schema != _SCHEMA or table.num_rows != 1:
        raise SheetError(f"{path}: not one activation sheet")
    row = table.to_pylist()[0]
    key = SheetKey(**{one.name: row.pop(one.name) for one in fields(SheetKey)})
    lists = {name: row[name] for name in ("experts", "top_k", "decode", "prefill")}
    row |= {name: None if found is None else tuple(found) for name, found in lists.items()}
    return Sheet(key=key, **row)


_LIST = pa.list_(pa.float64())
_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("revision", pa.string()),
        ("weights", pa.string()),
        ("structure", pa.string()),
        ("dataset", pa.string()),
        ("routing", pa.string()),
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
