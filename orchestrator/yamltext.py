"""YAML as values that know where they were written.

A mistake in a sweep must be answered with file, line and key, and plain loading throws
the lines away. So the parser's events are read straight into `Node`s, one per value,
each with its `Place`. Reading events also bounds what a hostile file can do before
anything is built: size, depth, number of values after aliases are followed, length of
one text. Nothing is ever constructed from a tag.

Scalars follow the small core of YAML 1.2 rather than the guesses of YAML 1.1: only
`true` and `false` are booleans, so `no` is a word; `010` is a word and not eight; a
quoted `"2"` is text; a number is finite and fits in 64 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import Place, SweepError

MAX_BYTES = 1 << 20
"""Size of a sweep file."""
MAX_DEPTH = 20
"""Blocks and lists inside one another."""
MAX_NODES = 10_000
"""Values in a document, each alias counted as what it stands for."""
MAX_TEXT = 10_000
"""Characters of one text."""
MAX_KEY = 200
"""Characters of one key."""

Scalar = bool | int | float | str | None

_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_REAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands."""

    value: Scalar | dict[str, Node] | list[Node]
    place: Place

    def plain(self) -> Any:
        """The value without places, as JSON could hold it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def read_file(path: Path) -> Node:
    """The one document of a file.

    Raises:
        SweepError: it cannot be read, is no UTF-8, is no YAML, or is out of bounds.
    """
    whole = Place(path, None, None)
    try:
        if path.exists() and not path.is_file():
            raise whole.error("this is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise whole.error(f"cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise whole.error("this is not the name of a file") from None
    if len(data) > MAX_BYTES:
        raise whole.error(f"a sweep file holds at most {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Place(path, line, None).error("this is not UTF-8 text") from None
    return _read(text, lambda line, key: Place(path, line, key))


def read_text(text: str, place: Place) -> Node:
    """The one value in `text`, all of it at `place`; empty text is null.

    Raises:
        SweepError: as `read_file`.
    """
    return _read(text, lambda line, key: place)


def scalar(text: str) -> Scalar:
    """What an unquoted scalar means.

    Raises:
        ValueError: a number that is not finite or needs more than 64 bits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise ValueError("a whole number must fit in 64 bits")
        return int(text)
    if _REAL.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is too large for a number")
        return value
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    return text


def _read(text: str, at: Callable[[int | None, str | None], Place]) -> Node:
    try:
        return _Reader(text, at).document()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise at(line, None).error(f"not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise at(line, None).error(f"not valid YAML: {error.reason}") from None
    except UnicodeEncodeError:
        raise at(None, None).error("this is not UTF-8 text") from None


class _Reader:
    """Recursive descent over the parser's events; the depth is bounded."""

    def __init__(self, text: str, at: Callable[[int | None, str | None], Place]) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._at = at
        self._anchors: dict[str, Node] = {}
        self._nodes = 0

    def document(self) -> Node:
        next(self._events)  # the stream starts
        start = next(self._events)
        if isinstance(start, yaml.StreamEndEvent):
            return Node(None, self._at(None, None))
        node = self._node(next(self._events), "", 0)
        next(self._events)  # the document ends
        more = next(self._events)
        if not isinstance(more, yaml.StreamEndEvent):
            raise self._error(more, "", "one document is expected, but a second one starts here")
        return node

    def _node(self, event: Any, key: str, depth: int, line: int | None = None) -> Node:
        """The value that `event` begins; `line` where its key stands, if it has one."""
        place = self._at(event.start_mark.line + 1 if line is None else line, key or None)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise place.error(f"the alias *{event.anchor} stands for nothing yet")
            return self._moved(self._anchors[event.anchor], key, depth)
        if event.tag is not None:
            raise place.error(f"tags such as {event.tag} are not allowed")
        self._admit(place, depth)
        value: Scalar | dict[str, Node] | list[Node]
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, place)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                value.append(self._node(item, f"{key}[{len(value)}]", depth + 1))
        else:
            value = self._mapping(key, depth)
        node = Node(value, place)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _scalar(self, event: Any, place: Place) -> Scalar:
        if len(event.value) > MAX_TEXT:
            raise place.error(f"a text of more than {MAX_TEXT:,} characters")
        if not event.implicit[0]:
            return str(event.value)
        try:
            return scalar(event.value)
        except ValueError as error:
            raise place.error(str(error)) from None

    def _mapping(self, key: str, depth: int) -> dict[str, Node]:
        value: dict[str, Node] = {}
        merged: list[Node] = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise self._error(event, key, "a key must be plain text")
            if len(event.value) > MAX_KEY:
                raise self._error(event, key, f"a key of more than {MAX_KEY} characters")
            inner = f"{key}.{event.value}" if key else event.value
            line = event.start_mark.line + 1
            node = self._node(next(self._events), inner, depth + 1, line)
            if event.value == "<<" and event.implicit[0]:
                merged += self._sources(node)
            elif event.value in value:
                first = value[event.value].place.line
                raise self._at(line, inner).error(f"given twice; first on line {first}")
            else:
                value[event.value] = node
        for source in merged:
            assert isinstance(source.value, dict)
            for name, node in source.value.items():
                if name not in value:
                    value[name] = self._moved(node, f"{key}.{name}" if key else name, depth)
        return value

    def _sources(self, node: Node) -> Sequence[Node]:
        sources = node.value if isinstance(node.value, list) else [node]
        for source in sources:
            if not isinstance(source.value, dict):
                raise node.place.error("<< takes a block or a list of blocks")
        return sources

    def _moved(self, node: Node, key: str, depth: int) -> Node:
        """A copy of an aliased value under the key that uses it, on the line it is written."""
        place = self._at(node.place.line, key)
        self._admit(place, depth)
        if isinstance(node.value, dict):
            block = {k: self._moved(v, f"{key}.{k}", depth + 1) for k, v in node.value.items()}
            return Node(block, place)
        if isinstance(node.value, list):
            items = [self._moved(v, f"{key}[{i}]", depth + 1) for i, v in enumerate(node.value)]
            return Node(items, place)
        return Node(node.value, place)

    def _admit(self, place: Place, depth: int) -> None:
        """Keeps the document within its bounds."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise place.error(f"more than {MAX_NODES:,} values, each alias counted in full")
        if depth > MAX_DEPTH:
            raise place.error(f"more than {MAX_DEPTH} blocks or lists inside one another")

    def _error(self, event: Any, key: str, message: str) -> SweepError:
        return self._at(event.start_mark.line + 1, key or None).error(message)
