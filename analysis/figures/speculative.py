"""What drafts bring: throughput by draft tokens and by length, and how often drafts are right.

MoE-Inference-Bench, Figure 12, sets four drafts beside each other. Here the target that decodes
alone stands beside them, so that a slow-down shows as one; and acceptance, without which nobody
can tell a bad draft from a slow one.
"""

from __future__ import annotations

import polars as pl

from analysis.figures.variants import Variants
from analysis.keys import Key, enumeration

DRAFT_TOKENS = Key(column="draft_tokens", title="Draft tokens per step", phrase="drafts of {}")
INPUT_TOKENS = Key(column="input_tokens", title="Input tokens", phrase="input {}")
ALONE = "target alone"


def acceptance(frame: pl.DataFrame) -> str:
    """Acceptance by draft and number of tokens, as the range over the other key."""
    words = []
    for (name,), rows in (
        frame.drop_nulls("acceptance_rate")
        .sort("variant", "draft_tokens")
        .group_by("variant", maintain_order=True)
    ):
        parts = []
        for (tokens,), some in rows.group_by("draft_tokens", maintain_order=True):
            rate, length = some.get_column("acceptance_rate"), some.get_column("accepted_length")
            each = f" ({_range(length)} tokens a step)" if length.count() else ""
            parts.append(f"{_range(rate)} of {tokens}{each}")
        words.append(f"{name} {enumeration(parts)}")
    return f"Accepted: {'; '.join(words)}." if words else "No drafted token was counted."


def _range(values: pl.Series) -> str:
    ends = values.drop_nulls().sort().to_list()
    low, high = f"{ends[0]:.2f}", f"{ends[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def _variants(
    name: str,
    aliases: tuple[str, ...],
    title: str,
    x: Key,
    panel: Key,
    extra: tuple[tuple[str, str], ...] = (),
) -> Variants:
    return Variants(
        name=name,
        aliases=aliases,
        title=title,
        paper="MoE-Inference-Bench, Figure 12",
        x=x,
        panel=panel,
        varied=("speculative", "draft_tokens"),
        label=pl.col("speculative").str.split("/").list.last().fill_null(ALONE),
        baselines=(ALONE,),
        own=("draft_tokens",),
        beside=("acceptance_rate", "accepted_length", "tpot_s"),
        more=acceptance,
        extra=extra,
    )


SPECULATIVE = _variants(
    "speculative",
    ("fig12",),
    "Speculative decoding by draft tokens",
    DRAFT_TOKENS,
    INPUT_TOKENS,
    extra=(("acceptance_rate", "Acceptance rate"),),
).figure()
SPECULATIVE_LENGTH = _variants(
    "speculative-length",
    ("fig12-length",),
    "Speculative decoding by input length",
    INPUT_TOKENS,
    DRAFT_TOKENS,
).figure()
