"""Which forward passes a batch's stamps show, and what they used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from workers.contract.engine import EngineSettings, Speculative
from workers.contract.layout import Layout
from workers.contract.measurement import Pass
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.moe.accounting import Slice
from workers.moe.architecture import resolve
from workers.usage import columns, contradictions, decodes, in_step, prefills, sound

TRIAL = Trial(model=Model(name="mixtral-8x7b", weights="dummy"))
ARCHITECTURE = resolve(TRIAL.model)
H100 = device("h100")


def _pass(*rows: tuple[float, ...], prompt: int = 10) -> Pass:
    return Pass(
        kind="timed",
        repeat=0,
        started_at=0.0,
        e2e_s=max(row[-1] for row in rows),
        input_tokens=prompt,
        token_s=rows,
        step_s=tuple(sorted({stamp for row in rows for stamp in row})),
    )


def _columns(*passes: Pass, trial: Trial = TRIAL) -> dict[str, object]:
    assert ARCHITECTURE is not None
    return columns(trial, ARCHITECTURE, passes, H100)


def test_a_batch_in_lockstep() -> None:
    one = _pass((1.0, 1.5, 2.5), (1.0, 1.5, 2.5))
    (first,) = prefills(one)
    assert first.slices == (Slice(sequences=2, new=10, context=0),)
    assert first.latency_s == 1.0
    assert [(one.slices, one.latency_s) for one in decodes(one)] == [
        ((Slice(sequences=2, new=1, context=10),), 0.5),
        ((Slice(sequences=2, new=1, context=11),), 1.0),
    ]


def test_prompts_that_end_in_different_passes_of_a_prefill() -> None:
    one = _pass((1.0, 3.0), (2.0, 3.0))
    assert [(one.slices[0].sequences, one.latency_s) for one in prefills(one)] == [
        (1, 1.0),
        (1, 1.0),
    ]
    (step,) = decodes(one)
    assert step.slices == (Slice(sequences=2, new=1, context=10),) and step.latency_s == 1.0


def test_a_mixed_step_is_charged_to_neither_phase() -> None:
    one = _pass((1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 4.0, 5.0))
    assert prefills(one) == []  # the second step fed a prompt and decoded
    steps = decodes(one)
    assert [step.latency_s for step in steps] == [1.0, 1.0, 1.0]
    assert {(s.sequences, s.context) for s in steps[0].slices} == {(1, 11), (1, 10)}
    assert steps[2].slices == (Slice(sequences=1, new=1, context=12),)


def test_replicas_are_put_in_step() -> None:
    """Requests 0 and 2 ran on one replica, 1 and 3 on the other, which was a little later."""
    one = _pass((1.0, 2.0, 3.0), (1.1, 2.1, 2.9), (1.0, 2.0, 3.0), (1.1, 2.1, 2.9))
    step = in_step(one, 2)
    assert step.token_s == ((1.1, 2.1, 3.0),) * 4
    assert in_step(step, 2) == step and in_step(one, 1) is one
    alone = _pass((1.0, 2.0), prompt=4)  # the other replica had nothing to do
    assert in_step(alone, 2) == alone


def test_replicas_use_what_one_device_does_in_twice_the_time() -> None:
    rows = ((1.0, 2.0, 3.0), (0.9, 1.9, 2.9)) * 4
    two = replace(TRIAL, layout=Layout(data=2))
    split, alone = _columns(_pass(*rows), trial=two), _columns(_pass(*rows[::2], *rows[::2]))
    for name in ("mbu", "mfu", "s_mbu_paper", "s_mfu", "prefill_s_mfu"):
        assert split[name] == pytest.approx(alone[name] / 2), name  # type: ignore[operator]
    assert isinstance(split["s_mbu"], float) and isinstance(split["s_mbu_paper"], float)
    assert split["s_mbu"] > split["s_mbu_paper"]  # attention is read by both


def test_the_closed_form_and_the_sum_over_passes_agree() -> None:
    lockstep = _pass((1.0, 1.5, 2.5, 3.0), (1.0, 1.5, 2.5, 3.0))
    nearly = _pass((1.0, 1.5, 2.5, 3.0), (0.99, 1.5, 2.5, 3.0))
    aside = _pass((1.0, 1.5, 2.5, 3.0), (1.0, 1.5, 2.5, 3.0 + 1e-9))
    closed, summed = _columns(lockstep), _columns(aside)
    for name in ("mbu", "mfu", "s_mbu", "s_mbu_paper", "s_mfu"):
        assert _columns(nearly)[name] == pytest.approx(closed[name])
    for name in ("mfu", "s_mfu"):
        assert summed[name] == pytest.approx(closed[name], rel=1e-6)
    # One more pass, of a billionth of a second, that reads the weights once more.
    assert isinstance(summed["mbu"], float) and isinstance(closed["mbu"], float)
    assert summed["mbu"] > closed["mbu"]


def test_ratios_of_sums_and_not_means_of_ratios() -> None:
    fast, slow = _pass((1.0, 2.0)), _pass((1.0, 4.0))
    both = _columns(fast, slow)["s_mbu"]
    each = [_columns(one)["s_mbu"] for one in (fast, slow)]
    assert isinstance(both, float) and all(isinstance(one, float) for one in each)
    assert both == pytest.approx(2 / (1 / each[0] + 1 / each[1]))  # type: ignore[operator]


def test_mbu_of_one_token_by_hand() -> None:
    row = _columns(_pass((1.0, 2.0), prompt=1))
    active = 12_748_853_248 * 2  # without the embedding, of which one row is read
    assert row["s_mbu"] == pytest.approx(active / 3350e9, rel=0.001)
    assert row["mbu"] == pytest.approx(46_702_792_704 * 2 / 3350e9, rel=0.001)
    assert row["peak_bandwidth_gb_s"] == 3350 and row["peak_tflops"] == 989
    assert (row["peak_source"], row["activation_source"]) == ("catalogue", "uniform")
    assert row["kv_cache_dtype"] == "bfloat16"


def test_devices_share_the_work() -> None:
    one = _pass((1.0, 2.0))
    four = _columns(one, trial=replace(TRIAL, layout=Layout(tensor=4)))
    alone = _columns(one)
    assert four["s_mbu_paper"] == pytest.approx(alone["s_mbu_paper"] / 4)  # type: ignore[operator]
    assert isinstance(four["s_mbu"], float)
    assert four["s_mbu"] > alone["s_mbu"] / 4  # type: ignore[operator]  # router and norms on each


def test_untraced_passes_of_a_forced_routing_take_its_expectation() -> None:
    one = _pass(*[(1.0, 2.0, 3.0)] * 16)
    even = _columns(one)
    steep = _columns(one, trial=_routed("zipf:2"))
    alone = _columns(one, trial=_routed("all-to-one"))
    flat = _columns(one, trial=_routed("zipf:0"))
    assert steep["activation_source"] == alone["activation_source"] == "routing"
    assert even["activation_source"] == "uniform"
    assert flat["s_mbu"] == pytest.approx(even["s_mbu"])
    assert flat["prefill_s_mbu"] == pytest.approx(even["prefill_s_mbu"])
    for name in ("s_mbu", "s_mbu_paper"):
        values = np.array([found[name] for found in (alone, steep, even)], dtype=np.float64)
        assert (np.diff(values) > 0).all()
    # Two experts of every layer, as one sequence alone reads; the rest is its larger cache.
    assert ARCHITECTURE is not None
    single = _columns(_pass((1.0, 2.0, 3.0)))
    assert alone["s_mbu"] == pytest.approx(single["s_mbu"], rel=0.001)


def _routed(routing: str) -> Trial:
    return replace(TRIAL, engine=EngineSettings(routing=routing))


def test_null_where_there_is_no_telling() -> None:
    assert ARCHITECTURE is not None
    one = _pass((1.0, 2.0))
    assert columns(TRIAL, ARCHITECTURE, [one], None) == {}
    drafted = replace(TRIAL, engine=EngineSettings(speculative=Speculative(model="ngram")))
    assert "s_mbu" not in _columns(one, trial=drafted)
    single = _columns(_pass((1.0,)), trial=replace(TRIAL, workload=Workload(output_tokens=1)))
    assert single["s_mbu"] is None and single["prefill_s_mbu"] is not None


MEASURED: dict[str, object] = {
    "peak_source": "calibrated",
    "peak_bandwidth_gb_s": 5.9,
    "peak_tflops": 1.5,
    "mbu": 1.9,
    "s_mbu": 1.28,
    "s_mbu_paper": 1.21,
    "s_mbu_uniform": 1.4,
    "prefill_s_mbu": 0.4,
    "mfu": 0.3,
    "s_mfu": 0.2,
    "prefill_s_mfu": 0.6,
    "activation_source": "traced",
}


def test_a_measured_peak_that_passes_go_beyond_is_none() -> None:
    """What is taken against it is null, with the reason; the other peak's shares stand."""
    kept, reason = sound(MEASURED)
    assert reason == (
        "s_mbu would be 1.28 of the 5.9 GB/s measured: such a peak is none, so what is taken "
        "against it is not known"
    )
    gone = {"mbu", "s_mbu", "s_mbu_paper", "s_mbu_uniform", "prefill_s_mbu"}
    assert {name for name, value in kept.items() if value is None} == gone
    assert {name: kept[name] for name in kept.keys() - gone} == {
        name: MEASURED[name] for name in MEASURED.keys() - gone
    }
    faster = MEASURED | {"s_mbu": 0.3, "s_mbu_paper": 0.3, "prefill_s_mfu": 1.01}
    kept, reason = sound(faster)
    assert reason is not None and reason.startswith("prefill_s_mfu would be 1.01 of the 1.5 TFLOPS")
    assert kept["s_mfu"] is kept["mfu"] is None and kept["s_mbu"] == 0.3


def test_what_may_be_above_one_or_is_taken_against_a_data_sheet_is_no_contradiction() -> None:
    whole = MEASURED | {"s_mbu": 1.0, "s_mbu_paper": None, "mbu": 7.0, "mfu": 3.0}
    assert sound(whole) == (whole, None)
    sheet = MEASURED | {"peak_source": "catalogue"}
    assert sound(sheet) == (sheet, None)
    assert sound({}) == ({}, None)
    assert contradictions(MEASURED) == ["s_mbu would be 1.28 of the 5.9 GB/s measured"]
    assert contradictions(MEASURED | {"peak_source": "calibrated-disturbed"})


@pytest.mark.parametrize("rows", [[(1.0,)], [(1.0,), (1.0,)], [(0.5,), (1.0,)]])
def test_one_token_a_request_is_prefill_alone(rows: list[tuple[float, ...]]) -> None:
    got = _columns(_pass(*rows))
    for name in ("mbu", "mfu", "s_mbu", "s_mbu_paper", "s_mfu"):
        assert got[name] is None
    for name in ("prefill_s_mbu", "prefill_s_mfu"):
        share = got[name]
        assert isinstance(share, float) and share > 0
