"""The conditions that records share, in words: what stands under a title.

What was scaled down, drawn with random weights or predicted says so, in every picture.
"""

from __future__ import annotations

from fractions import Fraction

import polars as pl

from analysis import disturbed, drift, tuned
from analysis.conditions import constant


def subtitle(frame: pl.DataFrame) -> list[str]:
    """Lines on the model, the machine and the workload; what no record tells is left out.

    Needs the condition columns, `devices_label` and `memory_limit_gib`; counts what was disturbed
    and tells of drift where there are those columns.
    """
    lines = [_model(frame), _machine(frame), _workload(frame), disturbed.line(frame)]
    lines += [tuned.line(frame), *drift.lines(frame)]
    if constant(frame, "source") == "predicted":
        engine = _with(constant(frame, "engine"), " ({})")
        lines.insert(0, f"Predicted by a model{engine}, not measured")
    return [line for line in lines if line]


def _model(frame: pl.DataFrame) -> str:
    def one(column: str) -> object | None:
        return constant(frame, column)

    name, scale = str(one("model") or ""), one("scale")
    if isinstance(scale, float) and scale != 1:
        name += f" scaled to {Fraction(scale).limit_denominator(64)}"
    shape = _join(
        _with(one("num_layers"), "{} layers"), _with(one("hidden_size"), "hidden size {}")
    )
    return _join(
        f"{name} ({shape})" if shape else name,
        _with(one("weights"), "{} weights"),
        _with(one("dtype"), "{}"),
        _with(one("quantization"), "quantised with {}"),
        _with(one("speculative"), "drafts by {}"),
        _with(one("draft_tokens"), "{} tokens a draft"),
        _with(one("prune_ratio"), f"{_with(one('prune_kind'), '{}-expert ')}pruning {{:.1%}}"),
    )


def _machine(frame: pl.DataFrame) -> str:
    def one(column: str) -> object | None:
        return constant(frame, column)

    engine = " ".join(str(word) for word in (one("engine"), one("engine_version")) if word)
    degrees = [
        f"{kind} parallel {degree}"
        for kind in ("tensor", "pipeline", "data")
        if isinstance(degree := one(f"{kind}_parallel"), int) and (degree > 1 or kind == "tensor")
    ]
    return _join(
        _with(one("devices_label") or one("device"), f"{engine} on {{}}".strip()) or engine,
        _with(one("threads"), "{} threads"),
        *degrees,
        "experts spread over devices" if one("expert_parallel") else "",
        _limit(frame),
        _with(one("profile"), "profile {}"),
    )


def _workload(frame: pl.DataFrame) -> str:
    return _join(
        _with(constant(frame, "batch_size"), "batch {}"),
        _with(constant(frame, "input_tokens"), "{} input"),
        _with(constant(frame, "output_tokens"), "{} output tokens"),
    )


def _limit(frame: pl.DataFrame) -> str:
    """`80 GiB per device`; a range where records differ (a host's free memory does)."""
    limits = frame.get_column("memory_limit_gib").drop_nulls()
    if limits.is_empty():
        return ""
    ends = dict.fromkeys(f"{limit:.3g}" for limit in limits.sort().to_list())
    words = [*ends][:1] + [*ends][1:][-1:]
    return f"{' to '.join(words)} GiB per device"


def _with(value: object | None, phrase: str) -> str:
    return "" if value is None else phrase.format(value)


def _join(*words: str) -> str:
    return ", ".join(word for word in words if word)
