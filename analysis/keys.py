"""The keys that figures vary, with the words for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A column that is an axis, a panel or a line of a figure: of whole numbers, or, where it
    is no axis, of names."""

    column: str
    """Column of the records."""
    title: str
    """Over an axis or a legend."""
    phrase: str
    """One value or several in a sentence; `{}` stands for them."""
    follows: tuple[str, ...] = ()
    """Conditions that change with it, and so may differ where it does."""

    def label(self, value: int | str) -> str:
        """`FFN 1792`, `8 experts`, `top-k 2`."""
        return self.phrase.format(value)

    def span(self, low: int, high: int) -> str:
        """`FFN 1792 to 14336`."""
        return self.phrase.format(f"{low} to {high}")

    def listing(self, values: Iterable[int | str]) -> str:
        """`8, 16 and 32 experts`, in the order given."""
        return self.phrase.format(enumeration([str(value) for value in values]))


FFN_DIM = Key(column="ffn_dim", title="FFN dimension of one expert", phrase="FFN {}")
NUM_EXPERTS = Key(column="num_experts", title="Experts per layer", phrase="{} experts")
TOP_K = Key(column="top_k", title="Active experts per token (top-k)", phrase="top-k {}")
BATCH = Key(column="batch_size", title="Batch size", phrase="batch {}")
LENGTH = Key(
    column="input_tokens",
    title="Tokens in, and out",
    phrase="{} tokens",
    follows=("output_tokens",),
)
MODEL = Key(
    column="model",
    title="Model",
    phrase="{}",
    follows=(
        "revision",
        "model_digest",
        "num_layers",
        "hidden_size",
        "ffn_dim",
        "num_experts",
        "top_k",
        "shared_experts",
    ),
)
DEVICES = Key(
    column="device_count",
    title="Devices",
    phrase="{} devices",
    follows=(
        "threads",
        "tensor_parallel",
        "pipeline_parallel",
        "data_parallel",
        "expert_parallel",
    ),
)
STRATEGY = Key(column="strategy", title="Layout", phrase="{}", follows=("moe_backend",))
MOE_PATH = Key(column="moe_path", title="Experts", phrase="{}", follows=("moe_backend",))


def enumeration(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What varies along the axis, from panel to panel and from line to line."""

    x: Key
    panel: Key
    line: Key

    @property
    def varied(self) -> tuple[str, ...]:
        """All conditions that may differ within a figure."""
        keys = (self.panel, self.line, self.x)
        return (*self.columns, *(name for key in keys for name in key.follows))

    @property
    def columns(self) -> tuple[str, str, str]:
        """Their columns, in the order in which a table is sorted."""
        return (self.panel.column, self.line.column, self.x.column)
