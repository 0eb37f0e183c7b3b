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
from collections.abc import Mapping
from typing import Any

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
    text = json.dumps(
        [FORMAT, canonical(value)], sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default) and type(value) is type(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return False
