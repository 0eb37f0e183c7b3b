"""Data-parallel replicas of one vLLM: a process and a stepper each, asked by the engine.

vLLM's `LLM` refuses `data_parallel_size` above 1, because one process can step one replica only;
programs of the user's own, one per rank, are its way out (`VLLM_DP_RANK` and its like). So that
is what is done here: the engine's process forks one process per replica and holds no model
itself. It can therefore wait for all of them at once and never hangs in an exchange with one
that is dead: the first failure is the engine's, and the others are killed.

Replicas of a model with experts keep step: vLLM spreads the experts over tensor × data devices
(whole ones with expert parallelism, slices of each without), so that every pass gathers the
tokens of all replicas before the experts and sends the sums back. One that has nothing to run
feeds a dummy token whenever another runs a pass, until the last has ended (`vllm_passes`). Dense
models have nothing to exchange: their replicas are as many engines on devices of their own and do
not know of each other.

Requests are dealt in turn: number i goes to replica i modulo their number.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import numpy as np
import psutil

from workers import memory
from workers.contract.errors import Crashed, TrialError
from workers.contract.layout import Layout
from workers.contract.measurement import Drafted
from workers.contract.outcome import OomStage
from workers.contract.trace import Step, Trace
from workers.engines.vllm_stepper import Batch, Done, Output, Start, Stepper, explained, now
from workers.failures import of_death

T = TypeVar("T")

GRACE_S = 2.0
"""Wait for the other replicas when one has failed: theirs may be the cause."""
EXIT_S = 20.0
"""Wait for a replica to close, seconds."""
PORTS = 8
"""Ports in a row that vLLM may take for the replicas' meetings."""
_READY = "ready"
_BEGUN = ("send", "trace")
"""Methods of a stepper that wait for the moment at which all begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one replica stands."""

    rank: int
    size: int
    devices: int
    """Of each replica."""
    port: int | None
    """Where replicas that exchange tokens meet; null where they do not know of each other."""


class Replicas:
    """What a `Stepper` is, as many times as the layout says.

    Args:
        args: of vLLM's `LLM`, for each replica.
        layout: of all.
        together: whether they share the experts.
        on_cpu: what the devices are.
        limited: whether a device has a memory limit of its own.
        output: what is printed.

    Raises:
        TrialError: one of them could not be built.
    """

    def __init__(
        self,
        args: dict[str, Any],
        layout: Layout,
        *,
        together: bool,
        on_cpu: bool,
        limited: bool,
        output: Output,
    ) -> None:
        self._size = layout.data
        self._on_cpu, self._limited, self._output = on_cpu, limited, output
        self._kills = memory.kernel_kills()
        self._ours: list[Connection] = []
        self._processes: list[Any] = []
        self._segments: set[Any] = set()
        context: Any = multiprocessing.get_context("fork" if _is_clean() else "spawn")
        port = _port() if together else None
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            self._ours.append(ours)
            each = layout.devices // layout.data
            place = Place(rank=rank, size=self._size, devices=each, port=port)
            process = context.Process(
                target=_serve, args=(theirs, tuple(self._ours), place, args, on_cpu, output)
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        try:
            self.config: dict[str, Any] = self._answers("load")[0]
        except TrialError:
            self._kill()  # those that told of a failure wait to be asked more
            raise
        for process in self._processes:
            self._segments |= memory.shared_segments(process.pid)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Answers of all ranks of all replicas."""
        asked = [(method, *args)] * self._size
        return [one for answer in self._ask("rpc", asked, "run") for one in answer]

    def holds(self, tokens: int) -> int | None:
        """Requests that each replica's KV cache holds at once; see `Stepper.holds`."""
        held = self._ask("holds", [(tokens,)] * self._size, "kv_cache")
        return min((one for one in held if one is not None), default=None)

    def send(self, batch: Batch, stage: OomStage) -> Done:
        """Sends each replica its share, at the same moment.

        Raises:
            TrialError: what became of the first that failed.
        """
        shares: list[Done] = self._ask("send", [(one,) for one in _dealt(batch, self._size)], stage)
        drafted = [one.drafted for one in shares if one.drafted is not None]
        steps = zip_longest(*(one.steps for one in shares), fillvalue=0.0)
        return Done(
            started_at=shares[0].started_at,
            places={},
            stamps=_gathered([one.stamps for one in shares]),
            tokens=_gathered([one.tokens for one in shares]),
            steps=[max(stamps) for stamps in steps],
            preempted=sum(one.preempted for one in shares),
            drafted=Drafted(
                steps=sum(one.steps for one in drafted),
                proposed=sum(one.proposed for one in drafted),
                accepted=sum(one.accepted for one in drafted),
            )
            if drafted
            else None,
        )

    def trace(self, batch: Batch, experts: int, top_k: int, routes: bool) -> Trace:
        """Traces of all, put together pass by pass.

        Raises:
            TrialError: what became of the first that failed.
        """
        asked = [(one, experts, top_k, routes) for one in _dealt(batch, self._size)]
        return traced_together(self._ask("trace", asked, "run"))

    def close(self) -> None:
        """Ends every replica and all that it started; never raises, may be called twice."""
        for connection in self._ours:
            connection.close()  # whoever waits to be asked now ends
        for process in self._processes:
            process.join(EXIT_S)
        self._kill()
        self._ours, self._processes = [], []

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                with contextlib.suppress(psutil.Error):
                    self._segments |= memory.shared_segments(process.pid)
                    for rank in psutil.Process(process.pid).children(recursive=True):
                        rank.kill()
                process.kill()
            process.join()
        for segment in self._segments:
            segment.unlink(missing_ok=True)

    def _ask(self, method: str, asked: Sequence[Any], stage: OomStage) -> list[Any]:
        """What each replica's stepper answers to a method."""
        with contextlib.suppress(OSError):  # dead: told below
            for connection, args in zip(self._ours, asked, strict=True):
                connection.send((stage, method, args))
        if method in _BEGUN:
            self._answers(stage)
            start = now()
            with contextlib.suppress(OSError):
                for connection in self._ours:
                    connection.send(start)
        return self._answers(stage)

    def _answers(self, stage: OomStage) -> list[Any]:
        """One message of each replica.

        Raises:
            TrialError: the gravest failure; unless all have told of one, and so are ready for
                what is asked next, none of them is left.
        """
        answers: dict[int, Any] = {}
        failures: dict[int, TrialError] = {}
        waiting = dict(enumerate(self._ours))
        while waiting:
            ready = wait(list(waiting.values()), timeout=GRACE_S if failures else None)
            if not ready:
                break  # they wait for the one that failed
            for rank in [one for one, connection in waiting.items() if connection in ready]:
                try:
                    answer = waiting.pop(rank).recv()
                except (EOFError, OSError):
                    answer = self._died(rank, stage)
                (failures if isinstance(answer, TrialError) else answers)[rank] = answer
        if not failures:
            return [answers[rank] for rank in range(self._size)]
        if answers or waiting or any(not one.is_alive() for one in self._processes):
            self._kill()
        raise min(failures.values(), key=lambda one: (type(one) is Crashed, _echo(one)))

    def _died(self, rank: int, stage: OomStage) -> TrialError:
        """Why a replica ended without a word."""
        process = self._processes[rank]
        process.join(EXIT_S)
        return of_death(
            f"replica {rank}",
            process.exitcode,
            self._output.since(),
            stage=stage,
            kernel_killed=memory.kernel_kills() > self._kills,
            limited=self._limited,
            device_is_cpu=self._on_cpu,
        )


def _is_clean() -> bool:
    """Whether this process may be forked: one that has just come from a fork server has computed
    nothing, so there are no threads that a fork would miss, and no CUDA context."""
    import torch

    served = multiprocessing.get_context("forkserver").Process
    fresh = isinstance(multiprocessing.current_process(), served) and not Stepper.built
    return fresh and not torch.cuda.is_initialized()


def traced_together(traces: Sequence[Trace]) -> Trace:
    """The trace of a batch that was dealt to replicas which kept step: what the k-th pass of
    each saw is one pass, and an expert that two of them chose ran once."""
    size, first = len(traces), traces[0]
    steps = []
    for number in range(max(len(one.steps) for one in traces)):
        there = [
            (rank, one.steps[number]) for rank, one in enumerate(traces) if number < len(one.steps)
        ]
        steps.append(
            Step(
                request=np.concatenate([one.request * size + rank for rank, one in there]),
                new=np.concatenate([one.new for _, one in there]),
                context=np.concatenate([one.context for _, one in there]),
                decoding=np.concatenate([one.decoding for _, one in there]),
                prefill=np.sum([one.prefill for _, one in there], axis=0),
                decode=np.sum([one.decode for _, one in there], axis=0),
                seconds=max(one.seconds for _, one in there),
            )
        )
    routes = [list(one.routes) for one in traces if one.routes is not None]
    return Trace(
        layers=first.layers,
        top_k=first.top_k,
        steps=tuple(steps),
        tokens=tuple(_gathered([list(one.tokens) for one in traces])),
        routes=tuple(_gathered(routes)) if routes else None,
    )


def _dealt(batch: Batch, size: int) -> list[Batch]:
    """A share for each replica, which is empty where the batch is smaller than their number."""
    return [
        Batch(
            prompts=batch.prompts[rank::size],
            lengths=batch.lengths[rank::size],
            temperature=batch.temperature,
        )
        for rank in range(size)
    ]


def _gathered(shares: Sequence[list[T]]) -> list[T]:
    """What was dealt, in its first order."""
    rows = zip_longest(*shares)
    whole = [one for row in rows for one in row]
    return whole[: sum(map(len, shares))]


def _echo(failure: TrialError) -> bool:
    """Whether it only says that another replica went away."""
    return "Connection closed by peer" in str(failure)


def _port() -> int:
    """The first of `PORTS` free ports in a row on loopback; vLLM counts up from it."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for more in range(1, PORTS):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port + more))
                return port


def _serve(
    connection: Connection,
    others: Sequence[Connection],
    place: Place,
    args: dict[str, Any],
    on_cpu: bool,
    output: Output,
) -> None:
    """What the process of a replica does, until the engine's closes its pipe."""
    for one in others:  # the engine's ends, which a fork has too
        one.close()
    stage: OomStage = "load"

    def begin() -> Start:
        connection.send(_READY)
        start: Start = connection.recv()
        return start

    def tell(error: Exception) -> None:
        failure = explained(error, stage=stage, output=output, on_cpu=on_cpu)
        connection.send(failure.with_traceback(None))

    stepper: Stepper | None = None
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            _settle(place, on_cpu)
            stepper = Stepper(args)
            connection.send(stepper.config)
        except Exception as error:  # noqa: BLE001  the edge: whatever comes becomes an outcome
            tell(error)
        while True:  # after a failure too: others would take an end for another failure
            stage, method, asked = connection.recv()
            try:
                more = {"begin": begin} if method in _BEGUN else {}
                connection.send(getattr(stepper, method)(*asked, **more))
            except (EOFError, ConnectionError):
                raise
            except Exception as error:  # noqa: BLE001
                tell(error)
    if stepper is not None:
        stepper.close()


def _settle(place: Place, on_cpu: bool) -> None:
    """Gives this process its devices, and tells vLLM of the other replicas."""
    mine = slice(place.rank * place.devices, (place.rank + 1) * place.devices)
    parts = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "").split("|")[mine]
    if on_cpu:
        os.sched_setaffinity(0, {int(core) for part in parts for core in part.split(",")})
    if place.port is not None:
        os.environ |= {
            "VLLM_DP_RANK": str(place.rank),
            "VLLM_DP_RANK_LOCAL": str(place.rank),
            "VLLM_DP_SIZE": str(place.size),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(place.port),
        }
    elif on_cpu:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(parts)
    else:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = seen.split(",") if seen else map(str, range(place.size * place.devices))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(list(devices)[mine])
