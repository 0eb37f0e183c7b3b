"""What is read of vLLM's second model runner, which runs on CUDA alone, from a stand-in for it.

The stand-in has what `vllm/v1/worker/gpu/model_runner.py` has under the same names; that the names
are there is looked up in the source of the vLLM in hand.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from workers.contract.errors import Unsupported
from workers.engines.vllm_stepper import Done, trace_of

pytestmark = [pytest.mark.engine]

EXPERTS, TOP_K = 4, 2


@dataclass
class _Layer:
    """As `MoERunner`, without its kernels."""

    layer_id: int
    router: Any = field(default_factory=lambda: SimpleNamespace(capture_fn=None))
    layer_name: str = "model.layers.0.mlp.experts"
    _forward_entry: Any = None

    def __post_init__(self) -> None:
        self.router.set_capture_fn = lambda function: setattr(self.router, "capture_fn", function)
        self._forward_entry = torch.ops.aten.add  # an operator, as on CUDA


class _SecondRunner:
    """Runs a pass of the routers alone. Its batch is in an order of its own."""

    def __init__(self, layers: list[_Layer], share: float = 1.0) -> None:
        self.cudagraph_manager = SimpleNamespace(_graphs_captured=True)
        self.execute_model_state: Any = None
        self.layers, self.share = layers, share
        self.replayed: list[bool] = []

    def execute_model(self, scheduled: Any, dummy_run: bool = False) -> None:
        tokens = scheduled.total_num_scheduled_tokens
        self.replayed.append(self.cudagraph_manager._graphs_captured)
        self.execute_model_state = SimpleNamespace(
            input_batch=SimpleNamespace(req_ids=sorted(scheduled.num_scheduled_tokens))
        )
        for layer in self.layers:
            ids = torch.arange(int(tokens * self.share) * TOP_K).reshape(-1, TOP_K) % EXPERTS
            if layer.router.capture_fn is not None:
                layer.router.capture_fn(ids)


def _scheduled(**tokens: int) -> Any:
    new = [
        SimpleNamespace(req_id=one, prompt_token_ids=[1] * 3, num_computed_tokens=0)
        for one in tokens
    ]
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
    )


def _probe(runner: _SecondRunner, monkeypatch: pytest.MonkeyPatch) -> Any:
    from workers.engines import vllm_probe

    monkeypatch.setattr(vllm_probe, "get_tp_group", lambda: SimpleNamespace(rank_in_group=0))
    return vllm_probe.Probe(
        runner=runner,
        layers=runner.layers,  # type: ignore[arg-type]
        num_experts=EXPERTS,
        routes=True,
        buffer=torch.zeros((len(runner.layers), 16, TOP_K), dtype=torch.int16),
    )


DONE = Done(
    started_at=0.0,
    places={"a": 0, "b": 1},
    stamps=[[], []],
    tokens=[[1], [2]],
    steps=[],
    preempted=0,
    drafted=None,
)


def test_it_is_probed_without_graphs_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _SecondRunner([_Layer(0), _Layer(2)])
    probe = _probe(runner, monkeypatch)
    probe.install()
    runner.execute_model(_scheduled(b=2, a=3))
    runner.execute_model(_scheduled(_dummy=1), dummy_run=True)  # another replica is not done
    account = probe.account()
    probe.remove()
    runner.execute_model(_scheduled(a=1))
    assert runner.replayed == [False, False, True]
    assert "execute_model" not in vars(runner)
    assert all(layer.router.capture_fn is None for layer in runner.layers)

    trace = trace_of([account], DONE, top_k=TOP_K, lengths=None)
    (step,) = trace.steps
    assert trace.layers == (0, 2)
    assert (step.request.tolist(), step.new.tolist()) == ([0, 1], [3, 2])
    assert step.prefill.tolist() == [[3, 3, 2, 2]] * 2


def test_tokens_that_are_cut_over_ranks_leave_the_counts_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No crash: the trial is timed already."""
    runner = _SecondRunner([_Layer(0)], share=0.5)
    probe = _probe(runner, monkeypatch)
    probe.install()
    runner.execute_model(_scheduled(b=2, a=2))
    account = probe.account()
    probe.remove()
    with pytest.raises(Unsupported, match="1 of 1 MoE layers were not heard"):
        trace_of([account], DONE, top_k=TOP_K, lengths=None)


@pytest.mark.parametrize(
    ("cut", "dispatched", "reason"),
    [
        (False, False, None),
        (True, True, "cut over tensor-parallel ranks"),
        (False, True, "tokens of all replicas together"),
    ],
)
def test_layers_that_route_other_tokens_are_refused_beforehand(
    cut: bool, dispatched: bool, reason: str | None
) -> None:
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    from workers.engines.vllm_probe import _unheard

    layer: Any = SimpleNamespace(
        router=object.__new__(FusedTopKRouter),
        is_monolithic=False,
        moe_config=SimpleNamespace(is_sequence_parallel=cut),
        do_naive_dispatch_combine=dispatched,
    )
    said = _unheard(layer)
    assert said is None if reason is None else said is not None and reason in said


def test_a_draft_s_weights_are_counted_and_what_it_shares_once() -> None:
    from workers.engines.vllm_worker import Report

    target = nn.ModuleDict({"embedding": nn.Embedding(100, 8), "layer": nn.Linear(8, 8)})
    draft = nn.ModuleDict({"embedding": target["embedding"], "layer": nn.Linear(8, 4)})

    class Rank(Report):
        device = torch.device("cpu")
        idle_bytes = 0

    def weights(drafting: nn.Module | None) -> int:
        rank = Rank()
        rank.model_runner = SimpleNamespace(
            get_model=lambda: target,
            get_draft_model=lambda: drafting,
            kv_caches=[torch.zeros(4)],  # no `drafter`: the second runner has a `speculator`
        )
        return rank.report_memory()["weights"]

    assert weights(None) == 4 * (800 + 64 + 8)
    assert weights(draft) == 4 * (800 + 64 + 8 + 32 + 4)


def test_the_names_are_those_of_the_vllm_in_hand() -> None:
    """Read, not imported: the module needs Triton."""
    import vllm

    worker = Path(vllm.__file__).parent / "v1" / "worker"
    for source, names in (
        ("gpu/model_runner.py", {"get_model", "get_draft_model", "execute_model", "_dummy_run"}),
        ("gpu_model_runner.py", {"get_model", "get_draft_model", "execute_model", "_dummy_run"}),
    ):
        tree = ast.parse((worker / source).read_text())
        (runner,) = (
            one
            for one in tree.body
            if isinstance(one, ast.ClassDef) and one.name == "GPUModelRunner"
        )
        defined = {one.name for one in runner.body if isinstance(one, ast.FunctionDef)}
        assert names <= defined
    second = (worker / "gpu" / "model_runner.py").read_text()
    for name in (
        "self.execute_model_state",
        "self.cudagraph_manager",
        "self.kv_caches",
        "dummy_run",
    ):
        assert name in second
    assert "self._graphs_captured" in (worker / "gpu" / "cudagraph_utils.py").read_text()
