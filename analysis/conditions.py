"""What must not be mixed in one picture, and how a reader chooses.

Two records are comparable when they differ only in what a figure varies on purpose. All
else that can move a number is a condition. A figure over mixed conditions is refused
with the columns named, since a line through an H100 and a laptop's CPU looks like any
other line; `only` then makes the choice explicit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import polars as pl

from analysis.errors import SelectionError, unknown

_ENVIRONMENT = ("profile", "engine", "source", "engine_version", "device", "device_count")
_REQUEST = (
    "quantization",
    "prune_kind",
    "prune_ratio",
    "prune_criterion",
    "moe_backend",
    "speculative",
    "draft_tokens",
    "routing",
    "dataset",
)

CONDITIONS: tuple[str, ...] = (
    *_ENVIRONMENT,
    "threads",
    "model",
    "revision",
    "model_digest",
    "weights",
    "scale",
    "num_layers",
    "hidden_size",
    "ffn_dim",
    "num_experts",
    "top_k",
    "shared_experts",
    "dtype",
    "kv_cache_dtype",
    *_REQUEST,
    "draft_digest",
    "dataset_digest",
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "expert_parallel",
    "eager",
    "batch_size",
    "input_tokens",
    "output_tokens",
    "temperature",
    "seed",
)
"""Columns of which a figure holds one value each, unless it varies them on purpose."""

_BEHIND = {
    "model": "model_digest",
    "revision": "model_digest",
    "speculative": "draft_digest",
    "dataset": "dataset_digest",
}
"""What stands behind a name, and so may differ where the name does."""

_TELLTALES = (
    *CONDITIONS,
    "activation_source",
    "sweep",
    "memory_limit_gib",
    "engine_args",
    "torch_version",
    "host",
)
"""Columns that may explain why one point has several records."""
_RECORD = ("trial_id", "run_id", "attempt")
"""Columns that tell any two records apart, where nothing else does."""


def only(frame: pl.LazyFrame, choices: Iterable[str]) -> pl.LazyFrame:
    """The records for which every `COLUMN=VALUE` holds; the same column twice means either.

    `null` chooses records without a value; `true` and `false` are for booleans.

    Raises:
        SelectionError: for an unknown column, a value that is none of that column's type,
            or a choice that leaves no record.
    """
    schema = frame.collect_schema()
    wanted: dict[str, list[pl.Expr]] = {}
    for choice in choices:
        column, sign, text = choice.partition("=")
        if not sign:
            raise SelectionError(f"{choice!r} is no COLUMN=VALUE, for instance profile=cpu")
        if column not in schema:
            raise SelectionError(unknown("column", column, schema.names()))
        wanted.setdefault(column, []).append(_equal(column, schema[column], text))
    for column, tests in wanted.items():
        kept = frame.filter(pl.any_horizontal(tests))
        if kept.limit(1).collect().is_empty() and (held := _values(frame, column)):
            raise SelectionError(f"no record is left with that {column}; there is {held}")
        frame = kept
    return frame


def varying(frame: pl.DataFrame) -> dict[str, list[object]]:
    """The conditions with several values in `frame`, and these values.

    A null counts as a value only where it says something (no quantisation); elsewhere it
    says that the trial ended before anyone could know.
    """
    found: dict[str, list[object]] = {}
    for column in CONDITIONS:
        values = frame.get_column(column).unique().sort()
        if column not in _REQUEST:
            values = values.drop_nulls()
        if len(values) > 1:
            found[column] = values.to_list()
    return found


def refuse_mixed(frame: pl.DataFrame, varied: Collection[str]) -> None:
    """Raises SelectionError where a condition outside `varied` takes several values."""
    free = {*varied, *(_BEHIND[name] for name in varied if name in _BEHIND)}
    mixed = {name: values for name, values in varying(frame).items() if name not in free}
    if mixed:
        first = next(iter(mixed))
        listed = "; ".join(f"{name} ({_list(values)})" for name, values in mixed.items())
        raise SelectionError(
            f"records of different conditions in one figure: {listed}. "
            f"Choose, for instance --only {first}={_word(mixed[first][-1])}"
        )


def refuse_repeated(frame: pl.DataFrame, keys: Collection[str]) -> None:
    """Raises SelectionError where two records share `keys`, naming what tells them apart."""
    again = frame.filter(pl.struct(*keys).is_duplicated())
    if again.is_empty():
        return
    for _, point in again.group_by(*keys, maintain_order=True):
        where = ", ".join(f"{key} {point.get_column(key)[0]}" for key in keys)
        apart = _apart(point, _TELLTALES, keys) or _apart(point, _RECORD, keys)[:1]
        if apart:
            raise SelectionError(
                f"several records for one point ({where}), which differ in {', '.join(apart)}. "
                f"Choose, for instance --only {apart[0]}={_word(point.get_column(apart[0])[-1])}"
            )
        raise SelectionError(f"several records for one point ({where}), equal in every column")


def _apart(point: pl.DataFrame, columns: Iterable[str], keys: Collection[str]) -> list[str]:
    """Those of `columns` that the records of one point differ in; null is a value."""
    return [name for name in columns if name not in keys and point.get_column(name).n_unique() > 1]


def constant(frame: pl.DataFrame, column: str) -> object | None:
    """The one value that `column` takes, nulls aside; null where there is none or several."""
    values = frame.get_column(column).drop_nulls().unique()
    return values[0] if len(values) == 1 else None


def _equal(column: str, kind: pl.DataType, text: str) -> pl.Expr:
    if text == "null":
        return pl.col(column).is_null()
    if kind == pl.Boolean:
        if text not in ("true", "false"):
            raise SelectionError(f"{column} is true or false, not {text!r}")
        return pl.col(column) == (text == "true")
    if kind.is_numeric():
        try:
            return pl.col(column) == float(text)
        except ValueError:
            raise SelectionError(f"{column} is a number, not {text!r}") from None
    return pl.col(column).cast(pl.String) == text


def _values(frame: pl.LazyFrame, column: str) -> str:
    return _list(frame.select(pl.col(column).unique().sort()).collect().to_series().to_list())


def _list(values: list[object], most: int = 8) -> str:
    words = [_word(value) for value in values]
    return ", ".join(words if len(words) <= most else [*words[:most], "…"])


def _word(value: object) -> str:
    """A value as `--only` reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # short, but never so that two values look alike
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)
