"""What a configuration plainly says of a model whose structure cannot be told.

An engine may run what is not spelled out here. Its record then has no parameters and no
utilisations, but how many layers, how wide and how many experts is often plain to see, and
what is plain is not thrown away for want of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.moe.families import read
from workers.moe.fields import EXPERTS, TOP_K, Fields, Unread
from workers.moe.structure import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """Dimensions that are known; null is not known."""

    reason: str
    """Why its structure cannot be told, in one line."""
    config: Mapping[str, Any]
    """The Hugging Face configuration."""
    num_layers: int | None = None
    hidden_size: int | None = None
    num_experts: int | None = None
    """Routed experts per MoE layer."""
    top_k: int | None = None
    """Routed experts per token."""
    vocab_size: int | None = None


def partial(config: Mapping[str, Any], reason: str) -> Partial:
    """What is plain in a configuration that cannot be read as a whole."""
    f = Fields(config).language

    def known(value: Callable[[], int]) -> int | None:
        try:
            return value()
        except Unread:
            return None

    return Partial(
        reason=reason,
        config=config,
        num_layers=known(lambda: f.layers),
        hidden_size=known(lambda: f.hidden),
        num_experts=known(lambda: f.whole(*EXPERTS)),
        top_k=known(lambda: f.whole(*TOP_K)),
        vocab_size=known(lambda: f.whole("vocab_size")),
    )


def understood(config: Mapping[str, Any]) -> Architecture | Partial:
    """The structure in a configuration or, where that cannot be told, what is plain in it."""
    try:
        return read(config)
    except Unread as error:
        return partial(config, str(error))
