"""What every engine promises, on the real thing.

An engine kind joins by one line in `KINDS`. One engine is built per module; the tests that
need one of their own build it after the shared one is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from workers import memory
from workers.contract.engine import EngineKind, EngineSettings
from workers.contract.errors import OutOfMemory, TrialError, Unsupported
from workers.contract.measure import Measure
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Engine, Site, engine_class
from workers.moe.architecture import resolve
from workers.prompts import random_ids

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

KINDS: tuple[EngineKind, ...] = ("vllm", "roofline")
MODEL = Model(
    name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584, top_k=2
)
WORKLOAD = Workload(batch_size=3, input_tokens=20, output_tokens=6)


def _trial(kind: EngineKind, **engine: object) -> Trial:
    settings = EngineSettings(kind=kind, eager=True, **engine)  # type: ignore[arg-type]
    return Trial(model=MODEL, workload=WORKLOAD, engine=settings)


def _site(folder: Path) -> Site:
    return Site(scratch=folder, device="cpu")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> EngineKind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def engine(kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    trial = _trial(kind, memory_limit_gib=1.0)
    built = engine_class(kind)(trial, [WORKLOAD], _site(tmp_path_factory.mktemp("scratch")))
    yield built
    built.close()


def test_it_runs_the_structure_that_was_asked_for(engine: Engine) -> None:
    asked = resolve(MODEL)
    assert asked is not None
    runs = engine.loaded.architecture
    for name in ("hidden_size", "ffn_dim", "num_experts", "top_k", "num_layers", "params_total"):
        assert getattr(runs, name) == getattr(asked, name), name
    assert engine.loaded.version


@pytest.mark.parametrize("output_tokens", [1, 6])
def test_lengths_are_exact_and_stamps_are_in_order(engine: Engine, output_tokens: int) -> None:
    prompts = random_ids(WORKLOAD, vocab_size=engine.loaded.architecture.vocab_size, index=0)
    one = engine.generate(prompts, output_tokens, kind="timed", repeat=4)
    assert (one.kind, one.repeat, one.batch_size, one.input_tokens) == ("timed", 4, 3, 20)
    assert [len(row) for row in one.token_s] == [output_tokens] * 3
    assert all(0 < early < late for row in one.token_s for early, late in pairwise(row))
    assert one.e2e_s == max(row[-1] for row in one.token_s)
    assert list(one.step_s) == sorted(one.step_s)
    assert len(one.step_s) >= output_tokens


def test_a_smaller_batch_than_it_was_built_for(engine: Engine) -> None:
    one = engine.generate([[5, 6, 7]], 2, kind="timed", repeat=0)
    assert one.batch_size == 1
    assert one.output_tokens == 2


def test_memory_is_that_of_the_structure(engine: Engine) -> None:
    used = engine.memory()
    total = engine.loaded.architecture.params_total
    assert total is not None and used.weights is not None
    assert total * 2 <= used.weights <= total * 2 * 1.05  # the vocabulary is padded
    a = engine.loaded.architecture
    assert used.kv_cache is not None
    assert used.kv_cache >= 3 * WORKLOAD.tokens_per_request * a.kv_values_per_token * 2
    assert used.peak is not None and used.peak >= used.weights
    assert used.limit == 2**30


def test_the_reference_load_shows_the_machine_and_leaves_no_trace_in_memory(
    engine: Engine, kind: EngineKind
) -> None:
    """Under a memory limit of 1 GiB, of which it must take nothing."""
    before = engine.memory()
    first, second = engine.reference(), engine.reference()
    if kind == "roofline":
        assert first is second is None
        return
    assert first is not None
    assert second is not None
    for one in (first.bandwidth_gb_s, second.bandwidth_gb_s):
        assert 0.1 < one.median < 10_000
    for one in (first.tflops, second.tflops):
        assert 0.0001 < one.median < 1000
        assert one.spread >= 0
    after = engine.memory()
    assert after.peak - before.peak < 16 * 2**20  # buffers of the multiplication


def test_closing_twice_is_allowed_and_a_new_engine_can_be_built(
    kind: EngineKind, engine: Engine, tmp_path: Path
) -> None:
    engine.close()
    engine.close()
    trial = replace(_trial(kind), model=replace(MODEL, top_k=1))
    other = engine_class(kind)(trial, [WORKLOAD], _site(tmp_path))
    try:
        assert other.loaded.architecture.top_k == 1
        assert other.generate([[5] * 20], 3, kind="timed", repeat=0).output_tokens == 3
    finally:
        other.close()


def test_a_model_that_does_not_fit_runs_out_of_memory_and_leaves_none_behind(
    kind: EngineKind, tmp_path: Path
) -> None:
    memory.trim()
    before = memory.status("VmRSS")
    large = Model(name="mixtral-8x7b", weights="dummy", scale=0.125, num_layers=4, num_experts=64)
    trial = replace(_trial(kind, memory_limit_gib=0.15), model=large)
    with pytest.raises(OutOfMemory) as caught:
        engine_class(kind)(trial, [WORKLOAD], _site(tmp_path))
    assert (caught.value.stage, caught.value.scope) == ("load", "device")
    assert caught.value.requested_bytes is not None
    if kind == "vllm":
        assert caught.value.requested_bytes == 64 * 2 * 512 * 1792 * 2  # gate and up of a layer
    memory.trim()
    assert memory.status("VmRSS") - before < 64 * 2**20
    assert memory.headroom() is None


def test_arguments_that_the_engine_does_not_know_are_unsupported(tmp_path: Path) -> None:
    trial = _trial("vllm", args={"no_such_argument": 1})
    with pytest.raises(Unsupported, match="no_such_argument"):
        engine_class("vllm")(trial, [WORKLOAD], _site(tmp_path))


def test_a_cache_too_small_for_one_request_is_out_of_memory(
    kind: EngineKind, tmp_path: Path
) -> None:
    trial = _trial(kind, args={"kv_cache_memory_bytes": 1000})
    with pytest.raises(OutOfMemory) as caught:
        engine_class(kind)(trial, [WORKLOAD], _site(tmp_path))
    assert (caught.value.stage, caught.value.scope) == ("kv_cache", "device")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": Measure(energy=True)}, "measure.energy"),
        ({"workload": Workload(arrivals="poisson")}, "workload.arrivals"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_built(
    kind: EngineKind, change: dict[str, object], words: str
) -> None:
    refused = engine_class(kind).refuses(replace(_trial(kind), **change))  # type: ignore[arg-type]
    assert refused is not None and words in refused
    assert engine_class(kind).refuses(_trial(kind)) is None


def test_a_checkpoint_keeps_the_shape_it_has() -> None:
    changed = replace(_trial("vllm"), model=Model(name="mixtral-8x7b", num_experts=4))
    assert "checkpoint's weights" in (engine_class("vllm").refuses(changed) or "")


def test_kinds_that_are_not_there_are_unsupported() -> None:
    with pytest.raises(TrialError, match=r"engine\.kind endpoint is not available"):
        engine_class("endpoint")
