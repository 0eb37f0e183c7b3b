"""One vLLM in this process, stepped by hand.

All that touches a vLLM stands here, so that it can be used where the model is: in the engine's
own process, or in a process of each data-parallel replica (`vllm_replicas`). What such a process
cannot know, the engine tells it: the arguments to build from, and when a batch begins.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from workers import memory
from workers.contract.errors import Crashed, OutOfMemory, TrialError, Unsupported
from workers.contract.measurement import Drafted
from workers.contract.outcome import OomStage
from workers.contract.trace import Step, Trace
from workers.failures import explain

if TYPE_CHECKING:
    from workers.engines.vllm_probe import Account

_THREADS = re.compile(r"Resource temporarily unavailable|can't start new thread")
"""What is said when a thread cannot be made; under a memory limit, for want of a stack."""
_STACK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The moment at which a batch is sent, on two clocks."""

    unix_s: float
    clock_s: float
    """`time.perf_counter`, which all processes of a machine share on Linux."""


def now() -> Start:
    """This moment."""
    return Start(unix_s=time.time(), clock_s=time.perf_counter())


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What is sent at once."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    lengths: Sequence[int]
    """Tokens to generate, per prompt."""
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A batch that was sent and has answered; lists are in the order of its prompts."""

    started_at: float
    """Unix time, in seconds."""
    places: dict[str, int]
    """Our name of each request, and its position."""
    stamps: list[list[float]]
    """Of each token, in seconds since the first submission."""
    tokens: list[list[int]]
    """Ids of the generated tokens."""
    steps: list[float]
    """Stamp at the end of each forward pass."""
    preempted: int
    """Times that a request was put back for want of KV cache, to be computed anew."""
    drafted: Drafted | None
    """Null without speculative decoding."""


class Stepper:
    """A vLLM that this process holds.

    Args:
        args: of vLLM's `LLM`.
    """

    built: ClassVar[bool] = False
    """Whether this process has ever held one."""

    def __init__(self, args: dict[str, Any]) -> None:
        from vllm import LLM

        from workers.engines.vllm_passes import Passes

        Stepper.built = True
        self._ids = count()
        _spare_llvmlite()
        self.llm: Any = LLM(**args)
        self.engine: Any = self.llm.llm_engine
        self._passes: Any = Passes(self.engine)

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the model that it runs."""
        config: dict[str, Any] = self.engine.vllm_config.model_config.hf_config.to_dict()
        return config

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Answers of all ranks; see `vllm_worker.Report`."""
        answers: list[Any] = self.llm.collective_rpc(method, args=args)
        return answers

    def holds(self, tokens: int) -> int | None:
        """Requests of that many tokens each, output included, that the KV cache holds at once;
        null where there is no end to them."""
        from workers.engines.vllm_room import requests_held

        scheduler = self.engine.engine_core.engine_core.scheduler
        return requests_held(scheduler.kv_cache_config, self.engine.vllm_config, tokens)

    def send(self, batch: Batch, begin: Callable[[], Start] = now) -> Done:
        """Steps the engine from the first prompt to the last token of all.

        Args:
            batch: the prompts; none where this replica has no share of a small batch, and only
                keeps step with those that have.
            begin: called when everything is ready; returns when, and at what moment, the batch
                is taken to be sent.

        Raises:
            TrialError: a request ended early.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = {
            length: SamplingParams(
                temperature=batch.temperature,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            for length in set(batch.lengths)
        }
        engine = self.engine
        names = [f"{next(self._ids)}" for _ in batch.prompts]
        places = {name: place for place, name in enumerate(names)}
        stamps: list[list[float]] = [[] for _ in names]
        tokens: list[list[int]] = [[] for _ in names]
        steps: list[float] = []
        preempted = 0
        ended: list[Any] = []
        if engine.vllm_config.cache_config.enable_prefix_caching:  # asked for by the sweep
            engine.reset_prefix_cache()
        gc.collect()
        start = begin()
        for name, ids, length in zip(names, batch.prompts, batch.lengths, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, sampling[length])
        for call in self._passes.calls():
            stamp = call.clock_s - start.clock_s
            if call.ended:
                steps.append(stamp)
            preempted += call.preempted
            for output in call.outputs:
                new = output.outputs[0].token_ids
                place = _place(output.request_id, places)
                stamps[place].extend([stamp] * len(new))
                tokens[place].extend(new)
                if output.finished:
                    ended.append(output.outputs[0])
        for row, length in zip(stamps, batch.lengths, strict=True):
            if len(row) != length:
                raise Crashed(f"a request ended after {len(row)} of {length} tokens")
        return Done(
            started_at=start.unix_s,
            places=places,
            stamps=stamps,
            tokens=tokens,
            steps=steps,
            preempted=preempted,
            drafted=_drafted(ended) if engine.vllm_config.speculative_config else None,
        )

    def trace(
        self,
        batch: Batch,
        experts: int,
        top_k: int,
        routes: bool,
        begin: Callable[[], Start] = now,
    ) -> Trace:
        """`send` with every choice of experts counted.

        Raises:
            Unsupported: they cannot be counted, or counting broke off.
            TrialError: a request ended early.
        """
        try:
            answers = self.rpc("start_probe", experts, top_k, routes)
            if reasons := [one for one in answers if one is not None]:
                raise Unsupported(f"the experts that run cannot be counted: {reasons[0]}")
            done = self.send(batch, begin)
            pairs = zip(batch.prompts, batch.lengths, strict=True)
            lengths = [len(ids) + new - 1 for ids, new in pairs]
            return trace_of(self.rpc("read_probe"), done, top_k, lengths if routes else None)
        finally:
            with contextlib.suppress(Exception):  # a dead engine has none
                self.rpc("stop_probe")

    def close(self) -> None:
        """Gives everything back; never raises."""
        with contextlib.suppress(Exception):
            self.engine.engine_core.shutdown()
        self.llm = self.engine = self._passes = None


def clean() -> None:
    """Undoes what vLLM and a memory limit leave in a process, of an engine half built too."""
    with contextlib.suppress(Exception):
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    memory.unlimit()
    memory.trim()


class Output:
    """What this process and those that it started have printed since an engine began to load.

    A rank of its own process sends home a wrapper of its failure; the cause is printed, by vLLM on
    standard output, by libraries on standard error.
    """

    def __init__(self) -> None:
        paths = {Path(os.path.realpath(f"/proc/self/fd/{descriptor}")) for descriptor in (1, 2)}
        self._starts = {path: path.stat().st_size for path in paths if path.is_file()}

    def since(self) -> str:
        """The text; empty where output goes to no file."""
        found = []
        for path, start in self._starts.items():
            with path.open("rb") as file:
                file.seek(start)
                found.append(file.read().decode(errors="replace"))
        return "".join(found)


def explained(error: BaseException, *, stage: OomStage, output: Output, on_cpu: bool) -> TrialError:
    """What became of an engine of this process; see `workers.failures`."""
    failure = explain(error, stage=stage, log=output.since(), device_is_cpu=on_cpu)
    if isinstance(failure, Crashed) and _THREADS.search(str(failure)) and _is_full():
        text = f"{failure} (no memory left for a thread's stack)"
        return OutOfMemory(text, stage=stage, scope="device")
    return failure


def _is_full() -> bool:
    """Whether a thread's stack would no longer fit into the memory limit."""
    room = memory.headroom()
    return room is not None and room < _STACK_BYTES


def _spare_llvmlite() -> None:
    """Lets vLLM build an engine in a process that has drafted by n-grams before.

    On a CPU it looks for its kernels in the `__dict__` of all that modules hold, before every
    engine. N-grams are found by numba, whose llvmlite has an object that takes any attribute for
    the name of a C function, `__dict__` too, and vLLM falls over that. It gets an empty one.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        with contextlib.suppress(AttributeError):
            ffi.lib._fntab["__dict__"] = {}


def _drafted(ended: Sequence[Any]) -> Drafted:
    """Sums over what vLLM counted of each request (`RequestSpecDecodeMetrics`)."""
    seen = [one.spec_decode_metrics for one in ended if one.spec_decode_metrics is not None]
    return Drafted(
        steps=sum(sum(one.histogram) for one in seen),
        proposed=sum(one.num_draft_tokens for one in seen),
        accepted=sum(n * times for one in seen for n, times in enumerate(one.histogram)),
    )


def _place(request_id: str, places: dict[str, int]) -> int:
    """Position of a request among the prompts; vLLM may append a suffix to its id."""
    place = places.get(request_id)
    return places[request_id.rsplit("-", 1)[0]] if place is None else place


def trace_of(
    accounts: Sequence[Account | None], done: Done, top_k: int, lengths: Sequence[int] | None
) -> Trace:
    """What the ranks counted, put together: every pipeline stage has its own layers.

    `lengths`: tokens of each request that have routes; null where none were asked for.

    Raises:
        Unsupported: a rank gave up counting, or two do not tell of the same passes. Every request
            was served all the same.
    """
    told = sorted((one for one in accounts if one is not None), key=lambda one: one.layers)
    if failures := [one.failure for one in told if one.failure is not None]:
        raise Unsupported(f"the experts that ran could not be counted: {failures[0]}")
    if not told or len({len(one.steps) for one in told}) != 1:
        raise Unsupported(f"ranks counted {[len(one.steps) for one in told]} passes")
    layers = tuple(layer for one in told for layer in one.layers)
    routes = [np.full((length, len(layers), top_k), -1, dtype=np.int16) for length in lengths or ()]
    steps = []
    for stages in zip(*(one.steps for one in told), strict=True):
        seen = stages[0]
        places = [_place(one, done.places) for one in seen.requests]
        if lengths is not None:
            rows = np.concatenate([one.routes for one in stages], axis=1)
            ends = np.cumsum(seen.new)
            for place, new, before, end in zip(places, seen.new, seen.context, ends, strict=True):
                routes[place][before : before + new] = rows[end - new : end]
        steps.append(
            Step(
                request=np.array(places, dtype=np.int64),
                new=seen.new,
                context=seen.context,
                decoding=seen.decoding,
                prefill=np.concatenate([one.prefill for one in stages]),
                decode=np.concatenate([one.decode for one in stages]),
                seconds=max(one.seconds for one in stages),
            )
        )
    return Trace(
        layers=layers,
        top_k=top_k,
        steps=tuple(steps),
        tokens=tuple(tuple(row) for row in done.tokens),
        routes=None if lengths is None else tuple(routes),
    )
