"""The names that a sweep may vary, and what each of them takes.

All of it is read off the dataclasses of `workers.contract`, so a field added there can
be swept at once. Values become trial fields through OmegaConf's structured
configurations. OmegaConf is kind: it turns the text "2" into 2, 1 into true and 3 into
"3". A measurement should not rest on such guesses (`revision: 1e10` would be looked up
as '10000000000.0'), so every value is checked first, and refused with what to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import did_you_mean, one_line
from orchestrator.yamltext import Node, scalar
from workers.contract.engine import REMOTE_CODE, SAY_IT
from workers.contract.trial import Trial

HIDDEN_SIZE = "model.hidden_size"
"""A dimension that no sweep sets, but a constraint may read."""

Kind = Literal["int", "float", "str", "bool", "choice", "texts", "block", "free"]

_KINDS: dict[Any, Kind] = {int: "int", float: "float", str: "str", bool: "bool"}
_EXPECTED: dict[Kind, str] = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "texts": "a list of texts",
    "block": "a block of keys",
    "free": "a block of keys",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One dotted name of a trial."""

    key: str
    """`model.prune.ratio`."""
    owner: type[Any]
    """The dataclass that has the field."""
    kind: Kind
    """What it takes; `free` passes anything on, under any name."""
    optional: bool = False
    """Null is a value too."""
    required: bool = False
    """Has no default."""
    choices: tuple[str, ...] = ()
    """The words that a `choice` takes."""
    switch: bool = False
    """A choice that takes true and false as well."""
    type: Any = None
    """The dataclass of a `block`."""

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def sweepable(self) -> bool:
        """False for the blocks that a trial always has: their fields are swept instead."""
        return self.kind != "block" or self.optional

    @property
    def expected(self) -> str:
        """What to write, in words."""
        words = _EXPECTED.get(self.kind) or f"one of {', '.join(self.choices)}"
        if self.switch:
            words = f"true, false or {' or '.join(self.choices)}"
        return f"{words} or null" if self.optional else words


@cache
def catalogue() -> Mapping[str, Field]:
    """Every field of a trial by dotted key, blocks before their fields."""
    return {field.key: field for field in _walk("", Trial)}


@cache
def readable() -> frozenset[str]:
    """Names that a constraint may read: fields, what follows from them, and one more."""
    derived = {
        f"{block.key}.{name}"
        for block in catalogue().values()
        if block.kind == "block"
        for name, member in vars(block.type).items()
        if isinstance(member, property)
    }
    swept = {field.key for field in catalogue().values() if field.sweepable}
    return frozenset(swept | derived | {HIDDEN_SIZE})


def find(key: str) -> Field | None:
    """The field that `key` names or, under a free block, lies in."""
    if not all(key.split(".")):
        return None
    found = catalogue().get(key)
    while found is None and "." in key:
        key = key.rpartition(".")[0]
        found = catalogue().get(key)
        if found is not None and found.kind != "free":
            return None
    return found


def unknown(key: str) -> str:
    """The message for a key that names no field."""
    parent = catalogue().get(key.rpartition(".")[0])
    if parent is not None and parent.kind != "block":
        return f"unknown key; {parent.key} has no keys of its own, it takes {parent.expected}"
    hint = did_you_mean(key, (name for name in catalogue() if not key.startswith(f"{name}.")))
    if not hint and parent is not None:
        hint = f"; {parent.key} has {', '.join(f.name for f in fields(parent.type))}"
    return f"unknown key{hint}"


def check(key: str, node: Node) -> Field:
    """The field `key`, if the value is of its kind.

    Raises:
        SweepError: at the value, or at the item of it that is wrong.
    """
    field = find(key)
    if field is None:
        raise node.place.error(unknown(key))
    if key == f"engine.args.{REMOTE_CODE}":
        raise node.place.error(f"not here: {SAY_IT}")
    if key != field.key or (field.optional and node.value is None):
        return field
    if field.kind == "block" and isinstance(node.value, dict):
        for name, inner in node.value.items():
            check(f"{key}.{name}", inner)
        for name in required(field):
            if name not in node.value:
                raise node.place.error(f"{name} is missing")
    elif field.kind == "texts" and isinstance(node.value, list):
        for item in node.value:
            if not isinstance(item.value, str):
                raise item.place.error(f"expected text, but found {describe(item.value)}")
    elif not _fits(field, node.value):
        raise node.place.error(_mismatch(field, node.value))
    return field


class Typist:
    """Turns checked values into trial fields, through one OmegaConf slot for each field."""

    def __init__(self) -> None:
        self._slots: dict[type[Any], DictConfig] = {}

    def typed(self, key: str, node: Node) -> Any:
        """The value as the field `key` holds it.

        Raises:
            SweepError: it is of another kind, or out of range.
        """
        field = check(key, node)
        if key != field.key or field.kind == "free" or node.value is None:
            return node.plain()
        try:
            if isinstance(node.value, dict):
                inner = {k: self.typed(f"{key}.{k}", v) for k, v in node.value.items()}
                return field.type(**inner)
            value = self._through(field, node.plain())
            _in_range(field, value)
        except OmegaConfBaseException as error:
            raise node.place.error(_words(error)) from None
        except ValueError as error:
            raise node.place.error(str(error).removeprefix(f"{field.key} ")) from None
        return value

    def _through(self, field: Field, plain: Any) -> Any:
        if field.owner not in self._slots:
            self._slots[field.owner] = OmegaConf.structured(field.owner)
            OmegaConf.set_readonly(self._slots[field.owner], False)
        slots = self._slots[field.owner]
        OmegaConf.update(slots, field.name, plain)
        return tuple(slots[field.name]) if field.kind == "texts" else slots[field.name]


def structured(plain: Mapping[str, Any]) -> Trial:
    """A trial, by OmegaConf's structured merge of nested plain data.

    What a free block holds has no type and is passed on as it is.

    Raises:
        ValueError: the contract refuses the values; the message names the fields.
    """
    blocks = {key: dict(block) for key, block in plain.items()}
    engine = blocks.get("engine", {})
    args = engine.pop("args", {})
    drafting: Any = None
    if isinstance(engine.get("speculative"), Mapping):
        engine["speculative"] = dict(engine["speculative"])
        drafting = engine["speculative"].pop("args", None)
    try:
        trial = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Trial), blocks))
    except OmegaConfBaseException as error:
        raise ValueError(_words(error)) from None
    assert isinstance(trial, Trial)
    settings = replace(trial.engine, args=args)
    if drafting is not None and settings.speculative is not None:
        speculative = replace(settings.speculative, args=drafting)
        settings = replace(settings, speculative=speculative)
    return replace(trial, engine=settings)


def required(block: Field) -> list[str]:
    """Names of a block's fields that have no default."""
    found = (catalogue()[f"{block.key}.{part.name}"] for part in fields(block.type))
    return [field.name for field in found if field.required]


def mentioned(message: str) -> list[str]:
    """The fields that a message of the contract names, in its order."""
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)+", message)
    return [word for word in words if word in catalogue()]


def describe(value: object) -> str:
    """A value in a message."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {one_line(value, 60)!r}"
        case list() | tuple():
            return "a list"
        case _:
            return "a block"


def _walk(prefix: str, cls: type[Any]) -> list[Field]:
    hints = get_type_hints(cls)
    found = []
    for part in fields(cls):
        hint, optional = hints[part.name], False
        switch = False
        if get_origin(hint) in (Union, UnionType):
            inner = [one for one in get_args(hint) if one is not type(None)]
            optional = len(inner) < len(get_args(hint))
            switch = len(inner) > 1 and bool in inner
            (hint,) = [one for one in inner if not (switch and one is bool)]
        key = f"{prefix}{part.name}"
        block = is_dataclass(hint)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kind: Kind
        if block:
            kind = "block"
        elif choices:
            kind = "choice"
        elif get_origin(hint) is tuple:
            kind = "texts"
        elif get_origin(hint) is dict:
            kind = "free"
        else:
            kind = _KINDS[hint]
        found.append(
            Field(
                key=key,
                owner=cls,
                kind=kind,
                optional=optional,
                required=part.default is MISSING and part.default_factory is MISSING,
                choices=choices,
                switch=switch,
                type=hint if block else None,
            )
        )
        if block:
            found += _walk(f"{key}.", hint)
    return found


def _fits(field: Field, value: object) -> bool:
    match field.kind:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "bool":
            return isinstance(value, bool)
        case "choice":
            return value in field.choices or (field.switch and isinstance(value, bool))
        case "free":
            return isinstance(value, dict)
        case _:
            return False


def _mismatch(field: Field, value: object) -> str:
    message = f"expected {field.expected}, but found {describe(value)}"
    if isinstance(value, str) and (field.kind in ("int", "float", "bool") or field.switch):
        try:
            meant = scalar(value)
        except ValueError:
            meant = None
        if value and meant is not None and _fits(field, meant) and meant != value:
            return f"{message}; write it without quotes"
    if field.kind == "choice" and isinstance(value, str):
        return message + did_you_mean(value, field.choices)
    if field.kind == "str" and isinstance(value, int | float):
        return f"{message}; put it in quotes if it is a name"
    return message


def _in_range(field: Field, value: object) -> None:
    """Refuses a value that no trial can have, whatever its other fields.

    The contract checks whole dataclasses. One is made of defaults and this value; where
    it objects and names another field too, the combination is at fault and not the value.
    """
    block = catalogue()[field.key.rpartition(".")[0]]
    needed = dict.fromkeys(required(block), "x")
    try:
        field.owner(**{**needed, field.name: value})
    except ValueError as error:
        if set(mentioned(str(error))) <= {field.key}:
            raise


def _words(error: Exception) -> str:
    """The first line of a message; OmegaConf's others hold its own vocabulary."""
    return (str(error).splitlines() or ["not a valid value"])[0]
