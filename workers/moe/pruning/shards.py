"""Safetensors files, read and written a tensor at a time.

The library maps a whole file when it reads and wants all of a file at once when it writes;
with both, pruning a checkpoint takes more memory than its shards. The format is a JSON header
before plain numbers, so here a tensor is a stretch of a file: reading seeks, writing appends,
and what is held is one tensor. Headers are checked by the library itself all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from workers.moe.pruning.errors import PruneError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES: Mapping[str, int] = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_CHUNK_BYTES = 2**24
"""Of a tensor that goes along as it is, held at a time."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor, or a stretch of one, in a file."""

    file: Path
    name: str
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def part(self, start: int, stop: int) -> Stored:
        """Items `start` to `stop` of the first dimension."""
        row = self.nbytes // self.shape[0]
        return replace(
            self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row
        )

    def item(self, index: int) -> Stored:
        """One item of the first dimension, which is dropped."""
        one = self.part(index, index + 1)
        return replace(one, shape=one.shape[1:])

    def raw(self) -> NDArray[Any]:
        """Its numbers as unsigned integers of their size, whatever they mean.

        Raises:
            PruneError: the file has become shorter.
        """
        with self.file.open("rb") as held:
            held.seek(self.offset)
            data = held.read(self.nbytes)
        if len(data) != self.nbytes:
            raise PruneError(f"{self.file} ends within {self.name}")
        return np.frombuffer(data, np.dtype(f"u{ITEM_BYTES[self.dtype]}")).reshape(self.shape)

    def values(self) -> NDArray[np.float32]:
        """Its numbers as float32.

        Raises:
            PruneError: the file has become shorter, or holds no plain floating-point numbers.
        """
        raw = self.raw()
        if self.dtype == "BF16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        if self.dtype in ("F16", "F32"):
            return raw.view(np.dtype(f"f{ITEM_BYTES[self.dtype]}")).astype(np.float32)
        raise PruneError(f"{self.name} is of type {self.dtype}, not BF16, F16 or F32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A tensor to write: what is kept of a stored one."""

    name: str
    source: Stored
    rows: Indices | None = None
    """Of the first dimension, in their order; null for all."""
    columns: Indices | None = None
    """Of the second."""
    padded: tuple[int, ...] | None = None
    """Shape to fill up with zeros, behind what is kept."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is written."""
        if self.padded is not None:
            return self.padded
        shape = list(self.source.shape)
        for place, kept in enumerate((self.rows, self.columns)):
            if kept is not None:
                shape[place] = len(kept)
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.source.dtype]

    def write(self, out: BinaryIO) -> None:
        """Appends its numbers to `out`."""
        if self.rows is None and self.columns is None and self.padded is None:
            self._copy(out)
            return
        raw = self.source.raw()
        if self.rows is not None:
            raw = raw[self.rows]
        if self.columns is not None:
            raw = raw[:, self.columns]
        if self.padded is not None:
            more = [(0, to - have) for have, to in zip(raw.shape, self.padded, strict=True)]
            raw = np.pad(raw, more)
        out.write(np.ascontiguousarray(raw).data)

    def _copy(self, out: BinaryIO) -> None:
        left = self.source.nbytes
        with self.source.file.open("rb") as held:
            held.seek(self.source.offset)
            while left:
                data = held.read(min(left, _CHUNK_BYTES))
                if not data:
                    raise PruneError(f"{self.source.file} ends within {self.source.name}")
                out.write(data)
                left -= len(data)


def files_of(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights of a checkpoint, by its index where it has one.

    Raises:
        PruneError: there are none, or the index names one that is not in the folder.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            apart = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PruneError(f"{index} cannot be read: {error!r}") from None
        files = tuple(folder / name for name in names)
        if apart:
            raise PruneError(f"{index} names {apart[0]!r}, which is no file of its folder")
        if missing := [file.name for file in files if not file.is_file()]:
            raise PruneError(f"{folder} lacks {missing[0]}, which its index names")
    elif (folder / SINGLE).is_file():
        files = (folder / SINGLE,)
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise PruneError(f"{folder} has no .safetensors file")
    return files


def tensors_of(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor in `files` by its name.

    Raises:
        PruneError: a file is torn or no safetensors file, or two hold one name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for one in _read_header(file):
            if one.name in found:
                raise PruneError(f"{file.name} and {found[one.name].file.name} hold {one.name}")
            found[one.name] = one
    return found


def write(tensors: Sequence[Written], folder: Path, *, limit: int) -> None:
    """Writes all of them into `folder`, in files of at most `limit` bytes (or of one tensor),
    with an index where there is more than one file."""
    files: list[list[Written]] = [[]]
    size = 0
    for one in tensors:
        if files[-1] and size + one.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(one)
        size += one.nbytes
    total = len(files)
    names = [
        SINGLE if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
        for number in range(1, total + 1)
    ]
    for name, held in zip(names, files, strict=True):
        _write_file(folder / name, held)
    if total > 1:
        where = {one.name: name for name, held in zip(names, files, strict=True) for one in held}
        size = sum(one.nbytes for one in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """`value` in a form that is the same every time."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _read_header(file: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):  # it checks the header against the size of the file
            pass
        with file.open("rb") as held:
            length = int.from_bytes(held.read(8), "little")
            header: dict[str, Any] = json.loads(held.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise PruneError(f"{file} cannot be read: {error}") from None
    header.pop("__metadata__", None)
    found = []
    for name, one in header.items():
        if one["dtype"] not in ITEM_BYTES:
            raise PruneError(f"{file}: {name} is of the unknown type {one['dtype']}")
        found.append(
            Stored(
                file=file,
                name=name,
                dtype=one["dtype"],
                shape=tuple(one["shape"]),
                offset=8 + length + one["data_offsets"][0],
            )
        )
    return found


def _write_file(file: Path, tensors: Sequence[Written]) -> None:
    # Wide numbers first, as the library does it: then all lie at multiples of their size.
    ordered = sorted(tensors, key=lambda one: (-ITEM_BYTES[one.source.dtype], one.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in ordered:
        header[one.name] = {
            "dtype": one.source.dtype,
            "shape": list(one.shape),
            "data_offsets": [offset, offset + one.nbytes],
        }
        offset += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for one in ordered:
            one.write(out)
