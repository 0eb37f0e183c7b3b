"""What lower precision brings, by batch and by length (MoE-Inference-Bench, Figure 10).

A line is a data type of weights, activations and KV cache. What an engine refuses is said, not
left out: on a CPU that is most of the list.
"""

from __future__ import annotations

import polars as pl

from analysis.figures.variants import Variants
from analysis.keys import Key

BATCH = Key(column="batch_size", title="Batch size", phrase="batch {}")
LENGTH = Key(column="output_tokens", title="Input and output tokens, each", phrase="length {}")

_QUANTIZED = pl.col("quantization").fill_null(pl.col("dtype"))
_CACHE = pl.col("kv_cache_dtype").fill_null(pl.col("dtype"))
LABEL = (
    pl.when(pl.col("dtype") == _CACHE)
    .then(_QUANTIZED)
    .otherwise(pl.format("{}, {} cache", _QUANTIZED, _CACHE))
    .fill_null(_QUANTIZED)
    .fill_null("unknown precision")
)
"""`fp8`, `bfloat16`, `bfloat16, fp8 cache`; a trial that ended before anyone knew its data type
may have none."""


def memory(frame: pl.DataFrame) -> str:
    """Weights of each variant in memory against the baseline's."""
    known = frame.drop_nulls("weights_gib")
    if known.is_empty():
        return ""
    sizes = {
        str(name): rows.get_column("weights_gib").median()
        for (name,), rows in known.group_by("variant", maintain_order=True)
    }
    first, *others = sizes.items()
    words = [
        f"{name} {size / first[1]:.2f} times"
        for name, size in others
        if isinstance(size, float) and isinstance(first[1], float)
    ]
    return f"Weights against {first[0]}: {', '.join(words)}." if words else ""


def _variants(name: str, aliases: tuple[str, ...], title: str, x: Key, panel: Key) -> Variants:
    return Variants(
        name=name,
        aliases=aliases,
        title=title,
        paper="MoE-Inference-Bench, Figure 10",
        x=x,
        panel=panel,
        varied=("model", "revision", "dtype", "quantization", "kv_cache_dtype", "input_tokens"),
        label=LABEL,
        baselines=("bfloat16", "float16", "float32"),
        beside=("weights_gib", "kv_cache_gib", "tpot_s"),
        more=memory,
    )


QUANTIZATION = _variants(
    "quantization", ("fig10",), "Precision by batch size", BATCH, LENGTH
).figure()
QUANTIZATION_LENGTH = _variants(
    "quantization-length", ("fig10-length",), "Precision by length", LENGTH, BATCH
).figure()
