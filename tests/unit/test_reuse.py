"""From a probe to a sheet and from a sheet to a record: what fits, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workers.contract.engine import EngineSettings, Speculative
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.measurement import Pass
from workers.contract.model import Model, Prune
from workers.contract.probed import Probed
from workers.contract.trace import Step, Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.moe.architecture import resolve
from workers.moe.sheets import Sheet
from workers.reuse import key_of, made, taken
from workers.usage import columns

EXPERTS, PROMPT, TOKENS = 8, 10, 4
PROBED = Trial(
    model=Model(name="mixtral-8x7b", weights="dummy", num_layers=2),
    workload=Workload(batch_size=2, input_tokens=PROMPT, output_tokens=TOKENS),
    measure=Measure(activation=True),
)
ASKING = replace(PROBED, measure=Measure(activation="sheet"))
FOUND = resolve(PROBED.model)
assert FOUND is not None
A = FOUND
VERSION = "0.32.0"


def step(batch: int, ran: Sequence[int], *, decoding: bool) -> Step:
    """A pass in which the first `ran` experts of each layer ran."""
    counts = np.array([[1] * of_layer + [0] * (EXPERTS - of_layer) for of_layer in ran])
    nothing = np.zeros_like(counts)
    return Step(
        request=np.arange(batch),
        new=np.full(batch, 1 if decoding else PROMPT),
        context=np.zeros(batch, np.int64),
        decoding=np.full(batch, decoding),
        prefill=nothing if decoding else counts,
        decode=counts if decoding else nothing,
        seconds=1.0,
    )


def probe(batch: int = 2) -> Probed:
    """Experts by layer: 8 and 7 for the prompts, then 3 and 2, 3 and 4, 3 and 3."""
    steps = [step(batch, (8, 7), decoding=False)]
    steps += [step(batch, ran, decoding=True) for ran in ((3, 2), (3, 4), (3, 3))]
    trace = Trace(layers=(0, 1), top_k=2, steps=tuple(steps), tokens=((0,) * TOKENS,) * batch)
    return Probed(traces={0: trace}, settled=True)


def timed(batch: int = 2, *, prompt_passes: int = 1, seconds: float = 1.0) -> Pass:
    stamps = tuple(seconds * (at + 1.0) for at in range(TOKENS))
    return Pass(
        kind="timed",
        repeat=0,
        started_at=0.0,
        e2e_s=stamps[-1],
        input_tokens=PROMPT,
        token_s=(stamps,) * batch,
        step_s=(*(seconds * at / prompt_passes for at in range(1, prompt_passes)), *stamps),
    )


def kept(trial: Trial = PROBED, probed: Probed | None = None) -> Sheet:
    found = made(trial, A, VERSION, probed or probe(), source="s, run r, trial t")
    assert found is not None
    return found


def of_record(trial: Trial, *passes: Pass, **behind: Any) -> dict[str, Any]:
    return columns(trial, A, passes, device("h100"), **behind)


def test_a_sheet_has_the_means_that_the_record_of_its_probe_has() -> None:
    sheet = kept()
    assert sheet.decode == pytest.approx((3.0, 3.0)) and sheet.prefill == pytest.approx((8.0, 7.0))
    assert (sheet.decode_passes, sheet.decode_tokens) == (3, 6)
    assert (sheet.prefill_passes, sheet.prefill_tokens) == (1, 2 * PROMPT)
    assert sheet.settled and sheet.source == "s, run r, trial t"
    row = of_record(PROBED, timed(), probed=probe())
    assert row["activated_experts_decode"] == sheet.mean(sheet.decode)
    assert row["activated_experts_prefill"] == sheet.mean(sheet.prefill)
    nothing = made(PROBED, A, VERSION, Probed(reason="it cannot"), source="s")
    assert nothing is made(PROBED, A, VERSION, None, source="s") is None


def test_a_later_trial_accounts_for_the_bytes_of_the_probed_one() -> None:
    sheet, reason = taken(ASKING, A, VERSION, [kept()], [timed(seconds=0.5)])
    assert sheet == kept() and reason is None
    probed = of_record(PROBED, timed(), probed=probe())
    later = of_record(ASKING, timed(seconds=0.5), sheet=sheet)
    assert probed["activation_source"] == "traced" and later["activation_source"] == "sheet"
    assert later["activation_sheet"] == "s, run r, trial t"
    assert later["activation_settled"] is True and "traced_passes" not in later
    for name in ("s_mbu", "s_mbu_paper", "prefill_s_mbu", "s_mbu_uniform", "mbu", "s_mfu"):
        assert later[name] == pytest.approx(2 * probed[name]), name
    assert later["s_mbu"] < later["s_mbu_uniform"]
    for name in ("activated_experts_decode", "activated_experts_prefill"):
        assert later[name] == probed[name]


def test_between_batches_the_record_says_so() -> None:
    four = replace(PROBED, workload=replace(PROBED.workload, batch_size=4))
    eight = replace(ASKING, workload=replace(ASKING.workload, batch_size=8))
    three = replace(ASKING, workload=replace(ASKING.workload, batch_size=3))
    sheets = [kept(), kept(four, probe(4))]
    sheet, reason = taken(three, A, VERSION, sheets, [timed(3)])
    assert sheet is not None and sheet.between == (2, 4) and reason is None
    row = of_record(three, timed(3), sheet=sheet)
    assert row["activation_source"] == "sheet-interpolated"
    assert row["activation_sheet"].startswith("interpolated between batch 2 (s, run r")
    assert row["activated_experts_decode"] == pytest.approx(3.0)
    none, reason = taken(eight, A, VERSION, sheets, [timed(8)])
    assert none is None and reason is not None
    assert "batch 2, 4, and batch 8 is outside" in reason and "--fresh" in reason


def test_without_a_sheet_there_is_no_share_that_needs_one() -> None:
    row = of_record(ASKING, timed())
    for name in ("s_mbu", "s_mbu_paper", "prefill_s_mbu"):
        assert row[name] is None
    assert "activation_source" not in row and "activated_experts_decode" not in row
    plain = of_record(replace(ASKING, measure=Measure()), timed())
    assert plain["activation_source"] == "uniform"
    assert row["s_mbu_uniform"] == plain["s_mbu"]
    for name in ("mbu", "mfu", "s_mfu", "prefill_s_mfu"):
        assert row[name] == pytest.approx(plain[name])


def test_a_sheet_is_never_used_unasked() -> None:
    plain = replace(ASKING, measure=Measure())
    assert of_record(plain, timed(), sheet=None) == of_record(plain, timed())
    assert of_record(plain, timed())["activation_source"] == "uniform"


def test_passes_that_are_put_together_otherwise_are_left_out() -> None:
    """Prompts in two passes touch fewer experts each than in one."""
    sheet, reason = taken(ASKING, A, VERSION, [kept()], [timed(prompt_passes=2)])
    assert sheet is not None and sheet.prefill is None and sheet.decode is not None
    assert reason == "the activation sheet is of prefill passes of 20 tokens, here they have 10"
    row = of_record(ASKING, timed(prompt_passes=2), sheet=sheet)
    assert row["prefill_s_mbu"] is None and row["activation_source"] == "sheet"
    assert row["s_mbu"] == of_record(ASKING, timed(), sheet=kept())["s_mbu"]
    staggered = replace(timed(), token_s=((1.0, 2.0, 3.0, 4.0), (1.0, 2.5, 3.5, 4.5)))
    sheet, reason = taken(ASKING, A, VERSION, [kept()], [staggered])
    assert sheet is not None and sheet.decode is None
    assert reason is not None and "decode passes of 2 tokens, here they have 1" in reason


def test_dense_models_and_drafts_have_nothing_to_look_up() -> None:
    dense = resolve(Model(name="qwen3-0.6b", weights="dummy"))
    assert dense is not None and dense.moe is None
    assert taken(ASKING, dense, VERSION, [], [timed()]) == (None, None)
    drafted = replace(ASKING, engine=EngineSettings(speculative=Speculative(model="ngram")))
    assert taken(drafted, A, VERSION, [kept()], [timed()]) == (None, None)


MODEL, ENGINE, LOAD = PROBED.model, PROBED.engine, PROBED.workload


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": replace(MODEL, name="olmoe-1b-7b")}, "model"),
        ({"model": replace(MODEL, revision="abc")}, "revision"),
        ({"model": replace(MODEL, weights="checkpoint")}, "weights"),
        ({"model": replace(MODEL, dtype="float32")}, "dtype"),
        ({"model": replace(MODEL, quantization="fp8")}, "quantization"),
        ({"model": replace(MODEL, prune=Prune(ratio=0.25))}, "prune"),
        ({"model": replace(MODEL, trust_remote_code=True)}, "args"),
        ({"layout": Layout(tensor=2)}, "content"),
        ({"engine": replace(ENGINE, args={"hf_overrides": {"rope_theta": 1}})}, "args"),
        ({"engine": replace(ENGINE, routing="zipf:1.2")}, "routing"),
        ({"workload": replace(LOAD, temperature=0.7)}, "temperature"),
        ({"workload": replace(LOAD, dataset="builtin:code")}, "dataset"),
        ({"workload": replace(LOAD, batch_size=4)}, "batch_size"),
        ({"workload": replace(LOAD, input_tokens=11)}, "input_tokens"),
        ({"workload": replace(LOAD, output_tokens=5)}, "output_tokens"),
    ],
)
def test_whatever_moves_routing_is_in_the_key(change: dict[str, Any], field: str) -> None:
    before, after = key_of(PROBED, A, VERSION), key_of(replace(PROBED, **change), A, VERSION)
    assert getattr(before, field) != getattr(after, field)
    assert taken(replace(ASKING, **change), A, VERSION, [kept()], [timed()])[0] is None


def test_what_only_costs_is_not_in_the_key() -> None:
    key = key_of(PROBED, A, VERSION)
    economy = {"max_num_seqs": 4, "gpu_memory_utilization": 0.5, "enforce_eager": True}
    same = (
        {"engine": replace(ENGINE, args=economy, eager=True, memory_limit_gib=4.0)},
        {"measure": Measure(repeats=9)},
        {"workload": replace(LOAD, seed=3)},
        {"layout": Layout(pipeline=2)},
    )
    for change in same:
        assert key_of(replace(PROBED, **change), A, VERSION) == key
    trained = replace(PROBED, model=replace(MODEL, weights="checkpoint"))
    assert key_of(trained, A, VERSION) == key_of(replace(trained, layout=Layout(tensor=2)), A, "1")
    assert key_of(PROBED, A, "1") != key, "skeletons are drawn by a version of the engine"


def test_texts_are_told_apart_by_what_they_say(tmp_path: Any) -> None:
    file = tmp_path / "my.txt"
    keys = []
    for text in ("one text", "another"):
        file.write_text(text)
        there = replace(PROBED, workload=replace(LOAD, dataset=str(file)))
        keys.append(key_of(there, A, VERSION))
    assert keys[0].dataset == keys[1].dataset and keys[0].texts != keys[1].texts
    file.unlink()
    gone = replace(ASKING, workload=replace(LOAD, dataset=str(file)))
    sheet, reason = taken(gone, A, VERSION, [kept()], [timed()])
    assert sheet is None and reason is not None and "my.txt cannot be read" in reason
    probing = replace(gone, measure=Measure(activation=True))
    assert made(probing, A, VERSION, probe(), source="s") is None
