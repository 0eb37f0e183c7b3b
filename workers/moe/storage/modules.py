"""Which module of the engine a weight lies in, and which patterns of a checkpoint mean it.

Checkpoints say by names what they leave alone, and each method compares names in its own way:
`gate` is a part of a path for AWQ, a whole path for FP8, a wildcard for ModelOpt, a regular
expression for compressed-tensors. The engine compares with the paths of its own modules, in which
queries, keys and values are one matrix (`qkv_proj`), gate and up another, and all routed experts
of a layer a third. What stands here is vLLM 0.32's comparison, rule by rule (its functions are
named); where the matrices of a fused module are to be stored differently, vLLM refuses the
checkpoint, and so does this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import Literal

from workers.moe.structure import Architecture, Weight

Kind = Literal["linear", "experts", "head"]
Packed = tuple[tuple[str, tuple[str, ...]], ...]
"""Fused module → the matrices of a checkpoint that it holds (`packed_modules_mapping`)."""

_PACKED: Packed = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)
_SECOND = ("up_proj", "w3", "v1", "linear_v")
"""Second matrix of an expert: it lies in one tensor with the first."""


class Unreadable(ValueError):
    """How weights are stored cannot be told; the message names the method."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """The module of the engine that one matrix of a checkpoint lies in."""

    kind: Kind
    path: str
    own: str
    """Path of the matrix as the checkpoint names it, an expert's number being 0."""
    shards: tuple[str, ...] = ()
    """Paths of all matrices that are fused in it; empty where none are."""
    lead: bool = True
    """Whether it is the first of its tensor, to which what the tensor has once is counted."""


def packed(a: Architecture) -> Packed:
    """What the engine fuses in this model."""
    weights = [
        weight for layer in {id(x): x for x in a.layers}.values() for weight in layer.always()
    ]
    names = {_last(weight.name) for weight in weights}
    return tuple((fused, parts) for fused, parts in _PACKED if names.issuperset(parts))


def root(a: Architecture) -> str:
    """What stands before `model.` in the engine where a language model is part of another."""
    return "language_model." if any(isinstance(a.config.get(key), dict) for key in _NESTED) else ""


_NESTED = ("text_config", "language_config", "llm_config")


def module(weight: Weight, layer: int | None, fused: Packed, before: str) -> Module | None:
    """Where `weight` lies; null for what no engine quantises: routers, norms, embeddings, gates
    with one output, and what stands outside the language model.
    """
    if len(weight.shape) != 2 or weight.shape[0] == 1:
        return None
    path = before + (weight.name if layer is None else f"model.layers.{layer}.{weight.name}")
    own = path.replace("*", "0")
    if weight.part == "head":
        return Module(kind="head", path=path, own=own)
    if weight.part == "expert":
        above, found, _ = path.partition(".experts")
        return Module(
            kind="experts",
            path=above + found if found else path.rpartition(".")[0] + ".experts",
            own=own,
            lead=_last(path) not in _SECOND,
        )
    if weight.part not in ("attention", "shared", "dense"):
        return None
    above, last = path.rpartition(".")[0], _last(path)
    for name, parts in fused:
        if last in parts:
            return Module(
                kind="linear",
                path=f"{above}.{name}",
                own=own,
                shards=tuple(f"{above}.{part}" for part in parts),
                lead=last == parts[0],
            )
    return Module(kind="linear", path=path, own=own)


def mapped(names: Iterable[str] | None, before: str) -> tuple[str, ...]:
    """Module names of a checkpoint as the engine calls them (`apply_vllm_mapper`).

    A language model inside another is `model.language_model` or `language_model.model` in
    checkpoints and the latter in the engine. Regular expressions are left as they are.
    """
    return tuple(_mapped(name, before) for name in names or ())


def _mapped(name: str, before: str) -> str:
    if name.startswith("re:") or "language_model." not in name:
        return name
    bare = name.replace("language_model.", "")
    bare = f"model.{bare}" if bare.startswith("layers.") else bare
    return before + bare


def skipped(m: Module, names: Sequence[str], *, parts: bool = False) -> bool:
    """Whether `names` leave `m` alone (`is_layer_skipped`): whole paths, or with `parts` any part
    of one.
    """

    def found(path: str) -> bool:
        return any(name in path for name in names) if parts else path in names

    if m.shards:
        return found(m.path) or _alike(m, [found(shard) for shard in m.shards])
    if "experts" in m.path and not parts:
        return any(m.path in name for name in names if "experts" in name)
    return found(m.path)


def listed(m: Module, patterns: Sequence[str]) -> bool:
    """Whether `patterns`, paths or `re:` and an expression from their beginning, mean `m`
    (`should_ignore_layer`).
    """
    path = m.own if m.kind == "experts" else m.path
    if first(path, patterns) is not None:
        return True
    return bool(m.shards) and _alike(m, [first(one, patterns) is not None for one in m.shards])


def first(path: str, patterns: Iterable[str]) -> str | None:
    """The first of `patterns` that is `path` or a `re:` expression that it begins with."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if _expression(pattern[3:]).match(path):
                return pattern
        elif pattern == path:
            return pattern
    return None


def wildcard(m: Module, patterns: Sequence[str]) -> bool:
    """Whether ModelOpt's `patterns` leave `m` alone
    (`ModelOptQuantConfigBase.is_layer_excluded`): as whole paths, as parts of one, or as
    wildcards.
    """
    if skipped(m, patterns):
        return True
    bare = m.path.removeprefix("language_model.")
    return any(
        (one != m.path and (one in m.path or one in bare)) or fnmatch(m.path, one)
        for one in patterns
    )


def search(pattern: str, path: str) -> bool:
    """Whether the expression is found anywhere in `path`; false where it is none."""
    try:
        return _expression(pattern).search(path) is not None
    except Unreadable:
        return False


def match(pattern: str, path: str) -> bool:
    """Whether `path` begins with the expression."""
    return _expression(pattern).match(path) is not None


def _alike(m: Module, found: list[bool]) -> bool:
    if any(found) and not all(found):
        raise Unreadable(
            f"only some of {', '.join(map(_last, m.shards))} of {m.path} are quantised, "
            "which the engine refuses"
        )
    return all(found)


@lru_cache(maxsize=4096)
def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise Unreadable(
            f"the name pattern {pattern!r} is no regular expression: {error}"
        ) from error


def _last(path: str) -> str:
    return path.rpartition(".")[2]
