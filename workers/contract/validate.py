"""The few checks that values share, with messages that name key, value and bound."""

from __future__ import annotations

import math


def at_least(key: str, value: float, bound: float) -> None:
    """Raises ValueError unless `value` is finite and ≥ `bound`."""
    if not math.isfinite(value) or value < bound:
        raise ValueError(f"{key} is {value}, but must be at least {bound}")


def positive(key: str, value: float) -> None:
    """Raises ValueError unless `value` is finite and > 0."""
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} is {value}, but must be above 0")


def fraction(key: str, value: float, *, closed: bool) -> None:
    """Raises ValueError unless 0 < `value` < 1 (≤ 1 when `closed`)."""
    if not 0 < value < 1 and not (closed and value == 1):
        raise ValueError(
            f"{key} is {value}, but must be above 0 and {'at most' if closed else 'below'} 1"
        )


def named(key: str, value: str) -> None:
    """Raises ValueError unless `value` is one printable, non-empty line."""
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{key} is {value!r}, but must be a printable, non-empty name")
