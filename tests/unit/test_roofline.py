"""The roofline, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.assumptions import assumptions
from workers.hardware.device import device
from workers.hardware.roofline import GIB, Prediction, predict, roofline
from workers.moe.accounting import Cost, Slice, decode, forward, prefill
from workers.moe.architecture import resolve
from workers.moe.precision import precision

H100 = device("h100")
MIXTRAL = Model(name="mixtral-8x7b", weights="dummy")
ONE = Workload(batch_size=1, input_tokens=1, output_tokens=1)


def _predict(model: Model = MIXTRAL, target: str = "h100", **parts: Any) -> Prediction:
    a = resolve(model)
    assert a is not None
    found = predict(a, Trial(model=model, **parts), device(target))
    assert found is not None
    return found


def test_weights_and_cache_of_mixtral_on_four_devices() -> None:
    workload = Workload(batch_size=16, input_tokens=2048, output_tokens=2048)
    one = _predict(layout=Layout(tensor=4), workload=workload)
    router_and_norms = 32 * (4096 * 8 + 2 * 4096) + 4096  # every rank has them
    assert one.weights_gib * GIB == pytest.approx(
        ((46_702_792_704 - router_and_norms) / 4 + router_and_norms) * 2
    )
    assert one.kv_cache_gib * GIB == 16 * 4096 * 131_072 / 4
    assert one.oom is None and one.waves == 1


def test_decode_of_one_sequence_is_bound_by_the_bytes_it_reads() -> None:
    short, long = (_predict(workload=replace(ONE, output_tokens=n)) for n in (1, 101))
    step = (long.e2e_s - short.e2e_s) / 100
    assumed = assumptions(H100)
    read = 12_748_853_248 * 2 / (3350e9 * assumed.bandwidth_share)  # without the embedding
    assert step == pytest.approx(read + assumed.step_s + 32 * assumed.layer_s, rel=0.01)
    assert long.tpot_s == pytest.approx(step, rel=0.01)
    assert short.tpot_s is None


def test_prefill_of_a_long_prompt_is_bound_by_arithmetic() -> None:
    one = _predict(workload=Workload(batch_size=4, input_tokens=4096, output_tokens=1))
    flops = 4 * 4096 * 25.2e9
    assert one.prefill_s > flops / (989e12 * assumptions(H100).compute_share)
    assert one.prefill_passes == 1
    longer = _predict(workload=Workload(batch_size=8, input_tokens=4096, output_tokens=1))
    assert longer.prefill_passes == 2
    assert longer.prefill_s == pytest.approx(2 * one.prefill_s, rel=0.05)
    # The median of eight is between the fourth, done in the first pass, and the fifth.
    assert longer.ttft_s == pytest.approx(longer.prefill_s * (1 / 2 + 1) / 2)


def test_more_devices_are_faster_and_their_talk_costs_something() -> None:
    workload = Workload(batch_size=16, input_tokens=512, output_tokens=512)
    alone = _predict(workload=workload)
    four = _predict(workload=workload, layout=Layout(tensor=4))
    assert alone.e2e_s / 4 < four.e2e_s < alone.e2e_s
    stages = _predict(workload=workload, layout=Layout(pipeline=4))
    assert stages.weights_gib < alone.weights_gib / 3.5
    assert stages.e2e_s == pytest.approx(alone.e2e_s, rel=0.05)  # one batch, stage after stage
    experts = _predict(workload=workload, layout=Layout(tensor=4, expert=True))
    assert experts.weights_gib == pytest.approx(four.weights_gib)


def test_what_does_not_fit_says_where() -> None:
    wide = replace(MIXTRAL, num_experts=64)
    weights = _predict(wide)
    assert weights.oom is not None and weights.oom.stage == "load"
    assert "weights need" in str(weights.oom)
    tight = Workload(batch_size=1, input_tokens=8192, output_tokens=8192)
    settings = EngineSettings(memory_limit_gib=90.5)
    cache = _predict(engine=settings, workload=tight, target="h200")
    assert cache.oom is not None and cache.oom.stage == "kv_cache"
    roomy = _predict(engine=EngineSettings(memory_limit_gib=95), workload=tight, target="h200")
    assert roomy.oom is None


def test_a_cache_that_does_not_fit_whole_is_out_of_memory_on_a_gpu_too() -> None:
    workload = Workload(batch_size=64, input_tokens=4096, output_tokens=4096)
    one = _predict(workload=workload, layout=Layout(tensor=2))
    assert one.oom is not None and one.oom.stage == "kv_cache" and one.waves == 1
    assert one.memory_gib > one.limit_gib
    small = _predict(workload=replace(workload, batch_size=8), layout=Layout(tensor=2))
    assert small.waves == 1


def test_arguments_of_the_engine_that_change_the_cost_are_heeded() -> None:
    workload = Workload(batch_size=8, input_tokens=2048, output_tokens=16)

    def with_args(**args: Any) -> Prediction:
        return _predict(workload=workload, engine=EngineSettings(args=args))

    plain = with_args()
    assert with_args(kv_cache_dtype="fp8").kv_cache_gib == pytest.approx(plain.kv_cache_gib / 2)
    assert with_args(max_num_batched_tokens=4096).prefill_passes == 4
    assert with_args(gpu_memory_utilization=0.5).limit_gib == pytest.approx(H100.memory_gib / 2)
    beyond = _predict(workload=workload, engine=EngineSettings(memory_limit_gib=500.0))
    assert beyond.limit_gib == H100.memory_gib, "no device has more than it has"
    starved = with_args(kv_cache_memory_bytes=1000)
    assert starved.oom is not None and starved.oom.stage == "kv_cache"


_FIGURES = (
    ("attention_bytes", "attention_flops"),
    ("kv_bytes", "score_flops"),
    ("router_bytes", "router_flops"),
    ("expert_bytes", "expert_flops"),
    ("shared_bytes", "shared_flops"),
    ("dense_bytes", "dense_flops"),
    ("head_bytes", "head_flops"),
    ("norm_bytes", ""),
    ("embedding_bytes", ""),
)


def _long_way(trial: Trial, target: str, slices: list[tuple[Slice, ...]]) -> float:
    """Seconds of passes: layer by layer, pass by pass, stage by stage."""
    a, peaks = resolve(trial.model), device(target)
    assert a is not None
    stored, assumed = precision(a, trial.model), assumptions(peaks)
    seconds = 0.0
    for stage in range(trial.layout.pipeline):
        total = Cost()
        for one in slices:
            found = forward(a, stored, one, layout=trial.layout, stage=stage)
            for layer in (found.outside, *found.layers):
                total += layer
        for size, work in _FIGURES:
            moved = (
                total.kv_read_bytes + total.kv_write_bytes
                if size == "kv_bytes"
                else getattr(total, size)
            )
            seconds += max(
                moved / (peaks.bandwidth_gb_s * 1e9 * assumed.bandwidth_share),
                (getattr(total, work) if work else 0.0)
                / (peaks.tflops(stored.compute) * 1e12 * assumed.compute_share),
            )
    each = assumed.step_s + len(a.layers) * assumed.layer_s
    return seconds + len(slices) * each


@settings(max_examples=20, deadline=None)
@given(
    model=st.sampled_from(
        [
            MIXTRAL,
            Model(name="deepseek-v2-lite"),
            Model(name="llama-4-scout"),
            Model(name="qwen1.5-moe-a2.7b", quantization="fp8"),
        ]
    ),
    target=st.sampled_from(["h100", "a100"]),
    workload=st.builds(
        Workload,
        batch_size=st.integers(1, 40),
        input_tokens=st.integers(1, 200),
        output_tokens=st.integers(1, 4),
    ),
    pipeline=st.integers(1, 3),
)
def test_a_workload_costs_what_its_passes_cost_layer_by_layer(
    model: Model, target: str, workload: Workload, pipeline: int
) -> None:
    """Defect: a coefficient that is lost where the sheets of layers are added up."""
    trial = Trial(model=model, workload=workload, layout=Layout(pipeline=pipeline))
    a, peaks = resolve(model), replace(device(target), link_latency_s=0.0, link_gb_s=1e30)
    assert a is not None
    engine = roofline(a, trial, peaks)
    assert engine is not None
    found = engine.predict(workload)
    assert found.waves == found.prefill_passes == 1
    batch, tokens = workload.batch_size, workload.input_tokens
    admitted = batch * assumptions(peaks).request_s
    first = _long_way(trial, target, [prefill(batch, tokens)])
    assert found.prefill_s == pytest.approx(first + admitted, rel=1e-12)
    later = [decode(batch, tokens + i) for i in range(workload.output_tokens - 1)]
    assert found.e2e_s == pytest.approx(
        first + admitted + (_long_way(trial, target, later) if later else 0.0), rel=1e-12
    )


@pytest.mark.parametrize("expert", [False, True])
def test_replicas_gather_the_tokens_of_the_others(expert: bool) -> None:
    """Around every layer of experts, cut or spread; dense models exchange nothing."""

    def talk(name: str, data: int) -> float:
        model = Model(name=name, weights="dummy")
        a = resolve(model)
        assert a is not None
        layout = Layout(data=data, expert=expert and a.moe is not None)
        made = roofline(a, Trial(model=model, layout=layout), H100)
        assert made is not None
        return made._communication(a)[1]

    per_token = 32 * 2 * 4096 * 2 / (H100.link_gb_s * 1e9)  # there and back, in 16 bits
    assert talk("mixtral-8x7b", 2) == pytest.approx(per_token)
    assert talk("mixtral-8x7b", 4) == pytest.approx(3 * per_token)
    assert talk("qwen3-0.6b", 2) == 0.0


def test_one_engine_predicts_every_workload_as_a_trial_of_its_own() -> None:
    a = resolve(MIXTRAL)
    assert a is not None
    layout = Layout(tensor=2, data=2, expert=True)
    shared = roofline(a, Trial(model=MIXTRAL, layout=layout), H100)
    assert shared is not None
    for batch, tokens in ((1, 1), (64, 4096), (7, 100_000)):
        workload = Workload(batch_size=batch, input_tokens=tokens, output_tokens=32)
        alone = predict(a, Trial(model=MIXTRAL, layout=layout, workload=workload), H100)
        assert alone is not None
        found = shared.predict(workload)
        assert replace(found, oom=None) == replace(alone, oom=None)
        assert str(found.oom) == str(alone.oom)


def test_columns_are_those_of_a_record() -> None:
    from workers.contract.record import RECORDS

    columns = _predict().columns()
    assert set(columns) <= set(RECORDS.names)
    assert all(name.startswith("predict") for name in columns)
    assert columns["predicted_device"] == "h100"


def test_no_prediction_for_what_is_not_spelled_out() -> None:
    a = resolve(MIXTRAL)
    assert a is not None
    assert predict(replace(a, exact=False), Trial(model=MIXTRAL), H100) is None
    odd = replace(MIXTRAL, quantization="no-such-method")
    assert predict(a, Trial(model=odd), H100) is None


def _queued(most: int, batch: int = 64, **workload: Any) -> Prediction:
    asked = Workload(batch_size=batch, **{"input_tokens": 128, "output_tokens": 64} | workload)
    model = Model(name="olmoe-1b-7b", weights="dummy")
    return _predict(model, workload=asked, engine=EngineSettings(args={"max_num_seqs": most}))


def test_requests_beyond_those_in_flight_wait_for_their_turn() -> None:
    one, eight, all_ = (_queued(most) for most in (1, 8, 64))
    assert [known.waves for known in (one, eight, all_)] == [64, 8, 1]
    assert one.e2e_s > eight.e2e_s > all_.e2e_s
    alone = _queued(1, batch=1)
    assert one.e2e_s == pytest.approx(64 * alone.e2e_s)
    # Between the 32nd and the 33rd of 64 requests: 31 and 32 of them go before.
    assert one.ttft_s == pytest.approx(31.5 * alone.e2e_s + alone.prefill_s)
    assert all_.ttft_s == pytest.approx(all_.prefill_s)
    assert eight.ttft_s == pytest.approx(3.5 * eight.wave.seconds + eight.wave.prefill_s)
    assert one.kv_cache_gib == pytest.approx(all_.kv_cache_gib / 64)


def test_the_last_wave_is_what_is_left() -> None:
    found, rest = _queued(48), _queued(64, batch=16)
    assert (found.waves, found.wave.requests, found.last.requests) == (2, 48, 16)
    assert found.e2e_s == pytest.approx(_queued(48, batch=48).e2e_s + rest.e2e_s)
    assert found.prefill_s == pytest.approx(found.wave.prefill_s + rest.prefill_s)
    assert found.tpot_s == found.wave.step_s


def test_replicas_have_their_own_requests_in_flight() -> None:
    settings = EngineSettings(args={"max_num_seqs": 8})
    workload = Workload(batch_size=32, input_tokens=16, output_tokens=4)
    found = _predict(engine=settings, workload=workload, layout=Layout(data=2))
    assert (found.waves, found.requests) == (2, 16)


def test_a_cache_that_is_asked_for_bounds_what_runs_together() -> None:
    workload = Workload(batch_size=8, input_tokens=1000, output_tokens=24)
    per_request = 1024 * 131_072
    for target in ("h200", "cpu"):
        settings = EngineSettings(
            args={"kv_cache_memory_bytes": 3 * per_request}, memory_limit_gib=120.0
        )
        found = _predict(engine=settings, workload=workload, target=target)
        assert found.oom is None and found.waves == 3


def test_the_cache_must_hold_one_request_of_the_model_s_length() -> None:
    workload = Workload(batch_size=1, input_tokens=16, output_tokens=16)
    short, long = (
        _predict(engine=EngineSettings(args={"max_model_len": n}), workload=workload)
        for n in (32, 32768)
    )
    assert short.kv_cache_gib * GIB == 32 * 131_072
    assert long.kv_cache_gib * GIB == 32768 * 131_072
