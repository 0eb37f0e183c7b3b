"""How a group is measured on one engine.

Each shape is warmed up first: the first pass of a shape pays for kernels and allocations
that no later pass pays again. Then the group's workloads take turns, one repeat each, so
that a machine that grows slower over the minutes touches all of them alike instead of
whichever came last. Every repeat is a pair: the batch with one token per request (the
paper's TTFT), then the batch in full. Timed passes carry no probe.

A failure ends the trial in which it happened and no other: the engine is given up, and a
new one is built for those that remain. What fails while the engine is built ends them all.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workers import recorder
from workers.contract.errors import TimedOut, TrialError, Unsupported
from workers.contract.job import Job, Ticket
from workers.contract.measurement import Measurement, Pass, PassKind
from workers.contract.message import Finished, Message, Progress
from workers.engines.base import Engine, engine_class
from workers.hardware.host import Host, describe
from workers.metrics import interval
from workers.prompts import random_ids


def run(job: Job) -> Iterator[Message]:
    """Measures every ticket of `job`; each ends in exactly one `Finished`."""
    yield from _Run(job, describe()).messages()


class _Trial:
    """One ticket while its passes are collected."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.passes: list[Pass] = []

    def next_index(self) -> int:
        """Index of the next pass; it seeds the prompts, so no two passes share them."""
        return len(self.passes)

    def count(self, kind: PassKind) -> int:
        return sum(one.kind == kind for one in self.passes)

    def busy_s(self) -> float:
        return sum(one.e2e_s for one in self.passes)

    def enough(self) -> bool:
        """The stop rule of `Measure`."""
        measure = self.ticket.trial.measure
        done = self.count("timed")
        if done < measure.repeats:
            return False
        if measure.ci_width is None or done >= measure.most_repeats:
            return True
        e2e = [one.e2e_s for one in self.passes if one.kind == "timed"]
        return interval(e2e).width <= measure.ci_width


@dataclass
class _Failure(Exception):
    """A trial that ended while others of its group still wait."""

    trial: _Trial
    error: TrialError


@dataclass
class _Run:
    job: Job
    host: Host
    columns: dict[str, Any] = field(default_factory=dict)

    def messages(self) -> Iterator[Message]:
        waiting = []
        for ticket in self.job.tickets:
            if error := _refused(ticket):
                yield self._failed(ticket, error)
            else:
                waiting.append(ticket)
        waiting.sort(key=_size, reverse=True)
        while waiting:
            done: set[str] = set()
            for message in self._one_engine(waiting):
                if isinstance(message, Finished):
                    done.add(message.trial_id)
                yield message
            assert done, "an engine ended without ending any trial"
            waiting = [ticket for ticket in waiting if ticket.trial_id not in done]

    def _one_engine(self, tickets: Sequence[Ticket]) -> Iterator[Message]:
        """Builds an engine and measures on it until all are done or one fails."""
        yield Progress(stage="load")
        self.columns = recorder.where(self.host)
        self.columns["started_at"] = datetime.now(UTC)
        with _scratch() as folder:
            try:
                start = time.perf_counter()
                kind = engine_class(tickets[0].trial.engine.kind)
                engine = kind(tickets[0].trial, [one.trial.workload for one in tickets], folder)
                self.columns["engine_load_s"] = time.perf_counter() - start
            except TrialError as error:
                for ticket in tickets:
                    yield self._failed(ticket, error)
                return
            try:
                self.columns["engine_version"] = engine.loaded.version
                self.columns["engine_args"] = _json(engine.loaded.args)
                self.columns["threads"] = engine.loaded.threads
                del self.columns["started_at"]
                yield from self._measure(engine, [_Trial(one) for one in tickets])
            except _Failure as failure:
                started = min((one.started_at for one in failure.trial.passes), default=None)
                stamp = datetime.fromtimestamp(started, UTC) if started else datetime.now(UTC)
                self.columns["started_at"] = stamp
                yield self._failed(failure.trial.ticket, failure.error)
            finally:
                yield Progress(stage="close")
                engine.close()

    def _measure(self, engine: Engine, trials: list[_Trial]) -> Iterator[Message]:
        for one in trials:
            yield Progress(stage="warmup", trial_id=one.ticket.trial_id)
            for _ in range(one.ticket.trial.measure.warmup):
                _warm_up(engine, one)
        waiting = list(trials)
        while waiting:
            for one in list(waiting):
                before = one.busy_s()
                _repeat(engine, one)
                ticket = one.ticket
                yield Progress(
                    stage="run",
                    trial_id=ticket.trial_id,
                    detail=f"repeat {one.count('timed')}",
                    busy_s=one.busy_s() - before,
                )
                if one.enough():
                    waiting.remove(one)
                    yield self._ok(engine, one)
                elif one.busy_s() > ticket.trial.measure.timeout_s:
                    raise _Failure(
                        one,
                        TimedOut(
                            f"{one.count('timed')} of {ticket.trial.measure.repeats} repeats in "
                            f"{one.busy_s():.0f} s; measure.timeout_s is "
                            f"{ticket.trial.measure.timeout_s:.0f}"
                        ),
                    )

    def _ok(self, engine: Engine, trial: _Trial) -> Finished:
        with _blaming(trial):
            memory = engine.memory()
        measurement = Measurement(passes=tuple(trial.passes), memory=memory)
        record = recorder.ok(
            self.job, trial.ticket, measurement, engine.loaded.architecture, **self.columns
        )
        return Finished(
            trial_id=trial.ticket.trial_id,
            outcome="ok",
            record=record,
            samples=recorder.samples(self.job, trial.ticket, measurement),
            throughput_tok_s=record.column("throughput_tok_s")[0].as_py(),
        )

    def _failed(self, ticket: Ticket, error: TrialError) -> Finished:
        columns = self.columns or recorder.where(self.host)
        return Finished(
            trial_id=ticket.trial_id,
            outcome=error.outcome,
            record=recorder.failed(self.job, ticket, error, **columns),
        )


def _refused(ticket: Ticket) -> TrialError | None:
    try:
        reason = engine_class(ticket.trial.engine.kind).refuses(ticket.trial)
    except TrialError as error:
        return error
    return Unsupported(reason) if reason else None


def _warm_up(engine: Engine, trial: _Trial) -> None:
    _pass(engine, trial, 1, "warmup")
    _pass(engine, trial, trial.ticket.trial.workload.output_tokens, "warmup")


def _repeat(engine: Engine, trial: _Trial) -> None:
    _pass(engine, trial, 1, "one_token")
    _pass(engine, trial, trial.ticket.trial.workload.output_tokens, "timed")


def _pass(engine: Engine, trial: _Trial, output_tokens: int, kind: PassKind) -> None:
    prompts = random_ids(
        trial.ticket.trial.workload,
        vocab_size=engine.loaded.architecture.vocab_size,
        index=trial.next_index(),
    )
    with _blaming(trial):
        trial.passes.append(
            engine.generate(prompts, output_tokens, kind=kind, repeat=trial.count(kind))
        )


@contextmanager
def _blaming(trial: _Trial) -> Iterator[None]:
    try:
        yield
    except TrialError as error:
        raise _Failure(trial, error) from error


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="moe-engine-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _size(ticket: Ticket) -> tuple[int, int]:
    """Largest first: what does not fit is found out before time is spent on the rest."""
    workload = ticket.trial.workload
    return workload.batch_size * workload.tokens_per_request, workload.batch_size


def _json(value: Any) -> str:
    import json

    return json.dumps(value, sort_keys=True)
