"""What the driver refuses, as exceptions, and the place a refusal points at.

    SweepError      the sweep file, an override or a profile is wrong      exit status 2
    ClusterError    the cluster cannot be reached, or can never run it     exit status 3
    HeadLost        the cluster was there, and its head is gone            exit status 3

A user reads one line: where it is written, what is wrong, what was expected. So a
value read from a sweep carries its `Place` from the first byte on, and whoever finds
it wrong, however late, can say where it stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class SweepError(Exception):
    """A mistake in what the user wrote. `str()` is one printable line."""

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        line: int | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = one_line(message, 600)
        """What is wrong and what was expected."""
        self.path = path
        """The sweep file; null for an override from the command line."""
        self.line = line
        """Line in the file, counted from 1, where it is known."""
        self.key = key
        """Dotted key as written, or the whole override."""

    def __str__(self) -> str:
        source = "command line" if self.path is None else one_line(str(self.path), 300)
        place = source if self.line is None else f"{source}:{self.line}"
        key = "" if self.key is None else f"{one_line(self.key, 120)}: "
        return f"{place}: {key}{self.message}"


class ClusterError(Exception):
    """The cluster cannot be reached, or can never satisfy a trial."""


class HeadLost(ClusterError):
    """The head of a cluster that was in use does not answer any more. Whatever is asked of Ray
    now waits for it, and never comes back."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written."""

    path: Path | None
    """The sweep file; null for the command line."""
    line: int | None
    """Line, counted from 1."""
    key: str | None
    """Dotted key as written, or the whole override."""

    def error(self, message: str) -> SweepError:
        """A `SweepError` that points here."""
        return SweepError(message, path=self.path, line=self.line, key=self.key)


def one_line(text: str, limit: int) -> str:
    """`text` with what cannot be printed escaped, cut to `limit` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest candidate, or the empty string.

    A name counts as near when it is spelt alike, or when its last part is.
    """
    names = list(candidates)
    word = word[:100]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    if not near:
        last = {name.rpartition(".")[2]: name for name in reversed(names)}
        part = difflib.get_close_matches(word.rpartition(".")[2], last, n=1, cutoff=0.7)
        near = [last[name] for name in part]
    return f"; did you mean {near[0]}?" if near else ""
