"""What tells the weights under one name apart.

A folder keeps its name when another checkpoint is written into it, and `main` of a hub moves.
What was found out about the routing of the old weights must not be taken for that of the new
ones. Hashing hundreds of gigabytes to find out would take longer than the measurement, so of a
folder the configuration and every router are hashed whole, with names and sizes of all files
of weights and a sample of each. Another training moves nearly every weight, so a sample shows
it; a change of the routers alone is seen because they are read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from workers.contract.model import Model
from workers.moe.architecture import catalogue, catalogue_name

SAMPLES, SAMPLE_BYTES = 64, 2**12
"""Stretches of a file that are read, evenly spread, and their size."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_ROUTER = re.compile(r"(^|\.)(router|gate)(\.|$)")
"""Names of a router's tensors; an expert's own gate is called `gate_proj`."""
_HEADER_BYTES = 2**26
"""Of a safetensors file at most, beyond which it is read as any other."""


def content(model: Model) -> str | None:
    """A digest of the checkpoint's folder, or the commit that a hub's name stands for here.

    Null for a skeleton, and where this machine cannot tell.
    """
    if model.weights == "dummy":
        return None
    known = catalogue_name(model.name)
    try:
        folder = Path(model.name).expanduser()
        if known is None and folder.is_dir():
            return _folder(folder, tuple(_stamps(folder)))
        hub_id = catalogue()[known]["hub_id"] if known is not None else model.name
        return _commit(str(hub_id), model.revision or "main")
    except (OSError, RuntimeError):  # not for us to read; the home of nobody
        return None


@lru_cache(maxsize=64)
def _folder(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """16 hexadecimal digits; `stamps` change when a file does."""
    found = hashlib.sha256()
    for name, size, _ in stamps:
        found.update(f"{name} {size}\n".encode())
        with (folder / name).open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                found.update(file.read())
                continue
            for part in range(SAMPLES):
                file.seek(part * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
            if name.endswith(".safetensors"):
                for first, last in _routers(file):
                    file.seek(first)
                    found.update(file.read(last - first))
    return found.hexdigest()[:16]


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of the files that the model is made of."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix in _WEIGHTS or path.name == "config.json"):
            status = path.stat()
            yield path.name, status.st_size, status.st_mtime_ns


def _routers(file: BinaryIO) -> list[tuple[int, int]]:
    """Where the tensors of routers lie in a safetensors file; none where it is no such file."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_BYTES:
        return []
    try:
        tensors = json.loads(file.read(length))
        found = [
            (8 + length + int(one["data_offsets"][0]), 8 + length + int(one["data_offsets"][1]))
            for name, one in sorted(tensors.items())
            if _ROUTER.search(name)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return [(first, last) for first, last in found if 0 <= first <= last]


def _commit(hub_id: str, revision: str) -> str | None:
    """The commit of a branch or tag in the hub's cache of this machine."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    kept = cache / f"models--{hub_id.replace('/', '--')}"
    if (kept / "snapshots" / revision).is_dir():
        return revision
    try:
        return (kept / "refs" / revision).read_text("utf-8").strip()[:64] or None
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
