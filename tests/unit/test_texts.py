"""Prompts of real text have exact lengths, repeat with their seed, and do not overlap."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workers import texts
from workers.contract.errors import Infeasible
from workers.contract.workload import Workload
from workers.texts import Text, TextError, text_ids, texts_of

REGISTERS = {"code", "dialogue", "mathematics", "prose", "tables"}
LANGUAGES = {"de", "en", "es", "fr", "zh"}


class Adapted:
    """The interface of transformers' tokenizers around one of the tokenizers library."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.calls = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.calls += 1
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens).ids)


@pytest.fixture(scope="module")
def bpe() -> Adapted:
    """Byte pairs learned from the corpus; nothing is lost, so ids can be read back."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([one.text for one in texts_of("builtin")], trainer)
    return Adapted(inner)


@pytest.fixture
def words() -> Adapted:
    """w7 is 7, an unknown word is 0: what was cut can be seen in the ids."""
    known = {"?": 0} | {f"w{number}": number for number in range(1, 1001)}
    inner = Tokenizer(models.WordLevel(known, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Adapted(inner)


@pytest.fixture
def counted(tmp_path: Path) -> str:
    """A file of the words w1 to w1000."""
    file = tmp_path / "counted.txt"
    file.write_text(" ".join(f"w{number}" for number in range(1, 1001)))
    return str(file)


def _workload(dataset: str | None, batch: int = 4, tokens: int = 50, seed: int = 3) -> Workload:
    return Workload(
        batch_size=batch, input_tokens=tokens, output_tokens=1, seed=seed, dataset=dataset
    )


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (4, 50), (3, 333), (1, 1000)])
def test_lengths_are_exact(words: Adapted, counted: str, batch: int, tokens: int) -> None:
    ids = text_ids(_workload(counted, batch, tokens), words, index=0)
    assert [len(row) for row in ids] == [tokens] * batch
    for row in ids:
        assert all(later == token + 1 for token, later in pairwise(row)), "one stretch of text"


def test_seed_and_index_decide(words: Adapted, counted: str) -> None:
    asked = _workload(counted)
    first = text_ids(asked, words, index=1)
    assert first == text_ids(asked, words, index=1)
    assert first != text_ids(asked, words, index=0)
    assert first != text_ids(_workload(counted, seed=4), words, index=1)


def test_nothing_repeats_while_the_text_lasts(words: Adapted, counted: str) -> None:
    asked = _workload(counted)  # 1000 words, 200 a pass
    passes = [text_ids(asked, words, index=index) for index in range(5)]
    seen = [token for ids in passes for row in ids for token in row]
    assert sorted(seen) == list(range(1, 1001))
    again = [text_ids(asked, words, index=index) for index in range(5, 10)]
    assert sorted(token for ids in again for row in ids for token in row) == sorted(seen)
    assert again != passes


def test_what_is_cut_moves_when_a_rest_is_left(words: Adapted, counted: str) -> None:
    asked = _workload(counted, batch=1, tokens=700)
    starts = {text_ids(asked, words, index=index)[0][0] for index in range(12)}
    assert len(starts) > 6
    assert all(1 <= start <= 301 for start in starts)


def test_one_pass_never_has_a_stretch_twice(words: Adapted, counted: str) -> None:
    asked = _workload(counted, batch=3, tokens=150)
    for index in range(20):
        tokens = [token for row in text_ids(asked, words, index=index) for token in row]
        assert len(set(tokens)) == 450


def test_a_text_that_is_too_short_says_what_it_has(words: Adapted, counted: str) -> None:
    with pytest.raises(TextError, match=r"batch 4 × 251 tokens = 1004, but it has 1000") as caught:
        text_ids(_workload(counted, tokens=251), words, index=0)
    assert counted in str(caught.value)
    assert isinstance(caught.value, Infeasible) and caught.value.outcome == "infeasible"


def test_without_a_dataset_there_is_no_text(words: Adapted) -> None:
    with pytest.raises(TextError, match="names no source"):
        text_ids(_workload(None), words, index=0)


def test_a_source_is_tokenised_once_until_it_changes(words: Adapted, counted: str) -> None:
    asked = _workload(counted)
    for index in range(4):
        text_ids(asked, words, index=index)
    assert words.calls == 1
    Path(counted).write_text(" ".join(["w5"] * 2000))
    assert text_ids(asked, words, index=0) == [[5] * 50] * 4
    assert words.calls == 2


# The corpus of the project.


def test_the_corpus_has_registers_and_languages() -> None:
    found = texts_of("builtin")
    assert {one.register for one in found} == REGISTERS
    assert {one.language for one in found} == LANGUAGES
    for one in found:
        assert 400 < len(one.text) < 10_000
        assert one.text.replace("\n", "").isprintable()


@pytest.mark.parametrize("part", sorted(REGISTERS | LANGUAGES))
def test_a_part_holds_only_itself(part: str) -> None:
    kept = texts_of(f"builtin:{part}")
    everything = texts_of("builtin")
    assert kept == tuple(one for one in everything if part in (one.register, one.language))
    assert 0 < len(kept) < len(everything)


def test_an_unknown_part_is_refused_with_those_there_are() -> None:
    with pytest.raises(TextError, match="'poems'; it has code, de, dialogue, en"):
        texts_of("builtin:poems")


@pytest.mark.parametrize("register", sorted(REGISTERS))
def test_prompts_are_real_text_of_the_register(bpe: Adapted, register: str) -> None:
    asked = _workload(f"builtin:{register}", batch=8, tokens=128)
    ids = text_ids(asked, bpe, index=0)
    assert [len(row) for row in ids] == [128] * 8
    whole = "\n\n".join(one.text + "\n\n" for one in texts_of(f"builtin:{register}"))
    pieces = [bpe.inner.decode(row).strip("�") for row in ids]
    within = [piece for piece in pieces if piece in whole]
    assert len(within) >= 4, "only where two texts meet is it otherwise"
    assert len({tuple(row) for row in ids}) == 8


# Files.

ROWS = [
    {"text": "w1 w2 w3", "register": "prose", "language": "en"},
    {"text": "w4 w5", "register": "code", "language": None},
    {"text": "   ", "register": "code", "language": "de"},
    {"text": "w6", "register": None, "language": "de"},
]
EXPECTED = (
    Text(text="w1 w2 w3", register="prose", language="en"),
    Text(text="w4 w5", register="code", language=None),
    Text(text="w6", register=None, language="de"),
)


def _jsonl(file: Path, rows: list[dict[str, str | None]]) -> None:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def _parquet(file: Path, rows: list[dict[str, str | None]]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)


def _arrow_file(file: Path, rows: list[dict[str, str | None]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _arrow_stream(file: Path, rows: list[dict[str, str | None]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", _jsonl), ("a.parquet", _parquet), ("a.arrow", _arrow_file),
     ("b.arrow", _arrow_stream)],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_texts(
    name: str, write: Callable[[Path, list[dict[str, str | None]]], None], tmp_path: Path
) -> None:
    file = tmp_path / name
    write(file, ROWS)
    assert texts_of(str(file)) == EXPECTED
    assert texts_of(f"{file}:code") == EXPECTED[1:2]
    assert texts_of(f"{file}:de") == EXPECTED[2:]
    with pytest.raises(TextError, match="'fr'; it has code, de, en, prose"):
        texts_of(f"{file}:fr")


def test_labels_may_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    _parquet(file, [{"text": "w1", "other": "x"}])
    assert texts_of(str(file)) == (Text(text="w1"),)
    with pytest.raises(TextError, match="it has no register or language at all"):
        texts_of(f"{file}:code")


def test_a_name_with_a_colon_is_a_file_if_it_is_one(tmp_path: Path) -> None:
    file = tmp_path / "part:one.txt"
    file.write_text("w1 w2")
    assert texts_of(str(file)) == (Text(text="w1 w2"),)


def test_of_a_large_source_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("123456789012345")
    assert texts_of(str(tmp_path / "a.txt")) == (Text(text="1234567890"),)
    _jsonl(tmp_path / "a.jsonl", [{"text": "1234567"}, {"text": "1234567"}, {"text": "8"}])
    assert [one.text for one in texts_of(str(tmp_path / "a.jsonl"))] == ["1234567", "123"]


@pytest.fixture
def bad(tmp_path: Path) -> Callable[[str, bytes], str]:
    def message(name: str, content: bytes) -> str:
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(TextError) as caught:
            texts_of(str(file))
        said = str(caught.value)
        assert str(file) in said
        return said

    return message


def test_what_cannot_be_read_names_file_and_reason(
    bad: Callable[[str, bytes], str], tmp_path: Path
) -> None:
    assert "is not UTF-8" in bad("a.txt", b"\xff\xfe\x00")
    assert "is empty" in bad("empty.txt", b" \n")
    assert "line 2: no JSON" in bad("a.jsonl", b'{"text": "w1"}\n{"text"\n')
    assert "line 1: no object" in bad("b.jsonl", b'["w1"]\n')
    assert "line 1: 'text' is NoneType" in bad("c.jsonl", b'{"body": "w1"}\n')
    assert "line 1: 'register' is int" in bad("d.jsonl", b'{"text": "w1", "register": 3}\n')
    assert "cannot be read" in bad("a.parquet", b"PAR1 not really")
    assert "cannot be read" in bad("a.arrow", b"ARROW1 not really")
    assert "neither 'builtin' nor a .txt" in bad("a.docx", b"w1")
    file = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pa.table({"body": ["w1"]}), file)
    with pytest.raises(TextError, match="has no column 'text', only body"):
        texts_of(str(file))
    for missing in ("nowhere.txt", "nowhere.jsonl", "nowhere.parquet", "nowhere.arrow"):
        with pytest.raises(TextError, match=f"{missing} cannot be read"):
            texts_of(str(tmp_path / missing))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(TextError, match="cannot be read"):
        texts_of(str(tmp_path / "folder.txt"))
    with pytest.raises(TextError, match="text nothing: neither 'builtin'"):
        texts_of("nothing")
