"""How a group is measured on one engine.

Each shape is warmed up first: the first pass of a shape pays for kernels and allocations
that no later pass pays again. A warm-up is one pass in full, which begins as a batch of one
token does. Then the group's workloads take turns, one repeat each, so that a machine that
grows slower over the minutes touches all of them alike instead of whichever came last. Every
repeat is a pair: the batch with one token per request (the paper's TTFT), then the batch in
full. What the machine says of itself is read right before and right after each, outside its
stamps, and a pass that something else disturbed is made up for (`workers.repeats`). Timed passes
carry no probe: where `measure.activation` asks which experts ran, timed
passes are replayed when all turns are over, with the same prompts, until the distribution over
experts has settled or none is left to replay. Trials that ask for an activation sheet and do not
find theirs wait for the probes of the group, which may make it.

Records come when a round of turns is the last one, so a group of hours would have none for
hours, and who kills its driver would lose them all. Workloads that are predicted to take longer
than `BLOCK_S` together are therefore dealt out, like cards, into as few blocks as do not, one
after the other: drift within minutes still touches all of a block alike, and drift over hours is
spread over all sizes instead of being taken for an effect of size. How fast the machine was is
measured on its own, by a short load of fixed work before a block's first pass and after each round
in which a trial ended (`workers.hardware.reference`); so the records of a round come at its end.

Trials of a group share weights but may differ in top-k. They go by top-k, the smallest
first, and for each the largest shape first: what does not fit is found out before time is
spent on the rest, and what does not fit with few experts per token does not with more. From
one top-k to the next the engine is asked to become the other model; one that cannot is
closed and built anew. What runs out of memory after others on one engine is tried again on
one of its own, since their buffers were still there. A shape that this engine has run with
another top-k is warm but for its MoE kernels, so its warm-up ends after a few tokens.

A batch is what is in flight together, so one that the KV cache does not hold at once is `oom`,
though engines would run it in parts. Where an engine without the larger shapes may have the little
that lacks, it gets one.

A failure ends the trial in which it happened and no other: the engine is given up, and a
new one is built for those that remain, in a process of its own where a device could remember
what went wrong (`workers.forks`): after an illegal access every call of a CUDA process fails.
Memory that runs out while an engine is built ends all of the group, because all share the weights
and none has a smaller top-k; a refusal ends those of its top-k. A crash ends the first of them;
only if the next engine crashes with the same words it ends the others too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from workers import disturbance, memory, recorder, repeats, reuse, usage
from workers.contract.errors import (
    Crashed,
    Infeasible,
    OutOfMemory,
    TimedOut,
    TrialError,
    Unsupported,
)
from workers.contract.job import Job, Ticket
from workers.contract.measurement import Measurement, Memory, Pass, PassKind
from workers.contract.message import Finished, Message, Progress, Stage
from workers.contract.model import Model
from workers.contract.probed import PHASES, Probed
from workers.contract.trace import Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.disturbance import Reads
from workers.engines.base import Engine, Site, engine_class
from workers.folders import within
from workers.hardware import reference
from workers.hardware.device import Device, device
from workers.hardware.gpus import Gpus
from workers.hardware.hand import Hand, in_hand
from workers.hardware.hand import doubted as hand_again
from workers.hardware.host import Host, describe
from workers.hardware.reference import Reference
from workers.hardware.watch import Watch
from workers.moe.activation import Settling
from workers.moe.architecture import UnknownModel, resolve, run_dtype
from workers.moe.overrides import of as overrides_of
from workers.moe.partial import Partial
from workers.moe.sheets import Sheet, from_rows, to_rows
from workers.prompts import random_ids
from workers.texts import text_ids

BLOCK_S = 600.0
"""Predicted time of workloads that take turns with one another, seconds."""
_TOLD = (
    "outcome_reason",
    "reference_bandwidth_gb_s_before",
    "reference_bandwidth_gb_s_after",
)
"""Columns of a record that the next engine of its group is told of."""
REWARM_TOKENS = 4
"""Tokens of a warm-up where all but top-k is warm: a prompt pass and three decode passes."""


def one_engine(job: Job) -> Iterator[Message]:
    """Measures tickets of `job` until one engine is done; each of them ends in one `Finished`."""
    yield from _Run(job, describe()).messages()


def run(job: Job, engine: Callable[[Job], Iterator[Message]] = one_engine) -> Iterator[Message]:
    """Measures every ticket of `job`; each ends in exactly one `Finished`.

    Args:
        job: the tickets. What one engine found out, the next is told by a job of its own.
        engine: does what `one_engine` does, perhaps in another process.
    """
    while job.tickets:
        done: set[str] = set()
        loading, failure = False, None
        sheets = [job.sheets] if job.sheets is not None else []
        fastest = job.fastest_read_gb_s
        for message in engine(job):
            if isinstance(message, Progress):
                loading = message.stage == "load"
            elif isinstance(message, Finished):
                done.add(message.trial_id)
                (told,) = message.record.select(_TOLD).to_pylist()
                reason, *reads = told.values()
                failure = reason if loading else None
                fastest = max(fastest, *(read or 0.0 for read in reads))
                sheets += [message.sheet] if message.sheet is not None else []
            yield message
        assert done, "an engine ended without ending any trial"
        job = replace(
            job,
            tickets=tuple(one for one in job.tickets if one.trial_id not in done),
            sheets=pa.concat_batches(sheets) if sheets else None,
            fastest_read_gb_s=fastest,
            last_failure=failure,
        )


def unbuilt(job: Job, error: TrialError) -> Iterator[Finished]:
    """Ends what a failure to build an engine for `job` ends, where the process that was to build it
    can tell nobody."""
    run = _Run(job, describe())
    for ticket in _ended_by(error, sorted(job.tickets, key=_turn), job.last_failure):
        yield run._failed(ticket, error)


class _Trial:
    """One ticket while its passes are collected."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.passes: list[Pass] = []
        self.repeatable = False
        """Every pass would be the same: one is enough."""
        self.before: Reference | None = None
        """How fast the machine was before its first pass."""
        self.after: Reference | None = None
        """The same after its last."""

    def next_index(self) -> int:
        """Index of the next pass; it seeds the prompts, so no two passes share them."""
        return len(self.passes)

    def count(self, kind: PassKind) -> int:
        return sum(one.kind == kind for one in self.passes)

    def busy_s(self) -> float:
        return sum(one.e2e_s for one in self.passes)

    def enough(self) -> bool:
        """Whether it needs no further pass."""
        if self.repeatable:
            return self.count("timed") > 0
        return repeats.enough(self.ticket.trial.measure, self.passes)

    def settle(self) -> None:
        """Judges every pass: no more will come."""
        self.passes = list(repeats.settled(self.ticket.trial.measure, self.passes))


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
    """Columns of every record of the engine at hand."""
    measured: bool = True
    """They are of a machine, not of a model of one."""
    target: Device | None = None
    """Device that its figures are of."""
    calibrated: dict[str, Any] = field(default_factory=dict)
    """What a calibration of it found, as columns."""
    doubted: bool = False
    """It was calibrated again since the engine was built."""
    reference: Reference | None = None
    """How fast the machine was when the engine at hand last asked."""
    fastest_read: float = 0.0
    """Best that any of these loads read, 10⁹ bytes per second."""
    whole_machine: bool = False
    """The engine computes on as many threads as the device was calibrated with."""
    busy_s: float = 0.0
    """Seconds of passes since the last message that told of them."""
    watch: Watch | None = None
    """What the machine says around each pass; null where nothing is measured."""
    sheets: list[Sheet] = field(default_factory=list)
    """Activation sheets at hand; of those with one key the last stands."""

    def __post_init__(self) -> None:
        self.fastest_read = self.job.fastest_read_gb_s
        if self.job.sheets is not None:
            self.sheets = from_rows(self.job.sheets)

    def messages(self) -> Iterator[Message]:
        waiting = []
        for ticket in self.job.tickets:
            if error := _refused(ticket):
                yield self._failed(ticket, error)
            else:
                waiting.append(ticket)
        waiting.sort(key=_turn)
        if waiting:
            yield from self._one_engine(waiting)

    def _one_engine(self, tickets: Sequence[Ticket]) -> Iterator[Message]:
        """Builds an engine and measures on it until all are done, one fails, or it cannot
        become what the next top-k needs."""
        yield self._progress("load")
        kind = engine_class(tickets[0].trial.engine.kind)
        planned_for = tickets[0].trial.layout.device or self.job.profile
        stand_in = kind.stands_for(planned_for)
        self.columns, self.calibrated = recorder.where(self.host, stand_in), {}
        self.doubted = False
        self.columns["started_at"] = datetime.now(UTC)
        with _scratch(self.job.scratch) as folder:
            try:
                hand = None if stand_in else in_hand(self.host)
                start = time.perf_counter()
                site = Site(scratch=folder, device=planned_for)
                engine = kind(tickets[0].trial, [one.trial.workload for one in tickets], site)
                self.columns["engine_load_s"] = time.perf_counter() - start
            except TrialError as error:
                for ticket in _ended_by(error, tickets, self.job.last_failure):
                    yield self._failed(ticket, error)
                return
            warm: set[Workload] = set()
            try:
                self.columns["engine_version"] = engine.loaded.version
                self.columns["threads"] = engine.loaded.threads
                self.columns["moe_kernel"] = engine.loaded.moe_kernel
                self.columns["moe_config"] = engine.loaded.moe_config
                self.columns["engine_args"] = json.dumps(engine.loaded.args, sort_keys=True)
                built, crowded = tickets[0], engine.loaded.too_large
                for ticket in tickets:
                    if (reason := crowded.get(ticket.trial.workload)) is not None:
                        yield self._failed(ticket, reason)
                out = crowded.keys() | engine.loaded.too_tight
                tickets = [one for one in tickets if one.trial.workload not in out]
                if not tickets:
                    return
                self.measured = hand is not None
                if hand is None:
                    self.target = device(planned_for)
                else:
                    self._against(hand, engine, tickets[0])
                    on_gpus = engine.loaded.threads is None
                    gpus = Gpus.open(tickets[0].trial.layout.devices) if on_gpus else None
                    self.watch = Watch(gpus)
                    self.whole_machine = _on_all(engine, hand, tickets[0])
                self._refer(engine)
                del self.columns["started_at"]
                for _, alike in groupby(tickets, key=_top_k):
                    trials = [_Trial(one) for one in alike]
                    first = trials[0].ticket
                    if _top_k(first) != _top_k(built) and not engine.become(first.trial):
                        break
                    args = json.dumps(engine.loaded.args, sort_keys=True)
                    self.columns["engine_args"] = args
                    without: list[tuple[_Trial, Memory]] = []
                    for block in _blocks(trials, self.job.slowness or 1.0):
                        without += yield from self._measure(engine, block, warm)
                    for one, used in without:
                        yield self._ok(engine, one, used)
                    warm |= {one.ticket.trial.workload for one in trials}
            except _Failure as failure:
                memory.unlimit()  # it bounds the model, which goes, and not the record of its end
                if warm and isinstance(failure.error, OutOfMemory):
                    return  # buffers of another top-k are still there: it gets its own engine
                started = min((one.started_at for one in failure.trial.passes), default=None)
                stamp = datetime.fromtimestamp(started, UTC) if started else datetime.now(UTC)
                self.columns["started_at"] = stamp
                self.columns |= reference.columns(failure.trial.before, None)
                yield self._failed(failure.trial.ticket, failure.error)
            finally:
                yield self._progress("close")
                if self.watch is not None:
                    self.watch.close()
                    self.watch = None
                engine.close()

    def _measure(
        self, engine: Engine, trials: list[_Trial], warm: Set[Workload]
    ) -> Generator[Message, None, list[tuple[_Trial, Memory]]]:
        """Measures a block.

        Returns:
            Trials without their record, since they still lack a sheet.
        """
        for one in trials:
            one.before = self.reference
            if not self.measured:
                one.repeatable = True
                continue
            yield self._progress("warmup", one)
            workload = one.ticket.trial.workload
            tokens = workload.output_tokens
            if workload in warm:
                tokens = min(tokens, REWARM_TOKENS)
            for _ in range(one.ticket.trial.measure.warmup):
                self._pass(engine, one, tokens, "warmup")
        waiting = list(trials)
        to_probe: list[tuple[_Trial, Memory]] = []
        to_look_up: list[tuple[_Trial, Memory]] = []
        while waiting:
            ended: list[tuple[_Trial, Memory]] = []
            failure: _Failure | None = None
            try:
                for one in list(waiting):
                    yield self._progress("run", one)
                    self._pass(engine, one, 1, "one_token")
                    self._pass(engine, one, one.ticket.trial.workload.output_tokens, "timed")
                    if one.enough():
                        waiting.remove(one)
                        one.settle()
                        with _blaming(one):
                            ended.append((one, engine.memory()))
                    elif one.busy_s() > one.ticket.trial.measure.timeout_s:
                        raise _Failure(one, _late(one))
            except _Failure as error:
                failure = error
            if ended and failure is None:
                self._refer(engine)
            for one, used in ended:
                one.after = self.reference if failure is None else None
                if one.ticket.trial.measure.activation is True:
                    to_probe.append((one, used))
                elif self._lacks_sheet(engine, one):
                    to_look_up.append((one, used))
                else:
                    yield self._ok(engine, one, used)
            if failure is not None:
                raise failure
        for one, used in to_probe:
            probed = yield from self._probe(engine, one)
            yield self._ok(engine, one, used, probed)
        for one, used in list(to_look_up):
            if not self._lacks_sheet(engine, one):
                to_look_up.remove((one, used))
                yield self._ok(engine, one, used)
        return to_look_up

    def _refer(self, engine: Engine) -> None:
        """Has the machine show how fast it is."""
        self.reference = engine.reference() if self.measured else None
        if self.reference is not None:
            self.fastest_read = max(self.fastest_read, self.reference.bandwidth_gb_s.median)

    def _reads(self, trial: _Trial) -> Reads:
        """How fast memory was read around a trial, beside the best that is known."""
        told = [one.bandwidth_gb_s.median for one in (trial.before, trial.after) if one is not None]
        if not told:
            return Reads()
        peak = self.calibrated.get("calibrated_bandwidth_gb_s") if self.whole_machine else None
        return Reads(
            of_best=max(told) / self.fastest_read, of_peak=max(told) / peak if peak else None
        )

    def _lacks_sheet(self, engine: Engine, trial: _Trial) -> bool:
        """Whether it asks for an activation sheet that a probe of this group might yet make."""
        asked = trial.ticket.trial
        if asked.measure.activation != "sheet":
            return False
        probing = any(one.trial.measure.activation is True for one in self.job.tickets)
        return probing and self._sheet(engine, asked, ())[0] is None

    def _sheet(
        self, engine: Engine, asked: Trial, passes: Sequence[Pass]
    ) -> tuple[Sheet | None, str | None]:
        """The activation sheet that a trial asks for, and what is not known for want of it."""
        if asked.measure.activation != "sheet":
            return None, None
        timed = [one for one in passes if one.kind == "timed" and one.counted]
        loaded = engine.loaded
        return reuse.taken(asked, loaded.architecture, loaded.version, self.sheets, timed)

    def _probe(self, engine: Engine, trial: _Trial) -> Generator[Message, None, Probed]:
        """Replays timed passes, in their order, with every choice of experts counted."""
        asked = trial.ticket.trial
        traces: dict[int, Trace] = {}
        runs = engine.loaded.architecture
        if isinstance(runs, Partial):
            return Probed(reason=f"which experts ran is not known: {runs.reason}")
        phases = {name: Settling(runs.top_k) for name in PHASES}
        for index, one in enumerate(trial.passes):
            if one.kind != "timed" or not one.counted:
                continue
            yield self._progress("run", trial, f"probe {len(traces) + 1}")
            try:
                with _blaming(trial):
                    traces[one.repeat] = trace = engine.trace(
                        self._prompts(engine, trial, index),
                        asked.workload.output_tokens,
                        temperature=asked.workload.temperature,
                    )
            except _Failure as failure:
                if isinstance(failure.error, Unsupported):  # what was timed stands
                    return Probed(reason=f"which experts ran is not known: {failure.error}")
                raise
            for step in trace.steps:
                phases["prefill"].add(step.prefill)
                phases["decode"].add(step.decode)
            if all(phase.settled or phase.counts is None for phase in phases.values()):
                return Probed(traces=traces, settled=True)
        return Probed(traces=traces)

    def _prompts(self, engine: Engine, trial: _Trial, index: int) -> list[list[int]]:
        """Of the pass at that place among the trial's passes."""
        workload = trial.ticket.trial.workload
        vocab_size = engine.loaded.vocab_size
        tokenizer = engine.tokenizer() if workload.dataset is not None else None
        if tokenizer is None:
            return random_ids(workload, vocab_size=vocab_size, index=index)
        ids = text_ids(workload, tokenizer, index=index)
        if (largest := max(map(max, ids))) >= vocab_size:
            raise Infeasible(
                f"the tokenizer says {largest} where the model knows {vocab_size} tokens"
            )
        return ids

    def _pass(self, engine: Engine, trial: _Trial, output_tokens: int, kind: PassKind) -> None:
        with _blaming(trial):
            prompts = self._prompts(engine, trial, trial.next_index())
            if self.watch is not None:
                self.watch.begin()
            began = time.monotonic()  # a predicted pass does not take what it says
            one = engine.generate(
                prompts,
                output_tokens,
                kind=kind,
                repeat=trial.count(kind),
                temperature=trial.ticket.trial.workload.temperature,
            )
        if self.watch is not None:
            one = replace(one, reading=self.watch.end())
        trial.passes.append(one)
        self.busy_s += time.monotonic() - began

    def _progress(
        self, stage: Stage, trial: _Trial | None = None, detail: str | None = None
    ) -> Progress:
        """Sent before what it announces: a death is then laid at the right door."""
        busy, self.busy_s = self.busy_s, 0.0
        if trial is None:
            return Progress(stage=stage, busy_s=busy)
        return Progress(
            stage=stage,
            trial_id=trial.ticket.trial_id,
            detail=detail or (f"repeat {trial.count('timed') + 1}" if stage == "run" else ""),
            busy_s=busy,
        )

    def _ok(
        self, engine: Engine, trial: _Trial, used: Memory, probed: Probed | None = None
    ) -> Finished:
        measurement = Measurement(passes=tuple(trial.passes), memory=used)
        sheet, unknown = self._sheet(engine, trial.ticket.trial, trial.passes)
        trial.passes.clear()  # they are in its rows
        verdict = disturbance.of_record(measurement.passes, self._reads(trial))
        utilisations, doubt = self._utilisations(engine, trial.ticket, measurement, probed, sheet)
        columns = (
            self.columns
            | self.calibrated
            | reference.columns(trial.before, trial.after)
            | {
                "disturbed": verdict.disturbed,
                "disturbed_reason": verdict.reason,
                "passes_disturbed": disturbance.number(measurement.passes),
            }
        )
        reasons = (unknown or (probed.reason if probed is not None else None), doubt)
        if any(reasons):
            columns["outcome_reason"] = "; ".join(filter(None, reasons))
        found = self._found(engine, trial.ticket, probed)
        record = recorder.ok(
            self.job,
            trial.ticket,
            measurement,
            engine.loaded.architecture,
            utilisations,
            self.measured,
            **columns,
        )
        return Finished(
            trial_id=trial.ticket.trial_id,
            outcome="ok",
            record=record,
            samples=recorder.samples(self.job, trial.ticket, measurement, probed),
            activations=recorder.activations(self.job, trial.ticket, probed) if probed else None,
            sheet=to_rows([found]) if found is not None else None,
            throughput_tok_s=record.column("throughput_tok_s")[0].as_py(),
        )

    def _utilisations(
        self,
        engine: Engine,
        ticket: Ticket,
        measurement: Measurement,
        probed: Probed | None,
        sheet: Sheet | None,
    ) -> tuple[dict[str, Any], str | None]:
        """Shares of the device's peaks, and why some are not known. Passes that go beyond a peak
        have it measured again, once per engine."""

        def against(target: Device | None) -> dict[str, Any]:
            a, timed = engine.loaded.architecture, measurement.of("timed")
            return usage.columns(ticket.trial, a, timed, target, probed, sheet)

        found = against(self.target)
        if (beyond := usage.contradictions(found)) and not self.doubted:
            self.doubted = True
            print(f"{'; '.join(beyond)}: the device is calibrated again")
            if (hand := hand_again(self.host)) is not None:
                self._against(hand, engine, ticket)
                found = against(self.target)
        return usage.sound(found)

    def _against(self, hand: Hand, engine: Engine, ticket: Ticket) -> None:
        """Takes utilisations against this device from now on."""
        self.target = hand.device
        dtype = run_dtype(engine.loaded.architecture, ticket.trial.model)
        self.calibrated = hand.columns(dtype)

    def _found(self, engine: Engine, ticket: Ticket, probed: Probed | None) -> Sheet | None:
        """What a probe found, for this group and for later ones."""
        loaded, job = engine.loaded, self.job
        source = f"{job.sweep}, run {job.run_id}, trial {ticket.trial_id}"
        found = reuse.made(ticket.trial, loaded.architecture, loaded.version, probed, source=source)
        if found is not None:
            self.sheets.append(found)
        return found

    def _failed(self, ticket: Ticket, error: TrialError) -> Finished:
        columns = self.columns | self.calibrated or recorder.where(self.host)
        return Finished(
            trial_id=ticket.trial_id,
            outcome=error.outcome,
            record=recorder.failed(self.job, ticket, error, **columns),
        )


def _blocks(trials: Sequence[_Trial], slowness: float) -> Iterator[list[_Trial]]:
    """Trials that take turns. Where nothing is predicted all do."""
    seconds = sum(
        one.ticket.trial.measure.repeats * (one.ticket.predicted_pass_s or 0.0) for one in trials
    )
    number = min(len(trials), max(1, math.ceil(slowness * seconds / BLOCK_S)))
    for first in range(number):
        yield list(trials[first::number])


def _on_all(engine: Engine, hand: Hand, ticket: Ticket) -> bool:
    """Whether an engine computes with as many threads as its device was calibrated with."""
    threads, known = engine.loaded.threads, hand.calibration
    if known is None:
        return False
    return threads is None or threads * ticket.trial.layout.devices == known.threads


def _refused(ticket: Ticket) -> TrialError | None:
    try:
        reason = engine_class(ticket.trial.engine.kind).refuses(ticket.trial)
    except TrialError as error:
        return error
    return Unsupported(reason) if reason else None


def _ended_by(
    error: TrialError, tickets: Sequence[Ticket], last_failure: str | None
) -> Sequence[Ticket]:
    """Those of `tickets`, in their order, that end with an engine that could not be built.

    Args:
        error: why.
        last_failure: the same of the engine before.
    """
    if isinstance(error, OutOfMemory):
        return tickets
    alike = [one for one in tickets if _top_k(one) == _top_k(tickets[0])]
    if isinstance(error, Crashed) and _words(str(error)) != _words(last_failure or ""):
        return alike[:1]
    return alike


def _words(reason: str) -> str:
    """A reason without its numbers, which may be addresses or process ids."""
    return re.sub(r"\b(0x)?[0-9a-f]*\d[0-9a-f]*\b", "#", reason)


def _late(trial: _Trial) -> TimedOut:
    measure = trial.ticket.trial.measure
    return TimedOut(
        f"{trial.count('timed')} of {measure.repeats} repeats in {trial.busy_s():.0f} s; "
        f"measure.timeout_s is {measure.timeout_s:.0f}"
    )


@contextmanager
def _blaming(trial: _Trial) -> Iterator[None]:
    try:
        yield
    except TrialError as error:
        raise _Failure(trial, error) from error


@contextmanager
def _scratch(root: str | None) -> Iterator[Path]:
    """A folder that becomes the process's place for temporary files, and then goes.

    Engines leave sockets and rendezvous files where temporary files go, more so when they
    fail. Engine processes inherit the place.
    """
    folder = within(root, "engine")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    variable = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        if variable is not None:
            os.environ["TMPDIR"] = variable
        memory.sweep_shared(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _turn(ticket: Ticket) -> tuple[int, int, int]:
    """Place in the order of a group: smallest top-k first, then largest shape first."""
    workload = ticket.trial.workload
    tokens = workload.batch_size * workload.tokens_per_request
    return _top_k(ticket), -tokens, -workload.batch_size


def _top_k(ticket: Ticket) -> int:
    """Experts per token; 0 where only the engine knows them."""
    trial = ticket.trial
    if overrides := overrides_of(trial.engine):
        return _top_k_of(trial.model, json.dumps(overrides, sort_keys=True))
    return _top_k_of(trial.model, None)


@cache
def _top_k_of(model: Model, overrides: str | None) -> int:
    try:
        architecture = resolve(model, json.loads(overrides) if overrides else None)
    except (TrialError, UnknownModel):
        return model.top_k or 0
    return architecture.top_k if architecture else model.top_k or 0
