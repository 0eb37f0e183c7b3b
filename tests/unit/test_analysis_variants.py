"""Figures 10 and 12: variants against a baseline, and the sentences about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from analysis import load
from analysis.errors import SelectionError
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import find
from analysis.figures.write import write as write_figure
from tests.unit.test_analysis_dataset import record, write


def _figure(name: str) -> RecordsFigure:
    figure = find(name)
    assert isinstance(figure, RecordsFigure)
    return figure


def _point(number: int, **columns: Any) -> dict[str, Any]:
    """As `record`, but for figures that are not there."""
    if columns.get("throughput_tok_s", 0.0) is not None:
        return record(f"t{number}", **columns)
    ends = ("throughput_tok_s", "throughput_tok_s_ci_low", "throughput_tok_s_ci_high")
    whole = record(f"t{number}", **{**columns, "throughput_tok_s": 1.0})
    return whole | dict.fromkeys((*ends, "repeats", "ci_level"))


@pytest.fixture
def drafts(tmp_path: Path) -> pl.LazyFrame:
    """A target alone, a draft that helps (less with more input), one that is refused."""
    rows, number = [], 0
    for tokens_in, base in ((32, 100.0), (128, 400.0)):
        rows.append(_point(number, input_tokens=tokens_in, throughput_tok_s=base))
        number += 1
        for tokens, share, rate in ((1, 1.5, 0.9), (4, 1.2 if tokens_in == 32 else 0.995, 0.6)):
            rows.append(
                _point(
                    number,
                    input_tokens=tokens_in,
                    throughput_tok_s=base * share,
                    speculative="models/small",
                    draft_tokens=tokens,
                    acceptance_rate=rate,
                    accepted_length=1 + rate * tokens,
                )
            )
            rows.append(
                _point(
                    number + 1,
                    input_tokens=tokens_in,
                    throughput_tok_s=None,
                    outcome="unsupported",
                    outcome_reason="no",
                    speculative="mtp",
                    draft_tokens=tokens,
                )
            )
            number += 2
    write(tmp_path / "speculative", rows)
    return load(tmp_path / "speculative")


def test_every_draft_stands_against_the_target_alone(drafts: pl.LazyFrame) -> None:
    frame = _figure("fig12").prepare(drafts)
    assert len(frame) == 10
    small = frame.filter(pl.col("variant") == "small").sort("input_tokens", "draft_tokens")
    assert small.get_column("ratio").to_list() == pytest.approx([1.5, 1.2, 1.5, 0.995])
    assert small.get_column("apart").to_list() == [True, True, True, False]
    assert frame.filter("baseline").get_column("ratio").to_list() == [None, None]
    assert frame.get_column("variant")[0] == "target alone"


def test_what_is_said_of_drafts_follows_from_the_records(drafts: pl.LazyFrame) -> None:
    figure = _figure("speculative")
    assert figure.insight(figure.prepare(drafts)) == (
        "Highest against target alone: input 32 small (drafts of 1, 1.50 times, beyond the "
        "confidence intervals) and input 128 small (drafts of 1, 1.50 times, beyond the "
        "confidence intervals). Lowest of all: small (drafts of 4, input 128, 0.99 times, "
        "within the confidence intervals). "
        "From drafts of 1 to 4: -27 % with small, medians over 2 panels. "
        "Accepted: small 0.90 of 1 (1.90 tokens a step) and 0.60 of 4 (3.40 tokens a step). "
        "Without a value: mtp (4 unsupported)."
    )
    figure = _figure("fig12-length")
    said = figure.insight(figure.prepare(drafts))
    assert "From input 32 to 128: +300 % with target alone and +266 % with small, medians" in said


@pytest.mark.lengthy
def test_the_target_alone_is_drawn_at_every_number_of_draft_tokens(drafts: pl.LazyFrame) -> None:
    figure = _figure("speculative")
    frame = figure.prepare(drafts)
    first, second = figure.pivots(frame)
    assert first.title == "input 32" and first.columns == ("1", "4")
    assert first.rows == (
        ("target alone", "100", "100"),
        ("mtp", "unsupported", "unsupported"),
        ("small", "150 (1.50×)", "120 (1.20×)"),
    )
    assert second.rows[0] == ("target alone", "400", "400")
    spec: dict[str, Any] = figure.chart(frame).to_dict()
    points = [one for rows in spec["datasets"].values() for one in rows]
    alone = [one for one in points if one["line"] == "target alone"]
    assert {(one["panel"], one["x"], one["y"]) for one in alone} == {
        ("Throughput (tokens/s), input 32", 1.0, 100.0),
        ("Throughput (tokens/s), input 32", 4.0, 100.0),
        ("Throughput (tokens/s), input 128", 1.0, 400.0),
        ("Throughput (tokens/s), input 128", 4.0, 400.0),
    }
    assert {one["dash"] for one in alone} == {"baseline"}
    accepted = [one["y"] for one in points if one["panel"] == "Acceptance rate, input 32"]
    assert sorted(accepted) == [0.6, 0.9]


@pytest.fixture
def precisions(tmp_path: Path) -> pl.LazyFrame:
    rows = []
    kinds: tuple[tuple[dict[str, Any], float | None], ...] = (
        ({}, 1.0),
        ({"quantization": "fp8", "weights_gib": 5.0}, 1.3),
        ({"kv_cache_dtype": "fp8"}, 0.9),
        ({"dtype": "float16"}, None),
    )
    for batch in (1, 16):
        for place, (kind, share) in enumerate(kinds):
            value = None if share is None else 100.0 * batch * share
            ended = {"outcome": "ok" if share else "unsupported"}
            columns = {"weights_gib": 10.0, "kv_cache_dtype": "bfloat16", **ended, **kind}
            if share is None:
                columns |= {"weights_gib": None, "kv_cache_dtype": None}
            rows.append(
                _point(10 * batch + place, batch_size=batch, throughput_tok_s=value, **columns)
            )
    write(tmp_path / "quantization", rows)
    return load(tmp_path / "quantization")


def test_precisions_by_batch(precisions: pl.LazyFrame) -> None:
    figure = _figure("fig10")
    frame = figure.prepare(precisions)
    assert frame.get_column("variant").unique().sort().to_list() == [
        "bfloat16",
        "bfloat16, fp8 cache",
        "float16",
        "fp8",
    ]
    said = figure.insight(frame)
    assert "fp8 (batch 16, 1.30 times, beyond the confidence intervals)" in said
    assert "Lowest of all: bfloat16, fp8 cache (batch 1, " in said
    assert "Weights against bfloat16: bfloat16, fp8 cache 1.00 times, fp8 0.50 times." in said
    assert said.endswith("Without a value: float16 (2 unsupported).")


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "one", [_point(0, throughput_tok_s=1.0)])
    with pytest.raises(SelectionError, match="it takes target alone and another variant, there is"):
        _figure("fig12").prepare(load(tmp_path / "one"))
    with pytest.raises(SelectionError, match="bfloat16 or float16 or float32 and another variant"):
        _figure("fig10").prepare(load(tmp_path / "one"))


def test_other_conditions_are_not_mixed_in(drafts: pl.LazyFrame) -> None:
    mixed = drafts.with_columns(
        batch_size=pl.when(pl.col("trial_id") == "t1").then(8).otherwise(16)
    )
    with pytest.raises(SelectionError, match="different conditions in one figure: batch_size"):
        _figure("fig12").prepare(mixed)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", ["speculative", "speculative-length"])
def test_pictures_are_written(drafts: pl.LazyFrame, name: str, tmp_path: Path) -> None:
    figure = _figure(name)
    out = tmp_path / "figure.svg"
    write_figure(figure, figure.prepare(drafts), out)
    assert "Speculative decoding" in out.read_text()
