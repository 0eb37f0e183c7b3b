"""The order of memory: its laws, the analytic model as its judge, and real runs replayed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis import load
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import find
from orchestrator.dominance import Frontier, order, place
from orchestrator.plan import Planned
from tests.bench.audit_dominance import audit, group, shuffled
from workers import recorder
from workers.contract.engine import EngineSettings
from workers.contract.errors import Infeasible, OutOfMemory
from workers.contract.job import Job, Ticket
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.outcome import OomStage
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.hardware.roofline import predict
from workers.moe.architecture import check, resolve

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hparam"
MIXTRAL = Model(name="mixtral-8x7b", weights="dummy")
FAMILIES = ("mixtral-8x7b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "olmoe-1b-7b")


def _planned(
    model: Model = MIXTRAL,
    target: str = "h100",
    layout: Layout | None = None,
    workload: Workload | None = None,
    **engine: Any,
) -> Planned:
    trial = Trial(
        model=model,
        layout=layout or Layout(),
        workload=workload or Workload(),
        engine=EngineSettings(**engine),
    )
    a = resolve(model)
    if a is not None:
        check(a, trial.layout)
    prediction = predict(a, trial, device(target)) if a is not None else None
    return Planned(trial=trial, trial_id=trial.named_id, axes={}, prediction=prediction)


def _changed(one: Planned, section: str, **values: Any) -> Planned:
    trial = one.trial
    trial = replace(trial, **{section: replace(getattr(trial, section), **values)})
    return _planned(
        trial.model,
        one.prediction.device if one.prediction else "h100",
        trial.layout,
        trial.workload,
        **{name: getattr(trial.engine, name) for name in trial.engine.__slots__},
    )


def _above(one: Planned, other: Planned) -> bool:
    return place(one).above(place(other))


SMALL = _planned(
    replace(MIXTRAL, ffn_dim=3584, num_experts=16, top_k=2, num_layers=16),
    layout=Layout(tensor=4),
    workload=Workload(batch_size=8, input_tokens=512, output_tokens=512),
    memory_limit_gib=20.0,
)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"ffn_dim": 7168}),
        ("model", {"num_experts": 32}),
        ("model", {"top_k": 4}),
        ("model", {"num_layers": 17}),
        ("model", {"dtype": "float32"}),
        ("workload", {"batch_size": 9}),
        ("workload", {"input_tokens": 513}),
        ("workload", {"output_tokens": 513}),
        ("layout", {"tensor": 2}),
        ("layout", {"tensor": 1}),
        ("engine", {"memory_limit_gib": 19.0}),
    ],
)
def test_more_of_one_dimension_is_above_and_not_below(section: str, values: dict[str, Any]) -> None:
    more = _changed(SMALL, section, **values)
    assert _above(more, SMALL) and not _above(SMALL, more)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"quantization": "fp8"}),
        ("model", {"dtype": "float16"}),
        ("model", {"ffn_dim": 3584 + 64}),  # kernels may pad it
        ("model", {"name": "mixtral-8x22b", "ffn_dim": 3584, "weights": "checkpoint"}),
        ("layout", {"expert": True}),
        ("layout", {"tensor": 2, "data": 2}),
        ("layout", {"device": "h100"}),
        ("engine", {"eager": True}),
        ("engine", {"kind": "roofline"}),
        ("engine", {"moe_backend": "triton"}),
        ("engine", {"args": {"block_size": 32}}),
        ("engine", {"args": {"kv_cache_dtype": "fp8"}}),
    ],
)
def test_what_has_no_order_is_not_compared(section: str, values: dict[str, Any]) -> None:
    other = _changed(SMALL, section, **values)
    assert not _above(other, SMALL) and not _above(SMALL, other)


def test_the_class_of_device_is_equal_and_the_share_of_a_gpu_is_in_the_limit() -> None:
    assert not _above(_planned(target="h200"), _planned(target="h100"))
    most = _planned(args={"gpu_memory_utilization": 0.95})
    least = _planned(args={"gpu_memory_utilization": 0.8})
    assert _above(least, _planned()) and _above(_planned(), most) and not _above(most, least)
    assert _above(_planned(memory_limit_gib=70.0), most)
    both = _planned(args={"gpu_memory_utilization": 0.5}, memory_limit_gib=70.0)
    assert not _above(both, _planned(memory_limit_gib=70.0))


def test_fewer_devices_are_above_only_where_weights_outgrow_the_buffers_between_them() -> None:
    tiny = _planned(replace(MIXTRAL, num_layers=1, scale=0.25), layout=Layout(tensor=2))
    assert not _above(_changed(tiny, "layout", tensor=1), tiny)
    whole = _planned(layout=Layout(tensor=2))
    assert _above(_changed(whole, "layout", tensor=1), whole)


def test_pipelines_compare_by_their_stages_and_only_where_layers_are_alike() -> None:
    four, two, one = (_planned(layout=Layout(pipeline=n)) for n in (4, 2, 1))
    assert _above(one, two) and _above(two, four) and not _above(four, two)
    longer = _planned(replace(MIXTRAL, num_layers=40), layout=Layout(pipeline=4))
    assert _above(longer, four)
    mixed = Model(name="deepseek-v2-lite", weights="dummy")  # its first layer is dense
    assert not _above(_planned(mixed), _planned(mixed, layout=Layout(pipeline=2)))
    assert _above(_planned(replace(mixed, num_layers=40)), _planned(mixed))


def test_a_cpu_engine_of_fewer_devices_feeds_fewer_tokens_to_a_pass() -> None:
    long = Workload(batch_size=16, input_tokens=1024, output_tokens=16)
    pairs = [
        [_planned(target="cpu", layout=Layout(tensor=t), workload=w) for t in (1, 2)]
        for w in (long, replace(long, batch_size=2))
    ]
    assert [_above(one, two) for one, two in pairs] == [False, True]


def test_a_model_that_cannot_be_resolved_is_compared_with_itself_alone() -> None:
    hub = Model(name="someone/some-model")
    few, many = (_planned(hub, workload=Workload(batch_size=n)) for n in (1, 2))
    assert few.prediction is None
    assert _above(many, few) and not _above(few, many)
    assert not _above(
        _planned(replace(hub, name="someone/other"), workload=many.trial.workload), few
    )
    assert not _above(_planned(hub, layout=Layout(tensor=2)), few)


def test_out_of_memory_at_load_counts_for_any_workload_if_the_arithmetic_agrees() -> None:
    huge = _planned(replace(MIXTRAL, num_experts=32, top_k=4), layout=Layout(tensor=4))
    assert huge.prediction and huge.prediction.oom and huge.prediction.oom.stage == "load"
    less = _changed(_changed(huge, "workload", batch_size=1, input_tokens=1), "model", top_k=1)
    cases: tuple[tuple[OomStage | None, str | None], ...] = (
        ("load", huge.trial_id),
        ("warmup", None),
        (None, None),
    )
    for stage, found in cases:
        frontier = Frontier()
        frontier.add(huge, stage)
        assert frontier.witness(less) == found
        assert frontier.witness(_changed(huge, "workload", batch_size=64)) == huge.trial_id
    fits = _planned(layout=Layout(tensor=4))
    assert fits.prediction and fits.prediction.oom is None
    frontier = Frontier()
    frontier.add(fits, "load")
    lighter = _changed(fits, "workload", input_tokens=1)
    assert frontier.witness(lighter) is None


def test_beyond_loading_a_witness_stands_for_all_that_its_engine_was_built_for() -> None:
    small, large, between, beyond = (
        _planned(workload=Workload(batch_size=n), eager=True) for n in (1, 64, 8, 65)
    )
    frontier = Frontier()
    frontier.add(small, "kv_cache", [small, large])
    assert frontier.witness(between) is None
    assert frontier.witness(beyond) == frontier.witness(large) == small.trial_id
    other = _planned(workload=Workload(arrivals="poisson"), eager=True)
    nothing = Frontier()
    nothing.add(small, "warmup", [small, other])
    assert len(nothing) == 0 and nothing.witness(large) is None


def test_graphs_captured_for_other_batch_sizes_are_evidence_of_nothing() -> None:
    small, large = (_planned(workload=Workload(batch_size=n)) for n in (1, 64))
    frontier = Frontier()
    frontier.add(small, "warmup", [small, large])
    assert len(frontier) == 0
    frontier.add(large, "warmup", [large])
    assert len(frontier) == 1


def test_a_trial_is_no_witness_against_itself() -> None:
    one = _planned()
    frontier = Frontier()
    assert frontier.witness(one) is None
    frontier.add(one)
    assert len(frontier) == 1 and frontier.witness(one) is None


def test_only_the_least_demanding_witnesses_are_kept() -> None:
    batches = [_planned(workload=Workload(batch_size=n)) for n in (8, 16, 4)]
    frontier = Frontier()
    for one in batches:
        frontier.add(one, "run")
    assert len(frontier) == 1
    assert frontier.witness(batches[1]) == batches[2].trial_id
    frontier.add(_planned(workload=Workload(batch_size=1, output_tokens=4096)), "run")
    assert len(frontier) == 2


# --- properties


@st.composite
def _any_planned(draw: st.DrawFn) -> Planned:
    """A few values of each dimension, so that comparable pairs are frequent."""
    name = draw(st.sampled_from(FAMILIES))
    # Widths and heads of the four divide by 4, and so do the widths asked for.
    model = Model(
        name=name,
        weights="dummy",
        ffn_dim=draw(st.sampled_from([None, 1024, 2048])),
        num_experts=draw(st.sampled_from([None, 16, 32])),
        top_k=draw(st.sampled_from([1, 2])),
        num_layers=draw(st.sampled_from([None, 5, 12])),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        quantization=draw(st.sampled_from([None, None, "fp8"])),
    )
    layout = Layout(
        tensor=draw(st.sampled_from([1, 2, 4])),
        pipeline=draw(st.sampled_from([1, 1, 2, 3])),
        data=draw(st.sampled_from([1, 1, 2])),
        expert=draw(st.booleans()),
    )
    workload = Workload(
        batch_size=draw(st.sampled_from([1, 16, 512])),
        input_tokens=draw(st.sampled_from([16, 1000, 8192])),
        output_tokens=draw(st.sampled_from([16, 4096])),
    )
    try:
        return _planned(
            model,
            draw(st.sampled_from(["h100", "cpu"])),
            layout,
            workload,
            memory_limit_gib=draw(st.sampled_from([None, 2.0, 8.0, 30.0])),
        )
    except Infeasible:
        assume(False)
        raise


@st.composite
def _pair(draw: st.DrawFn) -> tuple[Planned, Planned]:
    """Two trials, the second made from the first by some steps that mostly lead upwards."""
    one = draw(_any_planned())
    p = one.trial
    limit = p.engine.memory_limit_gib
    steps: list[tuple[str, dict[str, Any]]] = [
        ("model", {"ffn_dim": 4096}),
        ("model", {"num_experts": 80}),
        ("model", {"top_k": 4}),
        ("model", {"num_layers": 31}),
        ("model", {"dtype": "float32"}),
        ("layout", {"tensor": max(1, p.layout.tensor // 2)}),
        ("layout", {"pipeline": max(1, p.layout.pipeline - 1)}),
        ("layout", {"pipeline": 1}),
        ("layout", {"data": 1}),
        ("layout", {"expert": not p.layout.expert}),
        ("workload", {"batch_size": 2 * p.workload.batch_size}),
        ("workload", {"batch_size": 1}),
        ("workload", {"input_tokens": p.workload.input_tokens + 500}),
        ("workload", {"output_tokens": 1}),
        ("engine", {"memory_limit_gib": None if limit is None else limit / 2}),
    ]
    other = one
    chosen = draw(st.lists(st.sampled_from(range(len(steps))), min_size=1, max_size=4))
    try:
        for section, values in (steps[i] for i in chosen):
            other = _changed(other, section, **values)
    except Infeasible:
        assume(False)
    return one, other


@pytest.mark.lengthy
@settings(max_examples=100, deadline=None)
@given(_pair())
def test_what_is_above_needs_no_less_by_the_analytic_model(pair: tuple[Planned, Planned]) -> None:
    low, high = pair
    assert _above(low, low) and _above(high, high)
    if _above(low, high):
        low, high = high, low
    if not _above(high, low):
        return
    a, b = low.prediction, high.prediction
    assert a is not None and b is not None
    assert b.weights_gib >= a.weights_gib
    assert b.kv_cache_gib >= a.kv_cache_gib
    assert b.activations_gib >= a.activations_gib
    assert b.memory_gib >= a.memory_gib and b.limit_gib <= a.limit_gib
    assert order(high) >= order(low)
    if a.oom is not None:
        assert b.oom is not None


@pytest.mark.lengthy
@settings(max_examples=100, deadline=None)
@given(_pair())
def test_what_a_witness_skips_would_not_have_fitted(pair: tuple[Planned, Planned]) -> None:
    low, high = pair
    assert low.prediction is not None and high.prediction is not None
    if low.prediction.oom is None:
        return
    frontier = Frontier()
    frontier.add(low, low.prediction.oom.stage)
    if frontier.witness(high) is not None:
        assert high.prediction.oom is not None
        assert high.prediction.weights_gib >= low.prediction.weights_gib


@pytest.mark.lengthy
@settings(max_examples=100, deadline=None)
@given(st.lists(_pair(), min_size=2, max_size=4))
def test_the_order_is_transitive_and_equal_only_where_places_are(
    pairs: list[tuple[Planned, Planned]],
) -> None:
    points = [place(one) for pair in pairs for one in pair]
    for a in points:
        for b in points:
            if a.above(b) and b.above(a):
                assert a == b
            for c in points:
                if a.above(b) and b.above(c):
                    assert a.above(c)


@pytest.mark.lengthy
@settings(max_examples=100, deadline=None)
@given(st.lists(_pair(), min_size=1, max_size=4), st.randoms())
def test_witnesses_do_not_depend_on_the_order_in_which_they_came(
    pairs: list[tuple[Planned, Planned]], random: Any
) -> None:
    low, high = [a for a, _ in pairs], [b for _, b in pairs]
    frontiers = []
    for _ in range(2):
        frontier = Frontier()
        for one in low:
            frontier.add(one, "run")
        frontiers.append(frontier)
        random.shuffle(low)
    for one in (*low, *high):
        hit = [f.witness(one) is not None for f in frontiers]
        assert hit[0] == hit[1] == any(_above(one, w) for w in low if w.trial_id != one.trial_id)


# --- records


def _job() -> Job:
    return Job(sweep="s", run_id="r", group_id=None, profile="h100", tickets=())


def _ticket(one: Planned) -> Ticket:
    return Ticket(trial=one.trial, trial_id=one.trial_id, axes=one.axes)


def test_a_skipped_row_names_its_witness_in_one_line() -> None:
    one = _planned()
    row = recorder.skipped(_job(), _ticket(one), "00ff", device="H100").to_pylist()[0]
    assert (row["outcome"], row["skipped_by"], row["device"]) == ("skipped", "00ff", "H100")
    assert "00ff" in row["outcome_reason"] and "\n" not in row["outcome_reason"]
    assert row["measured"] is False and row["num_experts"] == 8
    assert row["oom_stage"] is None and row["oom_scope"] is None


def test_figures_draw_a_skipped_trial_as_out_of_memory(tmp_path: Path) -> None:
    frontier = Frontier()
    batches, start = [], datetime.now(UTC)
    for n, experts in enumerate((8, 16, 32, 64)):
        model = replace(MIXTRAL, num_experts=experts, top_k=2)
        one = _planned(model, layout=Layout(tensor=4))
        columns: dict[str, Any] = {"device": "NVIDIA H100", "finished_at": start + timedelta(0, n)}
        if witness := frontier.witness(one):
            batches.append(recorder.skipped(_job(), _ticket(one), witness, **columns))
            continue
        assert one.prediction is not None
        error = one.prediction.oom or OutOfMemory("no room", stage="run", scope="host")
        batches.append(recorder.failed(_job(), _ticket(one), error, **columns))
        if error.scope == "device":
            frontier.add(one, error.stage)
    folder = tmp_path / "s" / "records"
    folder.mkdir(parents=True)
    table = pa.Table.from_batches(batches)
    with pa.ipc.new_file(folder / "part.arrow", table.schema) as writer:
        writer.write_table(table)
    figure = find("fig8")
    assert isinstance(figure, RecordsFigure)
    prepared = figure.prepare(load(tmp_path / "s")).sort("num_experts")
    assert prepared["outcome"].to_list()[2:] == ["oom", "skipped"]
    assert prepared["out_of_memory"].to_list()[2:] == [True, True]
    assert prepared["skipped_by"][3] == prepared["trial_id"][2]
    figure.chart(prepared)


@pytest.mark.lengthy
def test_a_real_run_would_have_skipped_most_of_its_failures_and_no_result() -> None:
    frame = load(GOLDEN).collect().filter(pl.col("outcome").is_in(["ok", "oom"]))
    groups = group(frame.iter_rows(named=True))
    found = audit(groups)
    assert (found.trials, found.exhausted, found.skipped) == (64, 12, 9)
    assert found.false == ()
    again = [audit(shuffled(groups, seed)) for seed in range(5)]
    assert not any(one.false for one in again)
    assert min(one.skipped for one in again) >= 9
