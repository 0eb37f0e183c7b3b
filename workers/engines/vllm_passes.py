"""Which calls of a vLLM's `step()` end a forward pass, and how replicas keep step.

One call is not one pass. With a queue of batches in flight, which vLLM 0.32 has under asynchronous
scheduling (its default on CUDA) and with pipeline stages, the first call only begins a pass, the
last only waits for one, and between them a call may find nothing to schedule
(`EngineCore.step_with_batch_queue`). What tells is the engine core itself: it hands every pass to
`Executor.execute_model` when it begins and to `Scheduler.update_from_output` when it has ended,
with the number of tokens in it, which is 0 where no model runs. Both are listened to here.

Replicas that share experts exchange tokens in every pass, so each must run as many as the others;
one that has nothing to run feeds a dummy token. vLLM's own loop for one process
(`LLMEngine.has_unfinished_requests`) lets a replica without requests run a dummy per call of the
others, more than they run passes, and its last exchange waits for ever. Here replicas agree at the
moment at which a pass would begin, once per call, by one small all-reduce (gloo, over loopback):
if any begins one, those that do not run a dummy, after what their own call has ended is stamped; if
none does, none runs. vLLM's server runs a dummy in every call without a pass (`DPEngineCoreProc`),
which would double the passes of pipelines that are not full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

_DONE, _WAITS, _RUNS = range(3)
"""What a replica says of its call: no request is left; none can be scheduled; a pass begins. The
largest word of all counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What one call of `step()` did."""

    outputs: list[Any]
    """vLLM's `RequestOutput`s."""
    clock_s: float
    """`time.perf_counter` when it returned."""
    ended: bool
    """Whether it took in the result of a forward pass."""
    preempted: int
    """Requests that were put back before that pass, for want of KV cache."""


class Passes:
    """Steps an engine of this process.

    Args:
        engine: vLLM's `LLMEngine`, whose engine core runs in this process.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        core = engine.engine_core.engine_core
        self._group: torch.distributed.ProcessGroup | None = engine.dp_group
        self._agreed: int | None = None
        self._began = self._ended = False
        self._preempted = 0
        core.model_executor.execute_model = partial(self._begin, core.model_executor.execute_model)
        core.scheduler.update_from_output = partial(self._end, core.scheduler.update_from_output)

    def calls(self) -> Iterator[Call]:
        """Calls `step()` until no request is left, here and in the other replicas."""
        engine = self._engine
        while (waiting := engine.get_num_unfinished_requests() > 0) or self._group is not None:
            self._agreed, self._began, self._ended, self._preempted = None, False, False, 0
            outputs = engine.step() if waiting else []
            yield Call(
                outputs=outputs,
                clock_s=time.perf_counter(),
                ended=self._ended,
                preempted=self._preempted,
            )
            agreed = self._agree(_WAITS if waiting else _DONE)
            if agreed == _DONE:
                return
            if agreed == _RUNS and not self._began:
                engine.engine_core.execute_dummy_batch()

    def _begin(self, execute: Callable[..., Any], scheduled: Any, *args: Any, **kw: Any) -> Any:
        """The executor's `execute_model`."""
        self._began = scheduled.total_num_scheduled_tokens > 0
        self._agree(_RUNS if self._began else _WAITS)
        return execute(scheduled, *args, **kw)

    def _end(self, update: Callable[..., Any], scheduled: Any, *args: Any, **kw: Any) -> Any:
        """The scheduler's `update_from_output`."""
        self._ended |= scheduled.total_num_scheduled_tokens > 0
        self._preempted += len(scheduled.preempted_req_ids or ())
        return update(scheduled, *args, **kw)

    def _agree(self, word: int) -> int:
        """The largest word that a replica said of this call; said once."""
        if self._agreed is None:
            if self._group is None:
                self._agreed = word
            else:
                said = torch.tensor([word], dtype=torch.int32)
                largest = torch.distributed.ReduceOp.MAX
                torch.distributed.all_reduce(said, op=largest, group=self._group)
                self._agreed = int(said.item())
        return self._agreed
