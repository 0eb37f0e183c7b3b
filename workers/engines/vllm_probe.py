"""Reads the experts that vLLM's routers choose, in the process that holds the model.

Each router calls a function of ours with the ids it has chosen (`set_capture_fn`). It writes
them into a buffer made beforehand, MoE layers × tokens × top-k; after the model runner's
forward pass the rows of the scheduled tokens are counted and the next pass overwrites them.
Which request a row belongs to is the order of the model runner's own batch; how many tokens
each has, and how many it had, is the scheduler's own output. What is padding has no request.

Tensor-parallel ranks see the same tokens and make the same choice, with expert parallelism
too (its ranks differ in the experts that they hold, not in the tokens that they route), so
the first of them counts. A pipeline stage counts its own layers.

vLLM has `enable_return_routed_experts`, which ends in the same function of the same routers.
It is not used: it is an argument of the engine, so timed passes would carry it, and it asks
for prefix caching, which they must not have; it is refused by model runner V1 (so on every
CPU engine) and with pipeline stages; and it answers per request, when that has ended, from
which neither passes nor their times can be told.

The function is Python, so it runs only where the router's Python does:

- A CUDA graph that is replayed runs none. While the probe is in, the model runner is told
  that no graph is captured, by the flag that it asks before every pass
  (`CudagraphDispatcher.keys_initialized` in V1, `CudaGraphManager._graphs_captured` in V2).
  It then runs the same kernels without replay and without padding. The graphs stay in
  memory and are used again afterwards.
- Compiled code calls the MoE layer as an operator on CUDA, so the function runs. On CPU the
  layer is compiled into its surroundings, so the model's own code runs instead, by the flag
  that vLLM's decorator asks before every pass (`do_not_compile`). Rounding then differs from
  that of the compiled passes, and with it a choice between experts that are almost level.

Every layer has to speak exactly once in every pass, for all its tokens, or the trace is
given up with the reason: silence is never taken for zeros.

On a GPU nothing of this has been run so far: the flags, the order of the V2 model runner's
batch and the copy to the host were read in vLLM 0.32's sources, which both builds share.
Kernels that route inside themselves, drafts and prompts cut over ranks are refused. Of several
replicas each counts the tokens that it was sent, which its router sees before they are exchanged.
Where that is otherwise it is refused: with experts spread over tensor-parallel ranks of several
replicas each rank routes a part of the tokens (`use_sequence_parallel_moe`), and some quantised
layers exchange tokens before they are routed (`do_naive_dispatch_combine`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from workers.contract.trace import Counts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """One forward pass as one rank saw it; requests by vLLM's names."""

    requests: tuple[str, ...]
    new: NDArray[np.int64]
    context: NDArray[np.int64]
    decoding: NDArray[np.bool_]
    prefill: Counts
    decode: Counts
    routes: NDArray[np.int16] | None
    """Tokens × this rank's MoE layers × top-k."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Account:
    """All that one rank saw."""

    layers: tuple[int, ...]
    steps: tuple[Seen, ...]
    failure: str | None
    """Why it stopped counting."""


@dataclass(kw_only=True, slots=True, eq=False)
class Probe:
    """In place from `install` to `remove`."""

    runner: Any
    """vLLM's model runner, V1 or V2."""
    layers: list[MoERunner]
    num_experts: int
    routes: bool
    buffer: torch.Tensor
    """MoE layers × most tokens of a pass × top-k."""
    steps: list[Seen] = field(default_factory=list)
    failure: str | None = None
    _rows: list[int | None] = field(default_factory=list)
    """Per layer, the tokens that it has spoken for in this pass, null before it has; empty between
    passes."""
    _prompts: dict[str, int] = field(default_factory=dict)
    """Prompt tokens of every request met."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def build(cls, runner: Any, *, num_experts: int, top_k: int, routes: bool) -> Probe | str:
        """A probe that is not in place yet; where there can be none, the reason."""
        model, config = runner.get_model(), runner.vllm_config
        if reason := _refused(config):
            return reason
        layers = sorted(
            (one for one in model.modules() if isinstance(one, MoERunner)),
            key=lambda layer: layer.layer_id,
        )
        for layer in layers:
            if reason := _unheard(layer):
                return f"{layer.layer_name}: {reason}"
        tokens = config.scheduler_config.max_num_batched_tokens
        return cls(
            runner=runner,
            layers=layers,
            num_experts=num_experts,
            routes=routes,
            buffer=torch.zeros(
                (len(layers), tokens, top_k), dtype=torch.int16, device=runner.device
            ),
        )

    @property
    def counts(self) -> bool:
        """Whether this rank does; a pipeline stage may have no MoE layer."""
        return bool(self.layers) and get_tp_group().rank_in_group == 0

    def install(self) -> None:
        """Every pass from now on runs as the probe needs it; the first tensor-parallel rank
        counts it. All ranks must do so: what one of them pads, all of them exchange."""
        for holder, flag, value in _switches(self.runner, self.layers):
            self._undo.append(partial(setattr, holder, flag, getattr(holder, flag)))
            setattr(holder, flag, value)
        if not self.counts:
            return
        for index, layer in enumerate(self.layers):
            self._undo.append(partial(layer.router.set_capture_fn, layer.router.capture_fn))
            layer.router.set_capture_fn(partial(self._capture, index))
        self._undo.append(partial(delattr, self.runner, "execute_model"))
        self.runner.execute_model = partial(self._execute, self.runner.execute_model)

    def remove(self) -> None:
        """Leaves everything as it was; may be called twice."""
        while self._undo:
            self._undo.pop()()

    def account(self) -> Account | None:
        """What was seen; null on a rank that does not count."""
        if not self.counts:
            return None
        return Account(
            layers=tuple(one.layer_id for one in self.layers),
            steps=tuple(self.steps),
            failure=self.failure,
        )

    def _capture(self, index: int, ids: torch.Tensor) -> None:
        """Of a router: the experts of every token of the pass, tokens × top-k."""
        if not self._rows:
            return  # a dummy token, fed while another replica is not done
        if self._rows[index] is not None or ids.shape[1] != self.buffer.shape[2]:
            self._fail(f"{self.layers[index].layer_name} chose {tuple(ids.shape)} out of turn")
            return
        rows = min(len(ids), self.buffer.shape[1])
        self._rows[index] = rows
        self.buffer[index, :rows].copy_(ids[:rows])

    def _execute(self, execute: Callable[..., Any], scheduled: Any, *args: Any, **kw: Any) -> Any:
        """The model runner's forward pass, and then the count of what it chose."""
        self._rows = [None] * len(self.layers)
        began = time.perf_counter()
        result = execute(scheduled, *args, **kw)
        if (
            self.failure is None
            and scheduled.total_num_scheduled_tokens
            and not kw.get("dummy_run")
        ):
            self._count(scheduled, began)
        self._rows = []
        return result

    def _count(self, scheduled: Any, began: float) -> None:
        total = scheduled.total_num_scheduled_tokens
        if short := [rows for rows in self._rows if rows is None or rows < total]:
            self._fail(f"{len(short)} of {len(self.layers)} MoE layers were not heard in a pass")
            return
        ids = self.buffer[:, :total].cpu().numpy()  # waits for the device
        seconds = time.perf_counter() - began
        if not 0 <= ids.min() <= ids.max() < self.num_experts:
            self._fail(f"experts {ids.min()} to {ids.max()} of {self.num_experts} were chosen")
            return
        requests = _order(self.runner)
        new = np.array([scheduled.num_scheduled_tokens[one] for one in requests], dtype=np.int64)
        if new.sum() != total:
            self._fail(f"the batch of {new.sum()} tokens is not the {total} that were scheduled")
            return
        before = self._before(scheduled)
        context = np.array([before[one] for one in requests], dtype=np.int64)
        prompts = np.array([self._prompts[one] for one in requests], dtype=np.int64)
        decoding = (context >= prompts) & (new == 1)
        rows = np.repeat(decoding, new)
        self.steps.append(
            Seen(
                requests=requests,
                new=new,
                context=context,
                decoding=decoding,
                prefill=_tally(ids[:, ~rows], self.num_experts),
                decode=_tally(ids[:, rows], self.num_experts),
                routes=ids.transpose(1, 0, 2).copy() if self.routes else None,
                seconds=seconds,
            )
        )

    def _before(self, scheduled: Any) -> dict[str, int]:
        """Tokens computed before the pass, of every request in it."""
        for one in scheduled.scheduled_new_reqs:
            self._prompts[one.req_id] = len(one.prompt_token_ids)
        cached = scheduled.scheduled_cached_reqs
        return {one.req_id: one.num_computed_tokens for one in scheduled.scheduled_new_reqs} | dict(
            zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        )

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason


def _refused(config: Any) -> str | None:
    parallel = config.parallel_config
    if config.speculative_config is not None:
        return "drafts, whose rejected tokens choose experts too"
    if parallel.prefill_context_parallel_size > 1:
        return "prompts cut over ranks"
    if parallel.use_ubatching:
        return "passes cut into microbatches"
    return None


def _unheard(layer: MoERunner) -> str | None:
    """Why the function of a layer's router would not be told of this replica's tokens, all of
    them and no others."""
    if not isinstance(layer.router, BaseRouter) or layer.is_monolithic:
        return "experts are chosen inside the kernel"
    if layer.moe_config.is_sequence_parallel:
        return "tokens are cut over tensor-parallel ranks before their experts are chosen"
    if layer.do_naive_dispatch_combine:
        return "experts are chosen for the tokens of all replicas together"
    return None


def _switches(runner: Any, layers: list[MoERunner]) -> list[tuple[Any, str, bool]]:
    """Flags that have the routers' Python run in every pass, as (object, name, value)."""
    found: list[tuple[Any, str, bool]] = []
    for name, flag in (
        ("cudagraph_dispatcher", "keys_initialized"),
        ("cudagraph_manager", "_graphs_captured"),
    ):
        holder = getattr(runner, name, None)
        if holder is not None and hasattr(holder, flag):
            found.append((holder, flag, False))
    if any(not isinstance(one._forward_entry, torch._ops.OpOverloadPacket) for one in layers):
        found += [
            (module, "do_not_compile", True)
            for module in runner.get_model().modules()
            if hasattr(module, "do_not_compile")
        ]
    return found


def _order(runner: Any) -> tuple[str, ...]:
    """Requests of the pass that has just run, in the order of their tokens."""
    batch = getattr(runner, "input_batch", None)  # V1 keeps one
    if batch is None:
        batch = runner.execute_model_state.input_batch  # V2 makes one for every pass
    return tuple(batch.req_ids)


def _tally(ids: NDArray[np.int16], num_experts: int) -> Counts:
    """Layers × tokens × top-k to layers × experts."""
    layers = len(ids)
    first = np.arange(layers, dtype=np.int64)[:, None, None] * num_experts
    flat = (ids + first).ravel()
    counts: Counts = np.bincount(flat, minlength=layers * num_experts).astype(np.int64)
    return counts.reshape(layers, num_experts)
