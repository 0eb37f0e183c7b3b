"""What the probe counts is what transformers' own routers choose, token by token.

Both get the same tiny checkpoint with random weights of ordinary size and the same token
ids: the prompts, and what vLLM generated after them. In float32 the two implementations
differ by about a millionth of a logit, far less than two experts ever lie apart here, so the
choices are compared exactly. In bfloat16 a logit has 8 bits: experts tie, or lie so close
that the order of additions decides, and then the token is another one to the layers above,
and so are those that attend to it. So a difference is allowed there between experts that are
level within what bfloat16 costs transformers itself, and where the request has parted in a
lower layer; of the tokens and layers here about 1 % differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.contract import tiny
from tests.contract.tiny import EXPERTS, SHAPE
from workers.contract.engine import EngineSettings
from workers.contract.errors import Unsupported
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trace import Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.roofline_engine import RooflineEngine
from workers.engines.vllm_engine import VllmEngine
from workers.engines.vllm_stepper import Done, trace_of
from workers.moe.precision import Precision
from workers.moe.utilisation import Peaks, traced_utilisation

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [0]},
}
MOE_LAYERS = {"mixtral": (0, 1, 2), "qwen2_moe": (0, 2), "qwen3_moe": (1, 2)}
LARGEST = Workload(batch_size=5, input_tokens=40, output_tokens=8)
OUTPUT = 6
UNEVEN = (8, 3, 1, 8, 5)
"""Output tokens of requests that end at different times."""
BUDGET = 32
"""Most tokens of a pass where prompts are to be cut."""


def _prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, SHAPE["vocab_size"], size).tolist() for size in lengths]


MIXED = _prompts(37, 5, 20, 1, 11)


def _checkpoint(family: str, folder: Path) -> Path:
    return tiny.checkpoint(folder, family, num_hidden_layers=3, **FAMILIES.get(family, {}))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(family, tmp_path_factory.mktemp(family))


def _trial(
    checkpoint: Path, *, dtype: str = "float32", eager: bool = True, **changes: Any
) -> Trial:
    args = {"max_num_batched_tokens": BUDGET, "max_num_seqs": LARGEST.batch_size}
    given = {
        "model": Model(name=str(checkpoint), dtype=dtype),  # type: ignore[arg-type]
        "workload": LARGEST,
        "engine": EngineSettings(eager=eager, args=args),
    }
    return Trial(**given | changes)  # type: ignore[arg-type]


def _engine(trial: Trial, folder: Path) -> VllmEngine:
    return VllmEngine(trial, [LARGEST], Site(scratch=folder, device="cpu"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    built = _engine(_trial(checkpoint), tmp_path_factory.mktemp("scratch"))
    yield built
    built.close()


@pytest.fixture(scope="module")
def trace(engine: VllmEngine) -> Trace:
    return engine.trace(MIXED, OUTPUT, routes=True)


@pytest.fixture(scope="module")
def uneven(engine: VllmEngine) -> Trace:
    return engine.trace(MIXED, UNEVEN, routes=True)


def _logits(
    checkpoint: Path, ids: Sequence[int], *, dtype: str = "float32", top_k: int = 2
) -> NDArray[np.float32]:
    """Router logits by transformers, MoE layers × tokens × experts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), num_experts_per_tok=top_k
    ).eval()
    with torch.no_grad():
        told = model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
    rows = [one.float() for one in told.router_logits if one is not None]
    return torch.stack(rows).numpy()


def _chosen(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """The largest, as every one of these families takes them; sorted by number."""
    return np.sort(np.argsort(-logits, axis=-1, kind="stable")[..., :top_k], axis=-1)


def _tally(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Layers × tokens × top-k to layers × experts."""
    return np.stack([np.bincount(one.ravel(), minlength=EXPERTS) for one in ids])


def _expected(checkpoint: Path, trace: Trace, top_k: int = 2) -> list[NDArray[np.int64]]:
    """Per request, layers × tokens × top-k."""
    rows = zip(MIXED, trace.tokens, strict=True)
    return [
        _chosen(_logits(checkpoint, [*ids, *new[:-1]], top_k=top_k), top_k) for ids, new in rows
    ]


def _check(trace: Trace, expected: list[NDArray[np.int64]]) -> None:
    """Every pass against the expected choices of just the tokens that it held."""
    done = [0] * len(MIXED)
    for step in trace.steps:
        prefill = np.zeros((len(trace.layers), EXPERTS), dtype=np.int64)
        decode = np.zeros_like(prefill)
        for place, new, context in zip(step.request, step.new, step.context, strict=True):
            assert context == done[place], "a request's tokens come in order, each once"
            counts = _tally(expected[place][:, context : context + new])
            assert context >= len(MIXED[place]) or context + new <= len(MIXED[place])
            if context >= len(MIXED[place]):
                decode += counts
            else:
                prefill += counts
            done[place] += new
        np.testing.assert_array_equal(step.prefill, prefill)
        np.testing.assert_array_equal(step.decode, decode)
    rows = zip(MIXED, trace.tokens, strict=True)
    assert done == [len(ids) + len(new) - 1 for ids, new in rows]


def test_every_pass_counts_what_transformers_routers_choose(
    family: str, checkpoint: Path, trace: Trace
) -> None:
    assert trace.layers == MOE_LAYERS[family]
    _check(trace, _expected(checkpoint, trace))


def test_prompts_were_cut_and_mixed_with_decoding(trace: Trace) -> None:
    """What the test above relies on for its meaning."""
    assert max(step.new.sum() for step in trace.steps) <= BUDGET
    assert any(0 < context < len(MIXED[0]) for step in trace.steps for context in step.context)
    assert any(step.prefill.any() and step.decode.any() for step in trace.steps)
    assert any(step.decoding.all() for step in trace.steps)
    assert trace.prefill.sum() == sum(map(len, MIXED)) * len(trace.layers) * trace.top_k
    assert trace.decode.sum() == len(MIXED) * (OUTPUT - 1) * len(trace.layers) * trace.top_k


def test_counts_of_a_pass_are_its_tokens_times_top_k_in_every_layer(trace: Trace) -> None:
    for step in trace.steps:
        assert step.counts.shape == (len(trace.layers), EXPERTS)
        assert set(step.prefill.sum(axis=1)) == {step.new[~step.decoding].sum() * trace.top_k}
        assert set(step.decode.sum(axis=1)) == {step.new[step.decoding].sum() * trace.top_k}
        most = np.minimum(EXPERTS, step.new.sum() * trace.top_k)
        assert np.all((trace.top_k <= step.activated) & (step.activated <= most))
        assert 0 < step.seconds < 60


def test_routes_are_the_choices_behind_the_counts(checkpoint: Path, trace: Trace) -> None:
    assert trace.routes is not None
    for route, expected in zip(trace.routes, _expected(checkpoint, trace), strict=True):
        assert route.dtype == np.int16
        np.testing.assert_array_equal(np.sort(route, axis=-1).transpose(1, 0, 2), expected)
    total = sum(_tally(route.transpose(1, 0, 2).astype(np.int64)) for route in trace.routes)
    np.testing.assert_array_equal(total, trace.prefill + trace.decode)


def test_requests_of_mixed_lengths_end_at_different_times(checkpoint: Path, uneven: Trace) -> None:
    assert tuple(len(row) for row in uneven.tokens) == UNEVEN
    _check(uneven, _expected(checkpoint, uneven))
    ends = {
        place: number for number, step in enumerate(uneven.steps) for place in step.request.tolist()
    }
    assert len(set(ends.values())) >= 4
    assert uneven.routes is not None
    lengths = [len(ids) + new - 1 for ids, new in zip(MIXED, UNEVEN, strict=True)]
    assert [len(one) for one in uneven.routes] == lengths
    assert all((one >= 0).all() for one in uneven.routes)
    assert any(step.prefill.any() and step.decode.any() for step in uneven.steps)


def test_lengths_that_are_none_are_refused(engine: VllmEngine) -> None:
    for asked in ([3, 3], [3, 3, 0, 3, 3]):
        with pytest.raises(ValueError, match="one each, at least 1"):
            engine.trace(MIXED, asked)


LAYER_SIZES: dict[str, dict[str, int]] = {  # parameters, written out from the widths in `tiny`
    "mixtral": {
        "attention": 128 * 128 + 2 * (64 * 128) + 128 * 128,
        "expert": 3 * 96 * 128,
        "shared": 0,
        "dense": 0,
    },
    "qwen2_moe": {
        "attention": 128 * 128 + 128 + 2 * (64 * 128 + 64) + 128 * 128,
        "expert": 3 * 64 * 128,
        "shared": 3 * 96 * 128 + 128,
        "dense": 3 * 96 * 128,
    },
    "qwen3_moe": {
        "attention": 128 * 128 + 2 * (64 * 128) + 128 * 128 + 2 * 32,
        "expert": 3 * 64 * 128,
        "shared": 0,
        "dense": 3 * 96 * 128,
    },
}


def test_utilisation_of_mixed_passes_is_eq_6_by_hand(
    family: str, checkpoint: Path, engine: VllmEngine, uneven: Trace
) -> None:
    """MoE-CAP Eq 6: sums over the passes of what they needed, over the sum of their times.

    The experts are those of transformers' router logits, not the trace's own.
    """
    size, moe = LAYER_SIZES[family], len(MOE_LAYERS[family])
    expected = _expected(checkpoint, uneven)
    seconds = needed = flops = 0.0
    for step in uneven.steps:
        tokens = pairs = cached = 0
        ran: list[set[int]] = [set() for _ in range(moe)]
        for place, new, context in zip(step.request, step.new, step.context, strict=True):
            tokens += new
            cached += context + new
            pairs += sum(context + 1 + place for place in range(new))
            for layer in range(moe):
                ran[layer] |= set(expected[place][layer, context : context + new].ravel().tolist())
        weights = 3 * size["attention"] + (3 - moe) * size["dense"] + moe * size["shared"]
        weights += sum(len(one) for one in ran) * size["expert"]
        cache = 3 * 2 * (2 * 32) * cached  # layers, keys and values, heads of 32
        needed += 4 * (weights + cache)  # float32
        vectors = {"mixtral": 0, "qwen2_moe": 256, "qwen3_moe": 64}[family]  # no multiplication
        each = 3 * (size["attention"] - vectors) + (3 - moe) * size["dense"]
        each += moe * (EXPERTS * 128 + 2 * size["expert"] + size["shared"])
        flops += 2 * each * tokens + 3 * 4 * (4 * 32) * pairs
        seconds += step.seconds
    peaks = Peaks(bandwidth_gb_s=20.0, tflops=0.5)
    stored = Precision(dtype="float32", kv_dtype="float32")
    a = engine.loaded.architecture
    got = traced_utilisation(a, stored, Layout(), peaks, uneven)
    assert got.s_mbu_paper == pytest.approx(needed / seconds / 20e9, rel=1e-12)
    assert got.s_mfu == pytest.approx(flops / seconds / 0.5e12, rel=1e-12)
    assert got.s_mbu is not None and got.s_mbu_paper is not None and got.mbu is not None
    assert got.s_mbu_paper < got.s_mbu < got.mbu
    half = traced_utilisation(
        a, stored, Layout(), peaks, uneven, seconds=[2 * step.seconds for step in uneven.steps]
    )
    assert half.s_mbu_paper == pytest.approx(got.s_mbu_paper / 2)


def test_hooks_in_transformers_hear_the_same(checkpoint: Path, uneven: Trace) -> None:
    """Two probes of two implementations, in other passes, on the same ids."""
    from transformers import AutoModelForCausalLM

    from workers.engines import transformers_probe

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
    told = transformers_probe.trace(model, MIXED, UNEVEN, routes=True)
    assert told.tokens == uneven.tokens
    assert (told.layers, told.top_k) == (uneven.layers, uneven.top_k)
    np.testing.assert_array_equal(told.prefill, uneven.prefill)
    np.testing.assert_array_equal(told.decode, uneven.decode)
    assert told.routes is not None and uneven.routes is not None
    for left, right in zip(told.routes, uneven.routes, strict=True):
        np.testing.assert_array_equal(np.sort(left, axis=-1), np.sort(right, axis=-1))


def _routers(engine: VllmEngine) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    worker = engine._vllm.llm.llm_engine.model_executor.driver_worker.worker
    modules = worker.get_model().modules()
    return [one.router for one in modules if isinstance(one, MoERunner)]


def test_a_trace_is_what_generate_does_and_leaves_nothing_behind(
    engine: VllmEngine, trace: Trace
) -> None:
    assert trace.routes is not None
    worker = engine._vllm.llm.llm_engine.model_executor.driver_worker.worker
    seen: list[bool] = []
    step = engine._vllm.engine.step

    def watched() -> Any:
        seen.append(all(one.capture_fn is not None for one in _routers(engine)))
        return step()

    def bare() -> bool:
        return (
            all(one.capture_fn is None for one in _routers(engine))
            and "execute_model" not in vars(worker.model_runner)
            and worker.probe is None
        )

    engine._vllm.engine.step = watched
    try:
        again = engine.trace(MIXED, OUTPUT)
        assert all(seen) and len(seen) == len(trace.steps)
        assert bare()
        seen.clear()
        one = engine.generate(MIXED, OUTPUT, kind="timed", repeat=0)
        assert not any(seen) and len(seen) == len(one.step_s) == len(trace.steps)
    finally:
        engine._vllm.engine.step = step
    assert again.routes is None
    assert again.tokens == trace.tokens
    for left, right in zip(again.steps, trace.steps, strict=True):
        np.testing.assert_array_equal(left.prefill, right.prefill)
        np.testing.assert_array_equal(left.decode, right.decode)


def test_a_layer_that_is_not_heard_ends_the_trace_and_not_the_engine(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = _routers(engine)[-1]
    monkeypatch.setattr(router, "set_capture_fn", lambda function: None)
    with pytest.raises(Unsupported, match=r"1 of \d MoE layers were not heard"):
        engine.trace(MIXED, 2)
    monkeypatch.undo()
    assert all(one.capture_fn is None for one in _routers(engine))
    assert engine.trace(MIXED, 2).decode.sum() > 0


def test_it_follows_a_change_of_top_k(checkpoint: Path, engine: VllmEngine) -> None:
    trial = _trial(checkpoint)
    try:
        assert engine.become(replace(trial, model=replace(trial.model, top_k=3)))
        trace = engine.trace(MIXED, OUTPUT, routes=True)
        assert trace.top_k == 3
        assert trace.routes is not None and {one.shape[2] for one in trace.routes} == {3}
        _check(trace, _expected(checkpoint, trace, top_k=3))
    finally:
        assert engine.become(trial)


def test_drafts_are_refused_before_anything_runs(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine._vllm.engine.vllm_config
    monkeypatch.setattr(config, "speculative_config", object())
    with pytest.raises(Unsupported, match="drafts"):
        engine.trace(MIXED, OUTPUT)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.slow) for name in FAMILIES],
    indirect=True,
)
def test_in_bfloat16_only_experts_that_are_almost_level_change_places(
    checkpoint: Path, engine: VllmEngine, tmp_path: Path
) -> None:
    engine.close()  # the last test that needs it
    other = _engine(_trial(checkpoint, dtype="bfloat16"), tmp_path)
    try:
        trace = other.trace(MIXED, OUTPUT, routes=True)
    finally:
        other.close()
    assert trace.routes is not None
    differ, choices = 0, 0
    for ids, new, route in zip(MIXED, trace.tokens, trace.routes, strict=True):
        told = [*ids, *new[:-1]]
        logits = _logits(checkpoint, told, dtype="bfloat16")
        error = np.abs(logits - _logits(checkpoint, told))
        level = 4 * np.median(error, axis=(1, 2)) / 0.6745  # of a normal error, 4 deviations
        took = np.sort(route.transpose(1, 0, 2).astype(np.int64), axis=-1)
        parts = (took != _chosen(logits, 2)).any(axis=-1)
        for layer, token in zip(*np.nonzero(parts), strict=True):
            one = logits[layer, token]
            behind = np.sort(one)[-2] - one[took[layer, token]].min()
            assert behind <= level[layer] or parts[:layer, : token + 1].any()
        differ += int(parts.sum())
        choices += parts.size
    assert differ <= 0.03 * choices


@pytest.mark.alone
@pytest.mark.parametrize(
    "family",  # one by default, with a dense layer and a shared expert; the order is FAMILIES'
    [
        pytest.param(name, marks=[] if name == "qwen2_moe" else pytest.mark.slow)
        for name in FAMILIES
    ],
    indirect=True,
)
def test_two_tensor_ranks_count_what_one_counts(
    checkpoint: Path, engine: VllmEngine, uneven: Trace, tmp_path: Path
) -> None:
    engine.close()
    ranks = _engine(_trial(checkpoint, layout=Layout(tensor=2)), tmp_path)
    try:
        trace = ranks.trace(MIXED, UNEVEN, routes=True)
        after = ranks.generate(MIXED, OUTPUT, kind="timed", repeat=0)
    finally:
        ranks.close()
    assert len(after.token_s) == len(MIXED)
    expected = _expected(checkpoint, trace)
    _check(trace, expected)
    assert trace.routes is not None
    for route, choices in zip(trace.routes, expected, strict=True):
        np.testing.assert_array_equal(np.sort(route, axis=-1).transpose(1, 0, 2), choices)
    assert (trace.layers, trace.tokens) == (uneven.layers, uneven.tokens)
    for two, one in zip(trace.steps, uneven.steps, strict=True):
        np.testing.assert_array_equal(two.prefill, one.prefill)
        np.testing.assert_array_equal(two.decode, one.decode)


@pytest.mark.slow
def test_olmoe_against_hooks_in_transformers(tmp_path: Path) -> None:
    """DeepSeek-V2 is not here: on CPUs with AMX vLLM 0.32 does not load MLA in float32."""
    from transformers import AutoModelForCausalLM

    from workers.engines import transformers_probe

    folder = _checkpoint("olmoe", tmp_path / "olmoe")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    told = transformers_probe.trace(model, MIXED, UNEVEN, routes=True)
    engine = _engine(_trial(folder), tmp_path)
    try:
        trace = engine.trace(MIXED, UNEVEN, routes=True)
    finally:
        engine.close()
    assert (told.layers, told.tokens) == (trace.layers, trace.tokens)
    np.testing.assert_array_equal(told.prefill, trace.prefill)
    np.testing.assert_array_equal(told.decode, trace.decode)
    assert told.routes is not None and trace.routes is not None
    for left, right in zip(told.routes, trace.routes, strict=True):
        np.testing.assert_array_equal(np.sort(left, axis=-1), np.sort(right, axis=-1))


@pytest.mark.slow
def test_every_pipeline_stage_counts_its_own_layers(tmp_path: Path) -> None:
    """Compiled, since vLLM 0.32's eager CPU engine fails in the second stage's first pass: what
    that stage receives into is made by the warm-up, which an eager CPU engine leaves out."""
    checkpoint = _checkpoint("mixtral", tmp_path / "mixtral")
    engine = _engine(_trial(checkpoint, eager=False, layout=Layout(pipeline=2)), tmp_path)
    try:
        trace = engine.trace(MIXED, OUTPUT, routes=True)
    finally:
        engine.close()
    expected = _expected(checkpoint, trace)
    assert trace.layers == MOE_LAYERS["mixtral"]
    _check(trace, expected)
    assert trace.routes is not None
    for route, choices in zip(trace.routes, expected, strict=True):
        np.testing.assert_array_equal(np.sort(route, axis=-1).transpose(1, 0, 2), choices)


@pytest.mark.slow
def test_compiled_code_that_holds_its_routers_is_passed_by(tmp_path: Path) -> None:
    checkpoint = _checkpoint("mixtral", tmp_path / "mixtral")
    engine = _engine(_trial(checkpoint, eager=False), tmp_path)
    try:
        worker = engine._vllm.llm.llm_engine.model_executor.driver_worker.worker
        compiled = worker.get_model().model
        assert compiled.do_not_compile is False
        trace = engine.trace(MIXED, OUTPUT)
        assert compiled.do_not_compile is False
    finally:
        engine.close()
    _check(trace, _expected(checkpoint, trace))


def test_two_stages_are_put_together_by_their_layers() -> None:
    """By hand, for the cases that no engine is asked for."""
    from workers.engines.vllm_probe import Account, Seen

    rng = np.random.default_rng(0)

    def stage(layers: tuple[int, ...], seconds: float) -> Account:
        routes = rng.integers(0, EXPERTS, (4, len(layers), 2)).astype(np.int16)
        one = Seen(
            requests=("8-aa", "7-bb"),
            new=np.array([1, 3]),
            context=np.array([5, 0]),
            decoding=np.array([True, False]),
            prefill=_tally(routes[1:].transpose(1, 0, 2).astype(np.int64)),
            decode=_tally(routes[:1].transpose(1, 0, 2).astype(np.int64)),
            routes=routes,
            seconds=seconds,
        )
        return Account(layers=layers, steps=(one,), failure=None)

    late, early = stage((4,), 0.5), stage((1, 2), 0.25)
    done = Done(
        started_at=0.0,
        places={"7": 0, "8": 1},
        stamps=[[], []],
        tokens=[[1], [2, 3]],
        steps=[],
        preempted=0,
        drafted=None,
    )
    trace = trace_of([late, None, early], done, top_k=2, lengths=[3, 6])
    assert (trace.layers, trace.tokens) == ((1, 2, 4), ((1,), (2, 3)))
    (step,) = trace.steps
    assert step.request.tolist() == [1, 0]
    assert step.seconds == 0.5
    np.testing.assert_array_equal(step.prefill[:2], early.steps[0].prefill)
    np.testing.assert_array_equal(step.decode[2:], late.steps[0].decode)
    assert trace.routes is not None
    first, second = trace.routes
    assert early.steps[0].routes is not None and late.steps[0].routes is not None
    np.testing.assert_array_equal(first[:, :2], early.steps[0].routes[1:])
    np.testing.assert_array_equal(second[5, 2:], late.steps[0].routes[0])
    assert (second[:5] == -1).all()
    with pytest.raises(Unsupported, match="passes"):
        trace_of([late, replace(early, steps=())], done, top_k=2, lengths=None)
    with pytest.raises(Unsupported, match="silence"):
        trace_of([late, replace(early, failure="silence")], done, top_k=2, lengths=None)


def test_the_roofline_has_no_routing_to_trace(tmp_path: Path) -> None:
    model = Model(name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2)
    trial = Trial(model=model, workload=LARGEST, engine=EngineSettings(kind="roofline"))
    engine = RooflineEngine(trial, [LARGEST], Site(scratch=tmp_path, device="cpu"))
    with pytest.raises(Unsupported, match="routes no tokens"):
        engine.trace(MIXED, OUTPUT)
