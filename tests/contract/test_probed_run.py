"""A group measured with `measure.activation`: what is timed, what is counted, what is written,
and what later groups take from it.

On a small checkpoint with a tokenizer, so that prompts of text are measured as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tests.contract import tiny
from tests.contract.tiny import EXPERTS, SHAPE, TOP_K
from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.measure import Activation, Measure
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.moe.activation import uniform_distinct

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

LAYERS = SHAPE["num_hidden_layers"]
WORKLOAD = Workload(batch_size=4, input_tokens=24, output_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from workers.texts import texts_of

    folder = tmp_path_factory.mktemp("mixtral")
    words = Tokenizer(models.BPE(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"])
    words.train_from_iterator([one.text for one in texts_of("builtin:en")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return tiny.checkpoint(folder, "mixtral", dtype="bfloat16", vocab_size=512)


def _run(*trials: Trial, sheets: pa.RecordBatch | None = None) -> dict[str, Finished]:
    tickets = tuple(Ticket(trial=one, trial_id=f"t{i}") for i, one in enumerate(trials))
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=tickets, sheets=sheets)
    return {one.trial_id: one for one in runner.run(job) if isinstance(one, Finished)}


def test_timed_passes_are_replayed_and_their_experts_written(checkpoint: Path) -> None:
    plain = Trial(
        model=Model(name=str(checkpoint)),
        workload=WORKLOAD,
        engine=EngineSettings(eager=True),
        measure=Measure(repeats=3, extra_repeats=0),
    )
    counted = replace(plain, measure=Measure(repeats=3, extra_repeats=0, activation=True))
    text = replace(counted, workload=replace(WORKLOAD, dataset="builtin:en"))
    found = _run(counted, text, plain)
    assert {one.outcome for one in found.values()} == {"ok"}
    rows = {key: pl.DataFrame(one.record).row(0, named=True) for key, one in found.items()}

    row = rows["t0"]
    assert row["activation_source"] == "traced" and row["traced_passes"] == 3
    assert rows["t2"]["activation_source"] == "uniform" and rows["t2"]["traced_passes"] is None
    assert rows["t2"]["s_mbu_uniform"] is None and found["t2"].activations is None
    assert 0 < row["activated_experts_decode"] <= EXPERTS
    assert rows["t1"]["dataset"] == "builtin:en" and row["dataset"] is None

    samples = pl.DataFrame(found["t0"].samples)
    timed, probes = (samples.filter(kind=kind) for kind in ("timed", "probe"))
    assert probes["repeat"].to_list() == timed["repeat"].to_list() == [0, 1, 2]
    assert timed["pass_experts"].null_count() == 3 and probes["token_s"].null_count() == 3
    for probe, pass_ in zip(probes.iter_rows(named=True), timed.iter_rows(named=True), strict=True):
        assert len(probe["pass_s"]) == len(pass_["step_s"]) == len(probe["pass_experts"])
        for busiest, new in zip(probe["pass_busiest"], probe["pass_new"], strict=True):
            assert all(TOP_K * sum(new) / EXPERTS <= most <= sum(new) for most in busiest)
        assert probe["pass_context"][-1] == [24 + 4] * 4 and probe["pass_new"][-1] == [1] * 4
        assert sum(map(sum, probe["pass_new"])) == 4 * (24 + 6 - 1)

    activations = pl.DataFrame(found["t0"].activations)
    per_layer = activations.group_by("phase", "layer").agg(pl.col("tokens").sum(), pl.len())
    assert per_layer.height == 2 * LAYERS and set(per_layer["len"]) == {EXPERTS}
    tokens = {"prefill": 3 * 4 * 24, "decode": 3 * 4 * 5}
    for one in per_layer.iter_rows(named=True):
        assert one["tokens"] == TOP_K * tokens[one["phase"]]

    decode = [
        experts
        for probe in probes.iter_rows(named=True)
        for experts, decoding in zip(probe["pass_experts"], probe["pass_decoding"], strict=True)
        if all(decoding)
    ]
    assert row["activated_experts_decode"] == pytest.approx(np.mean(decode))
    expected = uniform_distinct(EXPERTS, TOP_K, [4])[0]
    fewer = row["activated_experts_decode"] < expected
    assert (row["s_mbu"] < row["s_mbu_uniform"]) is bool(fewer)
    other = pl.DataFrame(found["t1"].activations)
    assert not other.equals(activations), "text is routed otherwise than random ids"


def _decode_gb(row: dict[str, Any], samples: pl.DataFrame) -> float:
    """Bytes that S-MBU accounts for in a mean timed pass, over all its decode steps."""
    seconds = [
        one["e2e_s"] - max(stamps[0] for stamps in one["token_s"])
        for one in samples.filter(kind="timed").iter_rows(named=True)
    ]
    found: float = row["s_mbu"] * row["peak_bandwidth_gb_s"] * np.mean(seconds)
    return found


def test_what_was_counted_is_taken_by_trials_that_ask_for_it(checkpoint: Path) -> None:
    """On the same engine, and on a later one of which no trial is probed."""
    plain = Trial(
        model=Model(name=str(checkpoint)),
        workload=WORKLOAD,
        engine=EngineSettings(eager=True),
        measure=Measure(repeats=2, extra_repeats=0),
    )

    def of(batch: int, activation: Activation, temperature: float = 0.0) -> Trial:
        workload = replace(WORKLOAD, batch_size=batch, temperature=temperature)
        measure = Measure(repeats=2, extra_repeats=0, activation=activation)
        return replace(plain, workload=workload, measure=measure)

    first = _run(of(2, True), of(8, True), of(2, "sheet"), of(4, "sheet"), of(16, "sheet"))
    made = [one for one in (first["t0"].sheet, first["t1"].sheet) if one is not None]
    assert len(made) == 2 and first["t2"].sheet is None
    later = _run(
        of(2, "sheet"), of(4, "sheet"), of(2, False), of(2, "sheet", 0.7),
        sheets=pa.concat_batches(made),
    )  # fmt: skip
    found = [group[f"t{number}"] for group in (first, later) for number in range(len(group))]
    assert {one.outcome for one in found} == {"ok"}
    rows = [pl.DataFrame(one.record).row(0, named=True) for one in found]
    two, eight, same, between, beyond, again, between_again, unasked, warm = rows

    for row in (same, again):
        assert (
            row["activation_source"] == "sheet" and row["activation_sheet"] == "s, run r, trial t0"
        )
        assert row["activated_experts_decode"] == two["activated_experts_decode"]
        assert row["traced_passes"] is None and row["outcome_reason"] is None
        assert row["prefill_s_mbu"] is not None and row["s_mbu_uniform"] is not None
    samples = [pl.DataFrame(one.samples) for one in found]
    counted = _decode_gb(two, samples[0])
    assert _decode_gb(same, samples[2]) == pytest.approx(counted, rel=1e-3)
    assert _decode_gb(again, samples[5]) == pytest.approx(counted, rel=1e-3)

    for row in (between, between_again):
        assert row["activation_source"] == "sheet-interpolated"
        low, high = (one["activated_experts_decode"] for one in (two, eight))
        assert low < row["activated_experts_decode"] < high
    assert between["activated_experts_decode"] == between_again["activated_experts_decode"]
    assert _decode_gb(two, samples[0]) < _decode_gb(between, samples[3])

    assert beyond["s_mbu"] is None and beyond["activation_source"] is None
    assert "batch 2, 8, and batch 16 is outside" in beyond["outcome_reason"]
    assert warm["s_mbu"] is None and "temperature 0.0 instead of 0.7" in warm["outcome_reason"]
    assert warm["s_mbu_uniform"] is not None and warm["throughput_tok_s"] is not None
    assert unasked["activation_source"] == "uniform" and unasked["activation_sheet"] is None


def test_text_needs_a_tokenizer_and_tokens_that_the_model_knows(checkpoint: Path) -> None:
    dummy = Trial(
        model=Model(name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584),
        workload=replace(WORKLOAD, dataset="builtin"),
        engine=EngineSettings(eager=True),
        measure=Measure(repeats=1),
    )
    (without,) = _run(dummy).values()
    assert without.outcome == "infeasible"
    reason = without.record.column("outcome_reason")[0].as_py()
    assert "tokenizer of mixtral-8x7b" in reason
    short = replace(
        dummy,
        model=Model(name=str(checkpoint)),
        workload=replace(WORKLOAD, dataset="builtin:de", batch_size=200),
    )
    (found,) = _run(short).values()
    assert found.outcome == "infeasible"
    assert "too short" in found.record.column("outcome_reason")[0].as_py()
