"""A sweep: what every point shares, what varies, and what must hold.

`orchestrator.draft` reads and merges what the user wrote; here it becomes values of the
trial's own types. A value of an axis is typed once, however many points it appears at.
`sweeps/README.md` has the grammar for users.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import fields
from orchestrator.draft import (
    Claims,
    Draft,
    constraint,
    flat,
    given_twice,
    list_of,
    merged,
    put_over,
)
from orchestrator.errors import Place, one_line
from orchestrator.where import Constraint
from orchestrator.yamltext import Node
from workers.contract.fingerprint import fingerprint
from workers.contract.trial import Trial
from workers.secrecy import hide, known_secrets

MAX_POINTS = 1_000_000
"""Points of a sweep before its constraints."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One value of one key at some points."""

    key: str
    """Dotted field of a trial."""
    value: Any
    """Typed, as the field holds it."""
    written: Any
    """Plain data, as the file has it, without secrets: it goes into records and tables."""
    place: Place = field(compare=False)
    """Where it is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One varied key and its values."""

    key: str
    """Dotted field of a trial."""
    cells: tuple[Cell, ...]
    """One for each value, in the order of the file."""

    @property
    def values(self) -> tuple[Any, ...]:
        """The typed values."""
        return tuple(cell.value for cell in self.cells)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A study: what every point shares, and what varies."""

    name: str
    """Name of the study and of its folder."""
    base: Trial
    """The trial under every point. Where it is none without them, the keys that every
    point sets stand at their first value."""
    grid: tuple[Axis, ...]
    """Axes that are multiplied, the first one slowest."""
    zip: tuple[Axis, ...]
    """Axes of one length that advance together."""
    cases: tuple[tuple[Cell, ...], ...] | None
    """Named blocks, one at a time; null where the file has none."""
    where: tuple[Constraint, ...]
    """All must hold."""
    profile: str
    """The profile that was asked for, whether or not the file has a block for it."""
    resolved: dict[str, Any]
    """The sweep after profile, overrides and references, as a file could hold it."""
    path: Path
    """The file."""
    places: Mapping[str, Place] = field(repr=False, compare=False)
    """Where the keys of `base` are written."""

    @property
    def factors(self) -> list[list[tuple[Cell, ...]]]:
        """The factors of the product, each a list of rows to choose one from."""
        factors: list[list[tuple[Cell, ...]]] = [
            [(cell,) for cell in axis.cells] for axis in self.grid
        ]
        if self.zip:
            factors.append(list(zip(*(axis.cells for axis in self.zip), strict=True)))
        if self.cases is not None:
            factors.append(list(self.cases))
        return factors

    def place(self, key: str, value: Any) -> Place:
        """Where the field `key` got `value` from, for a message about it."""
        rows = (row for factor in self.factors for row in factor)
        for cell in (cell for row in rows for cell in row):
            if cell.key == key and cell.value == value:
                return cell.place
        return self.places.get(key, Place(self.path, None, key))


def load(path: Path, overrides: Sequence[str] = (), profile: str = "cpu") -> Sweep:
    """The sweep of a file, under a profile and overrides `KEY=VALUE`.

    The file's block for `profile`, if it has one, is merged over the file, then the
    overrides in their order.

    Raises:
        SweepError: whatever is wrong with any of them, with its place.
    """
    return _typed(merged(path, overrides, profile), path, profile)


def _typed(draft: Draft, path: Path, profile: str) -> Sweep:
    typist = fields.Typist()
    known = known_secrets()

    def cell(key: str, node: Node) -> Cell:
        value = typist.typed(key, node)
        return Cell(key=key, value=value, written=hide(node.plain(), key, known), place=node.place)

    def axes(nodes: Mapping[str, Node]) -> tuple[Axis, ...]:
        return tuple(
            Axis(key=key, cells=tuple(cell(key, item) for item in list_of(node)))
            for key, node in nodes.items()
        )

    name = _name(draft.name, path)
    for key, node in draft.base.items():
        typist.typed(key, node)
    grid, zipped = axes(draft.grid), axes(draft.zip)
    blocks = None if draft.cases is None else [flat(case) for case in draft.cases]
    cases = tuple(tuple(cell(k, n) for k, n in block.items()) for block in blocks or ())
    _disjoint(draft, blocks or [])
    _distinct(grid)
    _one_length(draft.zip, zipped)
    where = tuple(constraint(node) for node in draft.where or ())
    sweep = Sweep(
        name=name,
        base=_base(draft, blocks or [], path),
        grid=grid,
        zip=zipped,
        cases=cases if blocks else None,
        where=where,
        profile=profile,
        resolved=_resolved(name, draft),
        path=path,
        places={key: node.place for key, node in draft.base.items()},
    )
    counts = [len(rows) for rows in sweep.factors]
    if (points := math.prod(counts)) > MAX_POINTS:
        product = " × ".join(f"{n:,}" for n in counts)
        raise Place(path, None, None).error(
            f"{product} = {points:,} points, but a sweep has at most {MAX_POINTS:,}"
        )
    return sweep


def _name(node: Node | None, path: Path) -> str:
    """The sweep's name, which becomes a folder's."""
    if node is None:
        raise Place(path, None, None).error("name is missing: every sweep has one")
    if not isinstance(node.value, str):
        found = fields.describe(node.value)
        raise node.place.error(f"expected text, but found {found}")
    if not _NAME.fullmatch(node.value):
        raise node.place.error(
            f"{one_line(node.value, 60)!r} cannot be the name of a folder here: at most 100 "
            "letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    return node.value


def _disjoint(draft: Draft, blocks: Sequence[Mapping[str, Node]]) -> None:
    """Refuses a key that two of grid, zip and cases set, or a block and a key inside it."""
    claims = Claims()
    places: dict[str, Place] = {}
    in_cases = {key: node for block in reversed(blocks) for key, node in block.items()}
    for number, section in enumerate((draft.grid, draft.zip, in_cases)):
        for key, node in section.items():
            clash = claims.find(key)
            if clash is not None:
                raise node.place.error(given_twice(key, clash, places[clash]))
            if number < 2:
                claims.add(key)
                places[key] = node.place


def _distinct(grid: Iterable[Axis]) -> None:
    for axis in grid:
        seen: dict[str, Cell] = {}
        for cell in axis.cells:
            first = seen.setdefault(fingerprint(cell.value), cell)
            if first is not cell:
                message = f"{fields.describe(cell.written)} is in this axis twice"
                raise cell.place.error(message)


def _one_length(nodes: Mapping[str, Node], axes: Sequence[Axis]) -> None:
    for axis in axes[1:]:
        if len(axis.cells) != len(axes[0].cells):
            raise nodes[axis.key].place.error(
                f"this list has length {len(axis.cells)} and {axes[0].key} has length "
                f"{len(axes[0].cells)}, but the lists of zip advance together"
            )


def _base(draft: Draft, blocks: Sequence[Mapping[str, Node]], path: Path) -> Trial:
    """The trial under every point, completed by what every point sets where it must be."""
    always = {key: list_of(node)[0] for key, node in (draft.grid | draft.zip).items()}
    if blocks:
        shared = set(blocks[0]).intersection(*blocks)
        always |= {key: node for key, node in blocks[0].items() if key in shared}
    try:
        return _trial(draft.base)
    except ValueError as error:
        first = error
    nodes = put_over(draft.base, always)
    try:
        return _trial(nodes)
    except ValueError as error:
        message = str(error if always else first)
    named = fields.mentioned(message)
    places = [nodes[key].place for key in named if key in nodes]
    place = places[0] if places else draft.places.get("base", Place(path, None, None))
    raise place.error(message)


def _trial(nodes: Mapping[str, Node]) -> Trial:
    for block in fields.catalogue().values():
        if block.kind == "block" and (
            not block.optional or any(key.startswith(f"{block.key}.") for key in nodes)
        ):
            for name in fields.required(block):
                if f"{block.key}.{name}" not in nodes:
                    raise ValueError(f"{block.key}.{name} is missing")
    return fields.structured(_nested(nodes))


def _nested(nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Flat keys as blocks inside one another, plain."""
    tree: dict[str, Any] = {}
    for key, node in nodes.items():
        *blocks, name = key.split(".")
        inner = tree
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[name] = node.plain()
    return tree


def _resolved(name: str, draft: Draft) -> dict[str, Any]:
    sections = {
        "base": _nested(draft.base),
        "grid": {key: node.plain() for key, node in draft.grid.items()},
        "zip": {key: node.plain() for key, node in draft.zip.items()},
        "cases": [node.plain() for node in draft.cases or ()],
        "where": [node.plain() for node in draft.where or ()],
    }
    return {"name": name} | {key: value for key, value in sections.items() if value}
