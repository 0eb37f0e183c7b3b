"""Prompts of real text, with exact lengths.

Which experts run depends on what is read, so a workload may name a source of text instead
of drawing random ids (`workers.prompts`). The lengths stay exact all the same: the source
is turned into tokens once, by the model's own tokenizer, and prompts are stretches of that
one row of tokens that do not overlap. Seed, index of the pass and source decide them and
nothing else, so a probe can replay what a timed pass saw.

`workload.dataset` is `SOURCE` or `SOURCE:PART`. SOURCE is `builtin`, a small corpus written
for this project (`workers/corpus/REGISTER.LANGUAGE.txt`), or a file:

    .txt              one text
    .jsonl            an object per line, with `text` and perhaps `register`, `language`
    .parquet .arrow   columns of those names; .arrow as a file or as a stream

PART keeps the texts of one register or one language: `builtin:code`, `my.jsonl:fr`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from workers.contract.errors import Infeasible
from workers.contract.workload import Workload

BUILTIN = "builtin"
"""Name of the corpus that comes with the project."""
MOST_CHARACTERS = 2**24
"""Characters read of a source at most; what a larger one has beyond them is not looked at."""
_SEPARATOR = "\n\n"
_LABELS = ("register", "language")

_Tokens = npt.NDArray[np.int64]


class TextError(Infeasible):
    """A source of text that cannot be read, or not for this workload; says which and why."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One text of a source."""

    text: str
    register: str | None = None
    """Kind of text, for example prose or code."""
    language: str | None = None
    """Language, as a two-letter code."""


def text_ids(workload: Workload, tokenizer: Tokenizer, *, index: int) -> list[list[int]]:
    """`batch_size` prompts of `input_tokens` ids, cut from the text that `dataset` names.

    Passes with different indices get different stretches as long as the text lasts, and no
    stretch is twice in one pass. Then its texts are put into another order and cut again.
    No special token is added: a prompt begins in the middle of a text.

    Raises:
        TextError: no dataset is named, it cannot be read, or one pass needs more tokens than
            it has.
    """
    if workload.dataset is None:
        raise TextError("workload.dataset names no source of text")
    texts = _tokens(workload.dataset, _stamp(workload.dataset), tokenizer)
    have = sum(len(one) for one in texts)
    needed = workload.batch_size * workload.input_tokens
    if have < needed:
        raise TextError(
            f"text {workload.dataset} is too short: batch {workload.batch_size} × "
            f"{workload.input_tokens} tokens = {needed}, but it has {have}"
        )
    turn, place = divmod(index, have // needed)
    stretches = _stretches(texts, workload.input_tokens, seed=workload.seed, turn=turn)
    first = place * workload.batch_size
    ids: list[list[int]] = stretches[first : first + workload.batch_size].tolist()
    return ids


def texts_of(dataset: str) -> tuple[Text, ...]:
    """The texts that `dataset` (`SOURCE` or `SOURCE:PART`) names, in the order of the source.

    Raises:
        TextError: there is no such source, it cannot be read, or it has no such part.
    """
    source, part = _split(dataset)
    found = tuple(_bounded(_builtin() if source == BUILTIN else _read(Path(source))))
    if part is None:
        if not found:
            raise TextError(f"text {dataset} is empty")
        return found
    kept = tuple(one for one in found if part in (one.register, one.language))
    if not kept:
        labels = {getattr(one, label) for one in found for label in _LABELS} - {None}
        has = ", ".join(sorted(labels)) or "no register or language at all"
        raise TextError(f"text {source} has no register or language {part!r}; it has {has}")
    return kept


def absent(dataset: str) -> str | None:
    """Why `dataset` names no source that this machine has; null where one is there to be read."""
    source, _ = _split(dataset)
    try:
        if source == BUILTIN:
            texts_of(dataset)  # small: whether it has that part
        elif Path(source).suffix not in _READERS:
            listed = ", ".join(_READERS)
            return f"text {source}: neither {BUILTIN!r} nor a {listed} file"
        elif not Path(source).is_file():
            return f"there is no file {source} here"
    except (TextError, OSError, ValueError) as error:
        return str(error)
    return None


def digest(dataset: str) -> str:
    """16 hexadecimal digits of the texts that `dataset` names.

    Raises:
        TextError: as `texts_of`.
    """
    return _digest(dataset, _stamp(dataset))


@lru_cache(maxsize=16)
def _digest(dataset: str, stamp: object) -> str:
    found = hashlib.sha256()
    for one in texts_of(dataset):
        text = one.text.encode("utf-8", "surrogatepass")
        found.update(b"%d " % len(text) + text)
    return found.hexdigest()[:16]


def _stretches(texts: tuple[_Tokens, ...], length: int, *, seed: int, turn: int) -> _Tokens:
    """All texts in one row, cut into stretches of `length`: (stretches, length), shuffled."""
    generator = np.random.default_rng([seed, turn])
    row = np.concatenate([texts[i] for i in generator.permutation(len(texts))])
    count, left = divmod(len(row), length)
    first = generator.integers(left + 1)
    cut: _Tokens = row[first : first + count * length].reshape(count, length)
    return cut.take(generator.permutation(count), axis=0)


@lru_cache(maxsize=4)
def _tokens(dataset: str, stamp: object, tokenizer: Tokenizer) -> tuple[_Tokens, ...]:
    """Every text of `dataset` as tokens; `stamp` changes when the file does."""
    return tuple(
        np.array(tokenizer.encode(one.text + _SEPARATOR, add_special_tokens=False), np.int64)
        for one in texts_of(dataset)
    )


def _stamp(dataset: str) -> object:
    """What tells one state of the file from another; null for what is not a file."""
    try:
        status = Path(_split(dataset)[0]).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _split(dataset: str) -> tuple[str, str | None]:
    """Source and part. A file whose name has a colon is meant as a whole."""
    source, colon, part = dataset.rpartition(":")
    if not colon or Path(dataset).is_file():
        return dataset, None
    return source, part


def _bounded(texts: Iterable[Text]) -> Iterator[Text]:
    """`texts` up to `MOST_CHARACTERS`, without those that are blank."""
    left = MOST_CHARACTERS
    for one in texts:
        if left <= 0:
            return
        if one.text.strip():
            yield Text(text=one.text[:left], register=one.register, language=one.language)
            left -= len(one.text)


def _builtin() -> Iterator[Text]:
    files = (resources.files("workers") / "corpus").iterdir()
    for file in sorted(files, key=lambda file: file.name):
        register, language, suffix = file.name.split(".")
        if suffix == "txt":
            yield Text(text=file.read_text("utf-8"), register=register, language=language)


def _read(file: Path) -> Iterator[Text]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise TextError(f"text {file}: neither {BUILTIN!r} nor a {', '.join(_READERS)} file")
    try:
        yield from reader(file)
    except UnicodeDecodeError as error:
        raise TextError(f"text {file} is not UTF-8: {error}") from None
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own are of these
        if isinstance(error, TextError):
            raise
        raise TextError(f"text {file} cannot be read: {error}") from None


def _plain(file: Path) -> Iterator[Text]:
    with file.open(encoding="utf-8") as held:
        yield Text(text=held.read(MOST_CHARACTERS))


def _lines(file: Path) -> Iterator[Text]:
    with file.open(encoding="utf-8") as held:
        for number, line in enumerate(held, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise TextError(f"text {file}, line {number}: no JSON ({error})") from None
            if not isinstance(found, dict):
                raise TextError(f"text {file}, line {number}: no object")
            yield _labelled(found, f"text {file}, line {number}")


def _parquet(file: Path) -> Iterator[Text]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as held:
        columns = _columns(held.schema_arrow.names, file)
        yield from _rows(held.iter_batches(batch_size=1024, columns=columns), columns, file)


def _arrow(file: Path) -> Iterator[Text]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as held:
        try:
            opened = pa.ipc.open_file(held)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        except pa.ArrowInvalid:
            held.seek(0)
            opened = pa.ipc.open_stream(held)
            batches = iter(opened)
        yield from _rows(batches, _columns(opened.schema.names, file), file)


def _columns(names: Iterable[str], file: Path) -> list[str]:
    known = [name for name in names if name in ("text", *_LABELS)]
    if "text" not in known:
        raise TextError(f"text {file} has no column 'text', only {', '.join(names) or 'none'}")
    return known


def _rows(batches: Iterable[Any], columns: list[str], file: Path) -> Iterator[Text]:
    number = 0
    for batch in batches:
        for row in batch.select(columns).to_pylist():
            number += 1
            yield _labelled(row, f"text {file}, row {number}")


def _labelled(row: dict[str, Any], where: str) -> Text:
    """A text out of its fields; raises TextError where one is not what it should be."""
    text = row.get("text")
    if not isinstance(text, str):
        raise TextError(f"{where}: 'text' is {type(text).__name__}, not a string")
    labels = {label: row.get(label) for label in _LABELS}
    for label, value in labels.items():
        if value is not None and not isinstance(value, str):
            raise TextError(f"{where}: {label!r} is {type(value).__name__}, not a string")
    return Text(text=text, **labels)


_READERS: Mapping[str, Callable[[Path], Iterator[Text]]] = {
    ".txt": _plain,
    ".jsonl": _lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
