"""Activation sheets: read back as written, interpolated where they may be, else refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from workers.contract.model import Model
from workers.moe.accounting import expected_activation, forward, prefill
from workers.moe.architecture import resolve
from workers.moe.precision import Precision
from workers.moe.sheets import (
    LARGEST_BYTES,
    Sheet,
    SheetError,
    SheetKey,
    Sheets,
    find,
    from_rows,
    interpolated,
    read,
    sheet,
    spread,
    structure_of,
    subject,
    to_rows,
    why_none,
)
from workers.moe.structure import Architecture


def architecture(**bent: int) -> Architecture:
    found = resolve(Model(name="deepseek-v2-lite", weights="dummy", **bent))  # type: ignore[arg-type]
    assert found is not None
    return found


A = architecture(num_layers=4)
"""One dense layer and three of 64 experts with top-6."""


def key(batch: int = 8, **other: object) -> SheetKey:
    plain = SheetKey(
        model="deepseek-v2-lite",
        revision="abc",
        weights="checkpoint",
        content="0123456789abcdef",
        structure=structure_of(A),
        engine="vllm",
        dtype="bfloat16",
        quantization=None,
        prune=None,
        args=None,
        dataset="math",
        texts="fedcba9876543210",
        routing=None,
        temperature=0.0,
        batch_size=batch,
        input_tokens=32,
        output_tokens=16,
    )
    return replace(plain, **other)  # type: ignore[arg-type]


def of(batch: int = 8, share: float = 1.0, **other: Any) -> Sheet:
    """Of uniform routing, or a share of it."""
    decode, first = (
        [share * value for value in expected_activation(A, tokens) if value]
        for tokens in (batch, batch * 32)
    )
    made = sheet(
        A,
        key(batch),
        decode=decode,
        prefill=first,
        decode_passes=15,
        decode_tokens=15 * batch,
        prefill_passes=1,
        prefill_tokens=32 * batch,
        settled=True,
        source="results/x, run r0, trial t0",
    )
    return replace(made, **other)


def test_a_sheet_comes_back_as_it_went(tmp_path: Path) -> None:
    sheets = Sheets(tmp_path / "new")
    assert sheets.get(key()) is sheets.find(key()) is None
    path = sheets.put(of())
    assert read(path) == sheets.get(key()) == sheets.find(key()) == of()
    assert list(sheets) == [of()]
    assert [one.name for one in path.parent.iterdir()] == ["8.arrow"]  # nothing beside it
    seen = pl.scan_ipc(path).select("model", "batch_size", "decode_tokens", "settled").collect()
    assert seen.rows() == [("deepseek-v2-lite", 8, 120, True)]


def test_a_phase_that_was_not_seen_is_null(tmp_path: Path) -> None:
    sheets = Sheets(tmp_path)
    sheets.put(of(decode=None, decode_passes=0, decode_tokens=0))
    found = sheets.get(key())
    assert found is not None
    assert found.decode is None and found.mean(found.decode) is None
    assert found.prefill is not None


@pytest.mark.parametrize(
    "other",
    [
        {"model": "mixtral-8x7b"},
        {"revision": None},
        {"weights": "dummy"},
        {"content": None},
        {"structure": "0" * 16},
        {"engine": "transformers"},
        {"dtype": "float32"},
        {"quantization": "fp8"},
        {"prune": "inter 0.25 by norm"},
        {"args": "0" * 16},
        {"dataset": None},
        {"texts": "0" * 16},
        {"routing": "zipf:1"},
        {"temperature": 0.7},
        {"input_tokens": 64},
        {"output_tokens": 17},
    ],
)
def test_every_part_of_the_key_tells_sheets_apart(tmp_path: Path, other: dict[str, object]) -> None:
    sheets = Sheets(tmp_path)
    for batch in (4, 8, 16):
        sheets.put(of(batch))
    assert sheets.find(key(8, **other)) is None
    assert sheets.find(key(6, **other)) is None


def test_between_two_batches_it_is_interpolated_and_says_so(tmp_path: Path) -> None:
    sheets = Sheets(tmp_path)
    for batch in (1, 4, 16):
        sheets.put(of(batch))
    found = sheets.find(key(8))
    assert found is not None
    assert found.between == (4, 16)
    assert "interpolated between batch 4 (results/x" in found.source
    assert found.decode == pytest.approx(expected_activation(A, 8))
    assert found.prefill == pytest.approx(expected_activation(A, 8 * 32))
    assert found.settled
    sheets.put(of(16, settled=False))
    again = sheets.find(key(8))
    assert again is not None and not again.settled
    with pytest.raises(SheetError, match="not stored"):
        sheets.put(found)
    assert sheets.batches(key()) == [1, 4, 16]


def test_beyond_the_batches_there_is_nothing(tmp_path: Path) -> None:
    sheets = Sheets(tmp_path)
    for batch in (4, 16):
        sheets.put(of(batch))
    assert sheets.find(key(2)) is None
    assert sheets.find(key(32)) is None
    sheets.put(of(64))
    assert sheets.find(key(32)) is not None


def test_interpolation_stays_between_its_ends_and_follows_a_skewed_router() -> None:
    low, high = of(4, share=1.0), of(16, share=0.8)
    found = interpolated(low, high, 8)
    assert low.decode and high.decode and found.decode
    for one, value, other in zip(low.decode, found.decode, high.decode, strict=True):
        assert one <= value <= other
    assert found.decode[1] == pytest.approx(0.9 * expected_activation(A, 8)[1])
    with pytest.raises(SheetError, match="not between 4 and 16"):
        interpolated(low, high, 16)
    with pytest.raises(SheetError, match="differ in more"):
        interpolated(low, replace(high, key=key(16, dataset=None)), 8)


def test_a_sheet_of_another_structure_is_refused() -> None:
    other = architecture(num_layers=4, top_k=2)
    assert structure_of(other) != structure_of(A) == structure_of(architecture(num_layers=4))
    of().check(A)
    with pytest.raises(SheetError, match=r"top-6 of 64, but 4 layers, 3 .* top-2 of 64 runs"):
        of().check(other)
    for bent in ({"num_layers": 5}, {"num_experts": 32}, {"ffn_dim": 64}):
        with pytest.raises(SheetError, match="another structure"):
            of().check(architecture(**({"num_layers": 4} | bent)))


def test_numbers_are_those_of_the_accounting() -> None:
    """A stored expectation costs what the expectation costs; means leave dense layers out."""
    found = of()
    assert found.decode is not None
    assert found.decode[0] == 0.0
    assert found.mean(found.decode) == pytest.approx(found.decode[1])
    precision, pass_ = Precision(dtype="bfloat16", kv_dtype="bfloat16"), prefill(8, 1)
    stored = forward(A, precision, pass_, activated=found.decode).total
    assert stored.expert_bytes == pytest.approx(forward(A, precision, pass_).total.expert_bytes)
    assert spread(A, [1, 2, 3]) == (0.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decode": (1.0,)}, "1 numbers for 4 layers"),
        ({"decode": (0.0, 65.0, 1.0, 1.0)}, "more experts than it has"),
        ({"top_k": (6,)}, "a number per layer"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SheetError, match=message):
        replace(of(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(SheetError, match="2 numbers for the 3 MoE layers"):
        spread(A, [1, 2])
    with pytest.raises(ValueError, match="batch_size of a sheet is 0"):
        key(0)


def test_files_that_are_no_sheets_are_named(tmp_path: Path) -> None:
    sheets = Sheets(tmp_path)
    path = sheets.put(of())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SheetError, match=r"8\.arrow: not a whole Arrow file"):
        sheets.find(key())
    path.write_bytes(b"")
    with pytest.raises(SheetError, match="not a whole"):
        sheets.get(key())
    pl.DataFrame({"a": [1]}).write_ipc(path)
    with pytest.raises(SheetError, match="no activation sheet of format 1"):
        list(sheets)
    path.write_bytes(whole)
    path.rename(path.with_name("9.arrow"))
    with pytest.raises(SheetError, match="of another key"):
        sheets.get(key(9))
    with pytest.raises(SheetError, match="of another key"):
        list(sheets)


def test_a_folder_is_read_in_spite_of_what_else_lies_in_it(tmp_path: Path) -> None:
    sheets = Sheets(tmp_path)
    good = sheets.put(of(4))
    torn, moved = sheets.put(of(8)), sheets.put(of(16))
    torn.write_bytes(torn.read_bytes()[:-20])
    moved.rename(moved.with_name("32.arrow"))
    good.with_name("2.arrow").mkdir()
    good.with_name("3.arrow").write_bytes(b"x" * (LARGEST_BYTES + 1))
    good.with_name(".1.arrow").write_bytes(b"half")  # still being written
    good.with_name("64.arrow").symlink_to(tmp_path / "nothing")
    good.with_name("65.arrow").symlink_to(good.with_name("65.arrow"))
    found, problems = sheets.about("deepseek-v2-lite", "abc", "math")
    assert found == [of(4)]
    said = [str(one).removeprefix(f"{good.parent}/") for one in problems]
    names = ["2.arrow", "3.arrow", "32.arrow", "65.arrow", "8.arrow"]
    assert [one.split(":")[0] for one in said] == names
    assert "not a file" in said[0] and "too large" in said[1]
    assert "of another key" in said[2] and "not a whole Arrow file" in said[4]
    assert sheets.about("deepseek-v2-lite", None, "math") == ([], [])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("batch_size", 0, "batch_size of a sheet is 0"),
        ("batch_size", None, "no value in batch_size"),
        ("temperature", float("nan"), "temperature of a sheet is nan"),
        ("experts", [0, 64], "a number per layer"),
        ("experts", [0, None, 64, 64], "8.arrow: '"),
        ("top_k", [0, 6, 65, 6], "cannot choose so many"),
        ("decode", [0.0, float("nan"), 1.0, 1.0], "more experts than it has"),
        ("decode", [0.0, None, 1.0, 1.0], "more experts than it has"),
        ("prefill", [1.0], "1 numbers for 4 layers"),
        ("decode_passes", -1, "at least 0"),
    ],
)
def test_files_with_numbers_that_cannot_be_are_refused(
    tmp_path: Path, column: str, value: object, message: str
) -> None:
    path = Sheets(tmp_path).put(of())
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    place = table.schema.get_field_index(column)
    wrong = table.set_column(
        place, table.schema[place], [pa.array([value], table.schema[place].type)]
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, wrong.schema) as writer:
        writer.write_table(wrong)
    with pytest.raises(SheetError, match=message):
        read(path)


def test_sheets_travel_as_rows() -> None:
    sheets = [of(4), of(8, decode=None, decode_passes=0, decode_tokens=0)]
    assert from_rows(to_rows(sheets)) == sheets
    assert from_rows(to_rows([])) == []


def test_of_several_of_one_key_the_last_stands(tmp_path: Path) -> None:
    early, late = of(8, source="run r0"), of(8, share=0.5, source="run r1")
    assert find([early, late], key(8)) == late
    sheets = Sheets(tmp_path)
    sheets.put(early)
    assert list(sheets) == [early]
    sheets.put(late)
    assert list(sheets) == [late]


def test_passes_of_a_part_of_the_batch_are_not_interpolated() -> None:
    """Their size is the engine's budget of tokens, which says nothing about another batch."""
    cut = {"prefill_passes": 2}
    found = find([of(4), of(16, **cut)], key(8))
    assert found is not None and found.prefill is None and found.decode is not None
    assert found.tokens_per_pass("decode") == 8 and found.tokens_per_pass("prefill") is None
    assert of(16, **cut).tokens_per_pass("prefill") == 16 * 32 / 2
    cut |= {"decode_passes": 30}
    both = [of(4), of(16, **cut)]
    assert find(both, key(8)) is None
    assert "were not of whole batches" in why_none(both, key(8))
    exact = find(both, key(16))
    assert exact is not None and exact.prefill is not None


def test_why_there_is_none_is_told() -> None:
    sheets = [of(4), of(16)]
    assert why_none([], key()) == "there is none of deepseek-v2-lite on text math"
    assert why_none([], key(dataset=None)).endswith("on random token ids")
    outside = why_none(sheets, key(32))
    assert outside == "there are those of batch 4, 16, and batch 32 is outside"
    other = why_none(sheets, key(4, temperature=0.7, dtype="float32"))
    assert other.endswith(
        "is for dtype bfloat16 instead of float32, temperature 0.0 instead of 0.7"
    )


def test_folders_are_named_for_people_and_told_apart() -> None:
    assert subject("deepseek-v2-lite", None, None).startswith("deepseek-v2-lite-")
    assert subject("models/my moe/", None, None).startswith("my-moe-")
    assert subject("../..", None, None).startswith("model-")
    different = {
        subject(*one)
        for one in [("a", None, None), ("a", "b", None), ("a", None, "b"), ("b", None, None)]
    }
    assert len(different) == 4
