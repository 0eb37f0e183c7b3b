"""What a sweep file, its profiles and the command line say, put over one another.

All three say the same things, so all three become the same `Draft`: flat maps from a
trial's dotted keys to values that know where they were written. Merging is then putting
one draft over another, and a mistake found later still names the line or the override
that won.

Every block of the file is checked for itself, the profiles that are not chosen too: a
laptop finds the mistake that would have stopped the cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import fields
from orchestrator.errors import Place, did_you_mean
from orchestrator.where import Constraint, compile_constraint
from orchestrator.yamltext import MAX_DEPTH, MAX_TEXT, Node, read_file, read_text
from workers.secrecy import hide, hide_arguments

SECTIONS = ("base", "grid", "zip", "cases", "where")
"""What a file, a profile and an override may give."""

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.-]*)\}")
_MISSING = re.compile(r"\\*\?\?\?")
_INDEXED = re.compile(r"(cases|where)(?:\[(\d{1,6})\]|\.(\d{1,6}))(?:\.(.+))?")


def merged(path: Path, overrides: Sequence[str], profile: str) -> Draft:
    """The file, its block for `profile` over it, the overrides in their order over both.

    References are followed: the draft that comes back holds plain values only.

    Raises:
        SweepError: what cannot be read, an unknown key, a value of the wrong kind, a
            malformed override, a reference to nothing.
    """
    root = read_file(path)
    if root.value is None:
        raise root.place.error("the file is empty")
    top = _block(root, ("name", *SECTIONS, "profiles"))
    draft = _draft(top)
    _check(draft)
    profiles = _block(top["profiles"]) if "profiles" in top else {}
    for name, node in profiles.items():
        patch = _draft(_block(node, SECTIONS))
        _check(patch)
        if name == profile:
            draft.merge(patch)
    for text in overrides:
        draft.merge(_override(text, draft))
    return _follow_references(draft)


@dataclass(kw_only=True, slots=True)
class Draft:
    """What a file, a profile or an override says."""

    name: Node | None = None
    base: dict[str, Node] = field(default_factory=dict)
    grid: dict[str, Node] = field(default_factory=dict)
    zip: dict[str, Node] = field(default_factory=dict)
    cases: list[Node] | None = None
    where: list[Node] | None = None
    cleared: list[str] = field(default_factory=list)
    """Sections given as null."""
    places: dict[str, Place] = field(default_factory=dict)
    """Where the sections of the file are."""

    def merge(self, patch: Draft) -> None:
        """Puts `patch` over this draft."""
        for section in patch.cleared:
            setattr(self, section, None if section in ("cases", "where") else {})
        self.name = patch.name or self.name
        self.base = put_over(self.base, patch.base)
        self.cases = self.cases if patch.cases is None else patch.cases
        self.where = self.where if patch.where is None else patch.where
        for axes, news in ((self.grid, patch.grid), (self.zip, patch.zip)):
            for key, node in news.items():
                if node.value is not None:
                    axes[key] = node
                elif axes.pop(key, None) is None:
                    raise node.place.error(f"there is no axis {key} to take away")


def _draft(top: Mapping[str, Node]) -> Draft:
    """Sorts sections into flat maps; refuses unknown keys and wrong shapes."""
    draft = Draft(name=top.get("name"), places={key: node.place for key, node in top.items()})
    for section in SECTIONS:
        node = top.get(section)
        if node is None:
            continue
        if node.value is None:
            draft.cleared.append(section)
        elif section == "base":
            draft.base = flat(node)
        elif section == "cases":
            draft.cases = list_of(node)
            for case in draft.cases:
                flat(case)
        elif section == "where":
            draft.where = list_of(node, may_be_empty=True)
        else:
            axes = flat(node)
            for axis in axes.values():
                if axis.value is not None:
                    list_of(axis)
            setattr(draft, section, axes)
    return draft


def _check(draft: Draft) -> None:
    """Refuses values of the wrong kind; those that hold references are seen later."""
    axes = [*draft.grid.items(), *draft.zip.items()]
    values = [
        *draft.base.items(),
        *((key, item) for key, axis in axes if axis.value is not None for item in list_of(axis)),
        *(pair for case in draft.cases or () for pair in flat(case).items()),
    ]
    for key, node in values:
        if not _refers(node):
            fields.check(key, node)
    for node in draft.where or ():
        if not _refers(node):
            constraint(node)


def _block(node: Node, allowed: Sequence[str] = ()) -> dict[str, Node]:
    """The keys of a block, each of them one of `allowed` where that is given."""
    if node.value is None:
        return {}
    if not isinstance(node.value, dict):
        found = fields.describe(node.value)
        raise node.place.error(f"expected a block of keys, but found {found}")
    for key, inner in node.value.items():
        if allowed and key not in allowed:
            raise inner.place.error(_unknown_section(key, allowed))
    return node.value


def _unknown_section(key: str, allowed: Sequence[str]) -> str:
    if fields.find(key) is not None:
        return f"unknown key; did you mean base.{key}?"
    hint = did_you_mean(key.partition(".")[0], allowed) or f"; expected one of {', '.join(allowed)}"
    return f"unknown key{hint}"


def list_of(node: Node, *, may_be_empty: bool = False) -> list[Node]:
    if not isinstance(node.value, list):
        value = node.value
        if isinstance(value, str):
            value = hide(value, (node.place.key or "").partition("=")[0])
        raise node.place.error(f"expected a list, but found {fields.describe(value)}")
    if not node.value and not may_be_empty:
        raise node.place.error("the list is empty; fill it, or leave the key out")
    return node.value


def flat(node: Node) -> dict[str, Node]:
    """Dotted key to value: a block nests and so does a dot, a list is a value.

    An empty block is a value too where a block may be null: it stands for its defaults.
    """
    if node.value is None or not isinstance(node.value, dict):
        found = fields.describe(node.value)
        raise node.place.error(f"expected a block of keys, but found {found}")
    flat: dict[str, Node] = {}
    claims = Claims()
    for key, leaf in _leaves(node.value, ""):
        if (clash := claims.find(key)) is not None:
            raise leaf.place.error(given_twice(key, clash, flat[clash].place))
        claims.add(key)
        flat[key] = leaf
    return flat


def _leaves(block: Mapping[str, Node], prefix: str) -> Iterator[tuple[str, Node]]:
    for name, node in block.items():
        key = prefix + name
        known = fields.find(key)
        if known is None:
            raise node.place.error(fields.unknown(key))
        if key.count(".") > MAX_DEPTH:
            raise node.place.error(f"more than {MAX_DEPTH} keys inside one another")
        if isinstance(node.value, dict) and (node.value or not known.sweepable):
            yield from _leaves(node.value, f"{key}.")
        elif not known.sweepable:
            found = fields.describe(node.value)
            hint = "; vary its fields, or use cases" if isinstance(node.value, list) else ""
            raise node.place.error(f"expected a block of keys, but found {found}{hint}")
        else:
            yield key, node


class Claims:
    """Keys that are taken. A block and a key inside it cannot be taken both."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys: set[str] = set()
        self._inside: dict[str, str] = {}
        for key in keys:
            self.add(key)

    def add(self, key: str) -> None:
        self._keys.add(key)
        for i, character in enumerate(key):
            if character == ".":
                self._inside[key[:i]] = key

    def find(self, key: str) -> str | None:
        """The taken key that is `key`, lies inside it, or holds it."""
        if key in self._inside:
            return self._inside[key]
        while key not in self._keys:
            key = key.rpartition(".")[0]
            if not key:
                return None
        return key


def given_twice(key: str, other: str, place: Place) -> str:
    first = f"first on line {place.line}" if place.line else "also on the command line"
    if key == other:
        return f"given twice; {first}"
    block, inner = sorted((key, other), key=len)
    return f"{block} and {inner} in it are both given; {first}"


def put_over(under: Mapping[str, Node], upper: Mapping[str, Node]) -> dict[str, Node]:
    """`upper` over `under`: a key gives way to itself, to its block and to keys inside it."""
    claims = Claims(upper)
    return {k: node for k, node in under.items() if claims.find(k) in (None, k)} | dict(upper)


def _override(text: str, draft: Draft) -> Draft:
    """What one `KEY=VALUE` of the command line says; an item of a list is put into `draft`'s."""
    place = Place(None, None, hide_arguments([text])[0])
    if any("\ud800" <= one <= "\udfff" for one in text):  # how Python hands on bytes that are none
        raise place.error("this is not UTF-8 text")
    key, equals, value = text.partition("=")
    if not equals:
        raise place.error("expected KEY=VALUE, such as base.workload.batch_size=4")
    node = read_text(value, place)
    if match := _INDEXED.fullmatch(key):
        return _item(match, node, draft)
    section, _, rest = key.partition(".")
    if key == "name":
        return Draft(name=node)
    if section == "profiles":
        raise place.error("a profile is chosen, not overridden; override base, grid and so on")
    if section not in SECTIONS:
        raise place.error(_unknown_section(key, ("name", *SECTIONS)))
    if rest and section in ("cases", "where"):
        raise place.error(f"expected {section}=[…], or one item as in {section}[0]=…")
    return _draft({section: Node({rest: node}, place) if rest else node})


def _item(match: re.Match[str], node: Node, draft: Draft) -> Draft:
    section, index, rest = match[1], int(match[2] or match[3]), match[4]
    items = list((draft.where if section == "where" else draft.cases) or ())
    if index >= len(items):
        raise node.place.error(f"{section} has {len(items)} items, counted from 0")
    if section == "where":
        items[index] = node
    else:
        patch = flat(Node({rest: node}, node.place) if rest else node)
        items[index] = Node(put_over(flat(items[index]), patch), items[index].place)
    return _draft({section: Node(items, node.place)})


def constraint(node: Node) -> Constraint:
    """The constraint that an item of `where` says."""
    if not isinstance(node.value, str):
        found = fields.describe(node.value)
        raise node.place.error(f"expected an expression, but found {found}")
    return compile_constraint(node.value, node.place)


# References: ${name} and ${base.…} stand for a value of the merged sweep.


def _refers(node: Node) -> bool:
    if isinstance(node.value, dict):
        return any(_refers(inner) for inner in node.value.values())
    if isinstance(node.value, list):
        return any(_refers(inner) for inner in node.value)
    return isinstance(node.value, str) and "${" in node.value


def _follow_references(draft: Draft) -> Draft:
    """The draft without references.

    Only single values can be referred to, and none that refers on: there is no cycle to
    find and nothing to blow up. OmegaConf's resolvers are never run, since what
    `${oc.env:…}` reads would reach the manifest. Nothing that looks like one is let
    through to OmegaConf either.
    """
    known = {f"base.{key}": node for key, node in draft.base.items()}
    if draft.name is not None:
        known["name"] = draft.name

    def value(name: str, place: Place) -> Any:
        if name not in known:
            hint = did_you_mean(name, known)
            raise place.error(f"${{{name}}} is not given in this sweep{hint}")
        node = known[name]
        if isinstance(node.value, dict | list) or _refers(node):
            raise place.error(f"${{{name}}} is not a single value of its own")
        return node.value

    def follow(node: Node) -> Node:
        if isinstance(node.value, dict):
            return Node({key: follow(inner) for key, inner in node.value.items()}, node.place)
        if isinstance(node.value, list):
            return Node([follow(inner) for inner in node.value], node.place)
        if not isinstance(node.value, str):
            return node
        found = node.value
        if "${" in found:
            if "${" in _REFERENCE.sub("_", found):
                raise node.place.error(
                    "${…} takes a plain key such as ${base.model.name}; resolvers are refused"
                )
            if whole := _REFERENCE.fullmatch(found):
                return Node(value(whole[1], node.place), node.place)
            found = _REFERENCE.sub(lambda m: _spelt(value(m[1], node.place)), found)
            if "${" in found or len(found) > MAX_TEXT:
                raise node.place.error("what the references make here is not plain, short text")
        if _MISSING.fullmatch(found):
            raise node.place.error("??? stands for a value that is missing; give one")
        return Node(found, node.place)

    def follow_all(nodes: Mapping[str, Node]) -> dict[str, Node]:
        return {key: follow(node) for key, node in nodes.items()}

    return Draft(
        name=draft.name and follow(draft.name),
        base=follow_all(draft.base),
        grid=follow_all(draft.grid),
        zip=follow_all(draft.zip),
        cases=draft.cases and [follow(node) for node in draft.cases],
        where=draft.where and [follow(node) for node in draft.where],
        places=draft.places,
    )


def _spelt(value: bool | int | float | str | None) -> str:
    return value if isinstance(value, str) else json.dumps(value)
