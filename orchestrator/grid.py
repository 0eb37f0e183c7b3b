"""From a sweep to its points.

A sweep of a hundred thousand points must be laid out while its user waits. Two things
make that cheap. Values were typed once, per axis value; here a trial is put together by
plain constructors. And the five blocks of a trial vary by few axes each, so a block is
made once for every combination of the rows that touch it and shared by all points that
have it, and so is the verdict of a constraint.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from orchestrator import fields
from orchestrator.errors import Place, SweepError, one_line
from orchestrator.sweep import Cell, Sweep
from orchestrator.where import Constraint, NoAnswer, Undecided
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.identity import Identities

Resolve = Callable[[Model], Mapping[str, Any]]
"""Answers a model with its own dimensions (`OWN`), those that are known. It must not raise:
nothing known is an empty mapping."""
OWN = ("ffn_dim", "num_experts", "top_k", "num_layers", "hidden_size")
"""Dimensions that a model has of its own. A constraint on one that is not known keeps the point."""
Index = tuple[int, ...]
"""One row number for each factor of the product."""
Row = tuple[Cell, ...]
"""What one choice in a factor sets."""
Factors = list[list[Row]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One trial of a sweep."""

    trial: Trial
    """What runs."""
    trial_id: str
    """Its identity, after names and nulls are resolved."""
    axes: dict[str, Any]
    """What was varied, by axis key, as the file writes the value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expansion:
    """All points of a sweep."""

    points: tuple[Point, ...]
    """Those for which every constraint holds. Grid axes come first, in the order of the
    file and the first one slowest, then zip, then cases."""
    size: int
    """Points before constraints."""
    dropped: dict[str, int]
    """By constraint, points that it was the first to drop."""
    identities: Identities = field(compare=False, repr=False)
    """What the names in the points stand for."""


def expand(sweep: Sweep, resolve: Resolve | None = None) -> Expansion:
    """The points of `sweep`.

    A constraint that reads a field which is null in the trial is answered by `resolve`.

    Raises:
        SweepError: a point contradicts itself, two points are the same trial, a
            constraint has no answer at a point, or no point is left.
    """
    with uncollected():
        return _expand(sweep, resolve)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage meanwhile, and none afterwards in what was made.

    A plan is a million objects that stay, none of them in a cycle. Python would go through
    all of them again and again while they become more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _expand(sweep: Sweep, resolve: Resolve | None) -> Expansion:
    factors = sweep.factors
    blocks = {
        part.name: _Block(part.name, getattr(sweep.base, part.name), factors, sweep.places)
        for part in dataclasses.fields(sweep.base)
    }
    checks = [_Check(constraint, blocks, factors, resolve) for constraint in sweep.where]
    dropped = {constraint.text: 0 for constraint in sweep.where}
    axes = [[{cell.key: cell.written for cell in row} for row in rows] for rows in factors]
    model, layout, workload, engine, measure = (block.maker() for block in blocks.values())
    identities = Identities()
    once = _Once(sweep)
    points: list[Point] = []
    size = 0
    for index in itertools.product(*(range(len(rows)) for rows in factors)):
        size += 1
        refused = next((check for check in checks if not check.holds(index)), None)
        if refused is not None:
            dropped[refused.constraint.text] += 1
            continue
        trial = Trial(
            model=model(index),
            layout=layout(index),
            workload=workload(index),
            engine=engine(index),
            measure=measure(index),
        )
        trial_id = identities.trial_id(trial)
        once.add(trial_id, size - 1)
        varied: dict[str, Any] = {}
        for rows, i in zip(axes, index, strict=True):
            varied |= rows[i]
        points.append(Point(trial=trial, trial_id=trial_id, axes=varied))
    if not points:
        counts = ", ".join(f"{text!r} dropped {n:,}" for text, n in dropped.items() if n)
        worst = max(sweep.where, key=lambda constraint: dropped[constraint.text])
        raise worst.place.error(f"no point is left of {size:,}: {counts}")
    return Expansion(points=tuple(points), size=size, dropped=dropped, identities=identities)


class _Part:
    """What the rows of a sweep set under one key."""

    def __init__(self, key: str, factors: Factors, places: Mapping[str, Place]) -> None:
        self.key = key
        rows = {i: [_under(key, row) for row in factor] for i, factor in enumerate(factors)}
        self.rows = {i: own for i, own in rows.items() if any(own)}
        self.pick = _picker(list(self.rows))
        """The part of an index that matters here."""
        self._places = places

    def cells(self, index: Index) -> list[Cell]:
        """What is set at a point."""
        return [cell for i, rows in self.rows.items() for cell in rows[index[i]]]

    def error(self, index: Index, message: str) -> SweepError:
        """Points at the cell that the message names first, or else at the base."""
        cells = self.cells(index)
        named = fields.mentioned(message)
        places = {cell.key: cell.place for cell in reversed(cells)}
        at = [places[n] for n in named if n in places]
        at += [self._places[n] for n in named if n in self._places]
        place = at[0] if at else cells[-1].place
        return place.error(f"with {_spelt([tuple(cells)])}: {message}")


class _Inner(_Part):
    """A block inside a block, where rows set keys in it: a pruning, a draft, arguments."""

    def __init__(self, field: fields.Field, factors: Factors, places: Mapping[str, Place]) -> None:
        super().__init__(field.key, factors, places)
        self._field = field
        self._known: dict[Any, Any] = {}

    def put(self, index: Index, values: dict[str, Any]) -> None:
        """Sets it among its owner's values, if the point sets a key in it."""
        key = self.pick(index)
        if key not in self._known:
            self._known[key] = self._make(index, values[self._field.name])
        if self._known[key] is not None:
            values[self._field.name] = self._known[key]

    def _make(self, index: Index, current: Any) -> Any:
        """The block with the point's keys over the base's; None where no key is set."""
        start = len(self.key) + 1
        changes = {cell.key[start:]: cell.value for cell in self.cells(index)}
        if not changes:
            return None
        if self._field.kind == "free":
            return _with(current, changes)
        for name in sorted({key.partition(".")[0] for key in changes if "." in key}):
            deeper = {key: changes.pop(key) for key in list(changes) if key.startswith(f"{name}.")}
            under = {key.partition(".")[2]: value for key, value in deeper.items()}
            changes[name] = _with(getattr(current, name, {}), under)
        if current is not None:
            return dataclasses.replace(current, **changes)
        for name in fields.required(self._field):
            if name not in changes:
                raise self.error(index, f"{self.key}.{name} is missing")
        return self._field.type(**changes)


class _Block(_Part):
    """One of the five blocks of a trial, at every combination of the rows that touch it."""

    def __init__(self, key: str, base: Any, factors: Factors, places: Mapping[str, Place]) -> None:
        super().__init__(key, factors, places)
        self._type = type(base)
        self._base = {part.name: getattr(base, part.name) for part in dataclasses.fields(base)}
        split = {
            i: [[(cell.key.split(".", 2), cell.value) for cell in row] for row in rows]
            for i, rows in self.rows.items()
        }
        self._direct = {
            i: [{k[1]: value for k, value in row if len(k) == 2} for row in rows]
            for i, rows in split.items()
        }
        deeper = {k[1] for rows in split.values() for row in rows for k, _ in row if len(k) == 3}
        self._inner = [
            _Inner(fields.catalogue()[f"{key}.{name}"], factors, places) for name in sorted(deeper)
        ]
        self._blocks: dict[Any, Any] = {}

    def maker(self) -> Callable[[Index], Any]:
        """`built`, which looks at no index where nothing varies."""
        if self.rows:
            return self.built
        once = cache(lambda: self.built(()))
        return lambda index: once()

    def built(self, index: Index) -> Any:
        """The dataclass at a point; raises what the contract says against it."""
        found = self._made(index)
        if isinstance(found, SweepError):
            raise found
        return found

    def reader(self, name: str, resolve: Resolve | None) -> Callable[[Index], Any]:
        """How a constraint reads one of its names at a point.

        A block that contradicts itself can be read as well: the constraint may be what
        drops the point.
        """
        _, field, *path = name.split(".")
        answers: dict[Any, Mapping[str, Any]] = {}
        at, given = self._given(name)

        def read(index: Index) -> Any:
            if given and (known := given[index[at]]) is not None:
                return known
            block = self._made(index)
            if not isinstance(block, SweepError):
                value = getattr(block, field, None)
            elif name in fields.catalogue():
                value = self._values(index)[field]
            else:
                raise block
            for part in path:
                if value is None:
                    return None
                value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
            if value is not None or resolve is None or self.key != "model" or path:
                return value
            key = self.pick(index)
            if key not in answers:
                answers[key] = resolve(self.built(index))
            if field in OWN and field not in answers[key]:
                raise Undecided(name)
            return answers[key].get(field)

        return read

    def touching(self, name: str) -> list[int]:
        """The factors that the answer of `reader` depends on."""
        at, given = self._given(name)
        return [at] if given and None not in given else list(self.rows)

    def _given(self, name: str) -> tuple[int, list[Any]]:
        """The factor that sets a field in each of its rows, and to what; nothing if none does."""
        single = self.rows if name.count(".") == 1 else {}  # deeper ones are put together
        for i, rows in single.items():
            found = [cell.value for row in rows for cell in row if cell.key == name]
            if len(found) == len(rows):
                return i, found
        return 0, []

    def _made(self, index: Index) -> Any:
        """The dataclass at a point, or the SweepError in its place."""
        key = self.pick(index)
        found = self._blocks.get(key)
        if found is None:
            try:
                found = self._type(**self._values(index))
            except ValueError as error:
                found = self.error(index, str(error))
            self._blocks[key] = found
        return found

    def _values(self, index: Index) -> dict[str, Any]:
        values = self._base.copy()
        for i, rows in self._direct.items():
            values.update(rows[index[i]])
        for inner in self._inner:
            inner.put(index, values)
        return values


class _Check:
    """A constraint, with its verdict for every combination of the rows that it depends on."""

    def __init__(
        self,
        constraint: Constraint,
        blocks: Mapping[str, _Block],
        factors: Factors,
        resolve: Resolve | None,
    ) -> None:
        self.constraint = constraint
        self._factors = factors
        read = {name: blocks[name.partition(".")[0]] for name in constraint.names}
        self._readers = {name: block.reader(name, resolve) for name, block in read.items()}
        self._touching = sorted({i for block in read.values() for i in block.rows})
        self._pick = _picker(sorted({i for n, block in read.items() for i in block.touching(n)}))
        self._verdicts: dict[Any, bool] = {}

    def holds(self, index: Index) -> bool:
        key = self._pick(index)
        verdict = self._verdicts.get(key)
        if verdict is None:
            readers = self._readers
            try:
                verdict = self.constraint.holds(lambda name: readers[name](index))
            except Undecided:  # nothing speaks against the point
                verdict = True
            except NoAnswer as error:
                at = _spelt(self._factors[i][index[i]] for i in self._touching)
                raise self.constraint.place.error(f"{error} (at {at})") from None
            self._verdicts[key] = verdict
        return verdict


class _Once:
    """Refuses the same trial at two points, by what they are and not by how they are spelled."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._seen: dict[str, int] = {}

    def add(self, trial_id: str, number: int) -> None:
        """Takes the point of that number in the product."""
        first = self._seen.setdefault(trial_id, number)
        if first != number:
            raise self._error(first, number)

    def _error(self, *numbers: int) -> SweepError:
        """Points at what tells the second from the first."""
        factors = self._sweep.factors
        first, second = (_row(factors, number) for number in numbers)
        differ = [
            cell
            for one, other in zip(first, second, strict=True)
            if one is not other
            for cell in other
        ]
        place = differ[-1].place if differ else Place(self._sweep.path, None, "cases")
        return place.error(f"two points are the same trial: {_spelt(first)} and {_spelt(second)}")


def _row(factors: Factors, number: int) -> list[Row]:
    """The rows of one point of the product, counted from 0."""
    rows: list[Row] = []
    for factor in reversed(factors):
        number, i = divmod(number, len(factor))
        rows.insert(0, factor[i])
    return rows


def _under(key: str, row: Row) -> Row:
    """The cells of a row that lie inside a block."""
    return tuple(cell for cell in row if cell.key.startswith(f"{key}."))


def _picker(touching: list[int]) -> Callable[[Index], Any]:
    """The part of an index that matters, as a dictionary key."""
    return operator.itemgetter(*touching) if touching else lambda index: ()


def _with(args: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with dotted keys set; what is no block gives way to one."""
    changed = dict(args)
    for key, value in changes.items():
        *blocks, last = key.split(".")
        inner = changed
        for block in blocks:
            below = inner.get(block)
            inner[block] = dict(below) if isinstance(below, dict) else {}
            inner = inner[block]
        inner[last] = value
    return changed


def _spelt(rows: Iterable[Row]) -> str:
    """The rows of a point in a message."""
    cells = [f"{cell.key}={json.dumps(cell.written)}" for row in rows for cell in row]
    return one_line(", ".join(cells), 200) or "the base"
