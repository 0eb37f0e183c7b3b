"""Which tuned configurations vLLM's MoE kernels run with.

The Triton kernels for experts look for a file of tile sizes by number of experts, width, device,
data type and block shape (`get_moe_configs` in `model_executor/layers/fused_moe/fused_moe.py`,
vLLM 0.32), in `VLLM_TUNED_CONFIG_FOLDER` and then among vLLM's own, and take a rule of thumb where
there is none. Only its log tells. So the function is watched where it looks: it keeps its answers
in a cache, and watching what is behind that cache costs no pass anything.

A lookup is made when a kernel first runs, which is while vLLM measures how much memory it needs,
before an engine is ready.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.model_executor.layers.fused_moe import fused_moe

DEFAULT = "default"
_Lookup = Callable[..., dict[int, Any] | None]
_taken: set[str] = set()


def taken() -> set[str]:
    """What was taken by this process so far: names of files, or `default`."""
    return set(_taken)


def watched(lookup: _Lookup) -> _Lookup:
    """`lookup` with its answers noted, in a cache as large as vLLM's."""

    @lru_cache
    @wraps(lookup)
    def look(
        E: int,  # as vLLM calls them
        N: int,
        dtype: str | None,
        block_n: int | None = None,
        block_k: int | None = None,
    ) -> dict[int, Any] | None:
        found = lookup(E, N, dtype, block_n, block_k)
        shape = [block_n, block_k] if block_n and block_k else None
        _taken.add(_named(fused_moe.get_config_file_name(E, N, dtype, shape), found))
        return found

    return look


def take_over() -> None:
    """Has the lookups of this process watched; may be called again."""
    inner = getattr(fused_moe.get_moe_configs, "__wrapped__", fused_moe.get_moe_configs)
    if getattr(inner, "__wrapped__", None) is None:
        fused_moe.get_moe_configs = watched(inner)


def _named(name: str, found: dict[int, Any] | None) -> str:
    """A file's name, with what tells its content apart where a user made it."""
    if found is None:
        return DEFAULT
    own = Path(envs.VLLM_TUNED_CONFIG_FOLDER or "") / name
    if envs.VLLM_TUNED_CONFIG_FOLDER and own.exists():
        return f"{name}@{hashlib.sha256(own.read_bytes()).hexdigest()[:8]}"
    return name
