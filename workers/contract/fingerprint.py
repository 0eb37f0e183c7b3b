"""A hash that means the same thing tomorrow.

Resume, grouping and replay all rest on one promise: equal configurations have equal
fingerprints, on every machine and in every later version. So a value enters as
canonical JSON, and whatever has no single stable spelling (NaN, sets, bytes, objects,
keys that are not strings) is refused rather than stringified. Fields that hold their
default are left out, so that a field added in a later version, with a default that
keeps today's behaviour, leaves every old identity as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

FORMAT = 1
"""Version of the canonical form. Raised when the meaning of a default changes."""


def canonical(value: Any, *, where: str = "value") -> Any:
    """`value` as plain JSON data with one spelling.

    Dataclasses become dictionaries without the fields at their default.

    Raises:
        TypeError: for a value with no stable spelling; the message names its place.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: canonical(inner, where=f"{where}.{field.name}")
            for field in dataclasses.fields(value)
            if not _is_default(field, inner := getattr(value, field.name))
        }
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} has no stable spelling")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string")
        return {key: canonical(value[key], where=f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonical(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} has no stable spelling")


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of SHA-256 over the canonical form and its version."""
    return digits(json_text([FORMAT, canonical(value)]))


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default) and type(value) is type(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return False


class Fingerprints:
    """`fingerprint` of very many values that share their parts, at a tenth of its cost.

    The canonical text of what a dataclass holds is kept by the object's identity, and the
    object with it, so that no other can take its place. It must not change meanwhile.
    """

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Any, str]] = {}
        self._readers: dict[type[Any], _Reader] = {}

    def of(self, value: Any) -> str:
        """The same 16 digits as `fingerprint(value)`."""
        return digits(f"[{FORMAT},{self._text(value)}]")

    def text(self, value: Any) -> str:
        """The canonical text of `value`, which must stay what it is."""
        return self._kept(value)

    def _text(self, value: Any) -> str:
        reader = self._readers.get(type(value))
        if reader is None:
            if isinstance(value, list | tuple):
                return f"[{','.join([self._kept(item) for item in value])}]"
            if not dataclasses.is_dataclass(value) or isinstance(value, type):
                return json_text(canonical(value))
            reader = self._readers[type(value)] = _reader(type(value))
        read, fields = reader
        parts = []
        for inner, (default, known, field) in zip(read(value), fields, strict=True):
            if inner is default:
                continue
            part = known.get(id(inner))
            if part is None:
                part = self._part(field, inner)
            if part:
                parts.append(part)
        return f"{{{','.join(parts)}}}"

    def _part(self, field: _Field, inner: Any) -> str:
        """A field's part of the text; empty where it is left out."""
        if not field.required and _is_default(field.field, inner):
            part = ""
        else:
            part = field.label + self._kept(inner)
        if not field.required:  # those differ from one object to the next
            field.parts[id(inner)] = part
            field.alive.append(inner)
        return part

    def _kept(self, value: Any) -> str:
        known = self._texts.get(id(value))
        if known is None:
            known = self._texts[id(value)] = (value, self._text(value))
        return known[1]


class _Field:
    """A field of a dataclass, with the texts of its values."""

    def __init__(self, field: dataclasses.Field[Any]) -> None:
        self.field = field
        self.required = field.default is field.default_factory is dataclasses.MISSING
        """Without a default it is never left out."""
        self.label = f"{json_text(field.name)}:"
        self.parts: dict[int, str] = {}
        """By `id` of a value: its part of the text; empty where it is left out."""
        self.alive: list[Any] = []
        """Those values, so that no other takes an `id` of theirs."""


_Reader: TypeAlias = tuple[
    Callable[[Any], Sequence[Any]], list[tuple[Any, Mapping[int, str], _Field]]
]
"""How all fields of a class are read at once, and of each its default, the texts of its
values, and itself, in the order of their names."""


def _reader(cls: type[Any]) -> _Reader:
    fields = [_Field(one) for one in sorted(dataclasses.fields(cls), key=lambda one: one.name)]
    names = [one.field.name for one in fields]
    read = attrgetter(*names) if len(names) > 1 else lambda value: (getattr(value, *names),)
    return read, [(one.field.default, one.parts, one) for one in fields]


def json_text(plain: Any) -> str:
    """Plain data in the one spelling that is hashed."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digits(text: str) -> str:
    """16 hexadecimal digits of a canonical text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
