"""What a model is, whatever it is called.

A folder keeps its name when another checkpoint is written into it, a relative name means
another folder elsewhere, and `main` of a hub moves. Records, activation sheets and pruned
checkpoints of the old files must not be taken for those of the new ones, so all of them ask
here what a name stands for now.

Of random weights the configuration decides and nothing else: `config.json` as data (its
spelling does not matter, nor who wrote it), with the files that quantisation tools put beside
it. Of a checkpoint its weights decide too. Hashing hundreds of gigabytes would take longer than
the measurement, so names and sizes of all files of weights, their headers, every router and a
sample of each file are hashed. Another training moves nearly every weight, so a sample shows it;
a change of the routers alone is seen because they are read whole. A checkpoint on the hub is the
commit that its name stands for in this machine's cache, which is also what an engine is told to
load; the folder of that commit is the same checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from workers.contract.model import Model
from workers.moe import hub
from workers.moe.architecture import catalogue, catalogue_name

SAMPLES, SAMPLE_BYTES = 64, 2**12
"""Stretches of a file that are read, evenly spread, and their size."""
CONFIG = "config.json"
QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside it in which tools of quantisation say what they did, by vLLM's own list."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INDEX = ".index.json"
"""Behind the name of the list of which file has which tensor."""
_CODE = ".py"
_TOKENIZER = re.compile(
    r"tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|spiece\.model|sentencepiece.*\.model|tekken\.json|.*\.tiktoken"
)
_NOTES = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a configuration that say where it comes from, and nothing of the model."""
_ROUTER = re.compile(r"(^|\.)(router|gate)(\.|$)")
"""Names of a router's tensors; an expert's own gate is called `gate_proj`."""
_HEADER_BYTES = 2**26
"""Of a safetensors file at most, beyond which it is read as any other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a name stands for."""

    digest: str | None
    """16 hexadecimal digits, or the commit of a checkpoint on the hub; null where this machine
    cannot tell."""
    unknown: str | None = None
    """Why it cannot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a model lies on this machine."""

    folder: Path | None
    """With its files; null where none of them is here."""
    commit: str | None = None
    """Of a checkpoint in the hub's cache."""


def content(model: Model) -> Content:
    """What decides the numbers of `model`, apart from what is bent, and from its tokenizer."""
    known = catalogue_name(model.name)
    if model.weights == "dummy" and known is not None:
        return Content(digest=_digits(_configuration(catalogue()[known]["config"])))
    code = model.trust_remote_code

    def decides(name: str) -> bool:
        if name == CONFIG or name in QUANTISATION or (code and name.endswith(_CODE)):
            return True
        return model.weights == "checkpoint" and name.endswith((*_WEIGHTS, _INDEX))

    return _content(model, decides, with_commit=model.weights == "checkpoint")


def tokenizer(model: Model) -> Content:
    """What turns text into the tokens of `model`."""
    return _content(model, lambda name: bool(_TOKENIZER.fullmatch(name)), with_commit=True)


def _content(model: Model, decides: Callable[[str], bool], *, with_commit: bool) -> Content:
    try:
        place = _place(model)
        if place is None:
            return Content(digest=None, unknown="it is not in the hub's cache of this machine")
        if with_commit and place.commit is not None:
            return Content(digest=place.commit)
        files = tuple(_stamps(place.folder, decides)) if place.folder is not None else ()
        if not files:
            return Content(digest=None, unknown="none of its files is on this machine")
        assert place.folder is not None, "its files are in it"
        return Content(digest=_folder(place.folder, files))
    except (OSError, RuntimeError) as error:  # not for us to read; the home of nobody
        return Content(digest=None, unknown=f"its files cannot be read: {error}")


def _place(model: Model) -> _Place | None:
    """The folder or commit behind a name; null for a name on the hub without one here.

    Raises:
        OSError, RuntimeError: it cannot be looked at.
    """
    known = catalogue_name(model.name)
    folder = Path(model.name).expanduser()
    if known is None and folder.is_dir():
        folder = folder.resolve()
        in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith(
            "models--"
        )
        return _Place(folder=folder, commit=folder.name if in_cache else None)
    hub_id = str(catalogue()[known]["hub_id"]) if known is not None else model.name
    found = hub.commit(hub_id, model.revision)
    return None if found is None else _Place(folder=hub.snapshot(hub_id, found), commit=found)


_Stamp = tuple[str, int, int, int, int]


def _stamps(folder: Path, decides: Callable[[str], bool]) -> Iterator[_Stamp]:
    """Name, size, times and inode of the files that the model is made of."""
    for path in sorted(folder.iterdir()):
        if decides(path.name) and path.is_file():
            status = path.stat()
            yield (
                path.name,
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                status.st_ino,
            )


@lru_cache(maxsize=64)
def _folder(folder: Path, stamps: tuple[_Stamp, ...]) -> str:
    """16 hexadecimal digits; `stamps` change when a file does."""
    found = hashlib.sha256()
    for name, size, *_ in stamps:
        path = folder / name
        if name == CONFIG and (config := _parsed(path)) is not None:
            text = _configuration(config)
            found.update(f"{name} {len(text)}\n".encode() + text)
            continue
        found.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES or not name.endswith(_WEIGHTS):
                found.update(file.read())
                continue
            for part in range(SAMPLES):
                file.seek(part * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
            if name.endswith(".safetensors"):
                header, routers = _header(file)
                found.update(header)
                for first, last in routers:
                    file.seek(first)
                    found.update(file.read(last - first))
    return found.hexdigest()[:16]


def _parsed(path: Path) -> Mapping[str, Any] | None:
    """A configuration as data; null for what is none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _configuration(config: Mapping[str, Any]) -> bytes:
    """A configuration in one spelling."""
    own = {key: value for key, value in config.items() if key not in _NOTES}
    return json.dumps(own, sort_keys=True, separators=(",", ":")).encode()


def _digits(config: bytes) -> str:
    """The digest of a folder that holds nothing but this configuration."""
    return hashlib.sha256(f"{CONFIG} {len(config)}\n".encode() + config).hexdigest()[:16]


def _header(file: BinaryIO) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a safetensors file, and where the tensors of routers lie in it; nothing
    where it is no such file."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_BYTES:
        return b"", []
    header = file.read(length)
    try:
        tensors = json.loads(header)
        found = [
            (8 + length + int(one["data_offsets"][0]), 8 + length + int(one["data_offsets"][1]))
            for name, one in sorted(tensors.items())
            if _ROUTER.search(name)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return b"", []
    return header, [(first, last) for first, last in found if 0 <= first <= last]
