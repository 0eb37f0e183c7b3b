"""Reading a configuration that somebody else wrote.

A `config.json` leaves out what its author took for granted, holds null where a newer
version has a number, and spells one thing in several ways. Each read here says which keys
will do and what the family assumes without them; anything else is an error that names the
key, never a `KeyError` from the depths of a formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from workers.contract.model import MOST_LAYERS

_MOST = 1e18
"""Beyond any number of a model."""
NESTED = ("text_config", "language_config", "llm_config")
"""Where multimodal configurations keep their language model."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""How the number of routed experts is called."""
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_selected_experts")
"""How the number of experts per token is called."""


class UnknownModel(ValueError):
    """A name that means nothing here, or a configuration that cannot be read."""


class Unread(UnknownModel):
    """A configuration whose structure cannot be told from here.

    An engine may well know what to make of it, so it ends no sweep: what would follow from the
    structure is null, with this as the reason.
    """


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed reads of one configuration."""

    config: Mapping[str, Any]

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The first of `keys` that is set, as a whole number of at least `least`.

        A list with one number per layer counts as that number where all are the same.

        Raises:
            Unread: none is set and there is no default, or the value is no such number.
        """
        for key in keys:
            value = self.config.get(key)
            if type(value) is int and value >= least:
                return value
            if isinstance(value, list | tuple) and value and all(v == value[0] for v in value):
                value = value[0]
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise Unread(f"{key} is {short(value)}, not a whole number of at least {least}")
            return value
        if default is None:
            raise Unread(f"{' or '.join(keys)} is missing")
        return default

    def depth(self, *keys: str, default: int | None = None) -> int:
        """A number of layers, each of which becomes an item of the structure.

        Raises:
            Unread: as `whole`, or more than any model has.
        """
        layers = self.whole(*keys, default=default)
        if layers > MOST_LAYERS:
            raise Unread(f"{layers} layers, but at most {MOST_LAYERS} are read")
        return layers

    def maybe(self, key: str, default: int | None = None) -> int | None:
        """A whole number, or null where the configuration says null or 0."""
        if key in self.config and not self.config[key]:
            return None
        return default if key not in self.config else self.whole(key)

    def real(self, key: str, default: float) -> float:
        """A number that need not be whole."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Unread(f"{key} is {short(value)}, not a number")
        if not abs(value) <= _MOST:  # not so for a NaN either
            raise Unread(f"{key} is {short(value)}, not a number of any use")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A switch; null is the default."""
        value = self.config.get(key)
        return default if value is None else bool(value)

    def word(self, key: str, default: str = "") -> str:
        """A word; null is the default."""
        return str(self.config.get(key) or default)

    def items(self, key: str) -> tuple[Any, ...]:
        """A list; empty where it is null or missing."""
        value = self.config.get(key) or ()
        if not isinstance(value, list | tuple):
            raise Unread(f"{key} is {short(value)}, not a list")
        return tuple(value)

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty where it is null or missing."""
        items = self.items(key)
        if not all(isinstance(item, int) for item in items):
            raise Unread(f"{key} is {short(list(items))}, not a list of whole numbers")
        return items

    def per_layer(self, key: str) -> tuple[Any, ...]:
        """A list with one item per layer; empty where it is null or missing.

        Raises:
            Unread: it is shorter than there are layers.
        """
        items = self.items(key)
        if items and len(items) < self.layers:
            raise Unread(f"{key} has {len(items)} items for {self.layers} layers")
        return items

    def part(self, *keys: str) -> Fields:
        """A nested configuration; empty where there is none."""
        for key in keys:
            value = self.config.get(key)
            if value is not None and isinstance(value, Mapping):
                return Fields(value)
        return Fields({})

    @property
    def language(self) -> Fields:
        """The language model's own part, which may be the whole."""
        nested = self.part(*NESTED)
        return nested if nested.config else self

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.whole("hidden_size", "d_model", "n_embd")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.whole("num_attention_heads", "n_heads", "num_heads", "n_head")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.depth("num_hidden_layers", "n_layers", "num_layers", "n_layer")
