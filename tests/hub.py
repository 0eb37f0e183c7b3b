"""A hub's cache made by hand, as `huggingface_hub` lays it out: what tests name by hub id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
"""A Mixtral that any machine runs."""
OTHER: dict[str, Any] = {**TINY, "num_hidden_layers": 3, "num_local_experts": 8}
"""The same model after a change that moves every number."""


def add(
    cache: Path,
    hub_id: str,
    commit: str,
    files: Mapping[str, Mapping[str, Any] | str | Path] | Path,
    *,
    refs: tuple[str, ...] = ("main",),
) -> Path:
    """A snapshot in `cache`; its folder.

    Args:
        cache: `HF_HUB_CACHE`.
        files: name → JSON data, text or a file to copy; or a folder whose files are copied.
        refs: branches and tags that stand for it from now on.
    """
    kept = cache / f"models--{hub_id.replace('/', '--')}"
    folder, blobs = kept / "snapshots" / commit, kept / "blobs"
    for one in (folder, blobs):
        one.mkdir(parents=True, exist_ok=True)
    if isinstance(files, Path):
        files = {one.name: one for one in files.iterdir() if one.is_file()}
    for name, content in files.items():
        blob = blobs / f"{commit}-{name}"
        if isinstance(content, Path):
            shutil.copyfile(content, blob)
        else:
            blob.write_text(content if isinstance(content, str) else json.dumps(dict(content)))
        (folder / name).symlink_to(blob)
    for ref in refs:
        (kept / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (kept / "refs" / ref).write_text(commit)
    return folder
