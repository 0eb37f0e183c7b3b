"""What an engine's host tells the driver while a group runs.

A host sends `Progress` when it enters a stage and `Finished` once per trial. The driver
needs nothing else: the deadline watch restarts on every message, and a group that dies
has lost exactly the trials for which no `Finished` arrived. `Released` or `Died` comes last.

Rows travel as Arrow's own stream. Pickle would take a record apart into its hundred columns: five
times the bytes, too many for Ray to send inline, and a millisecond on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from workers.contract.errors import TrialError
from workers.contract.outcome import Outcome

Stage = Literal["load", "warmup", "run", "close"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The host entered a stage."""

    stage: Stage
    trial_id: str | None = None
    """The trial at hand; null while the engine is loaded or closed."""
    detail: str = ""
    """One short line for people."""
    busy_s: float = 0.0
    """Seconds of timed passes and warm-ups since the previous message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A trial has its terminal record."""

    trial_id: str
    outcome: Outcome
    record: pa.RecordBatch
    """One row of `records`."""
    samples: pa.RecordBatch | None = None
    """Rows of `samples`."""
    activations: pa.RecordBatch | None = None
    """Rows of `activations`."""
    sheet: pa.RecordBatch | None = None
    """What a probe found, for later trials to use (`workers.moe.sheets.to_rows`)."""
    throughput_tok_s: float | None = None
    """Headline for the live table."""

    def __reduce__(self) -> tuple[Any, ...]:
        rows = [
            None if one is None else _packed(one)
            for one in (self.record, self.samples, self.activations, self.sheet)
        ]
        return _finished, (self.trial_id, self.outcome, self.throughput_tok_s, *rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """The group's engine is gone."""

    clean: bool
    """Device memory is back to its baseline and no process is left. If not, trials of the group
    may be left, which run elsewhere."""
    detail: str = ""
    """What was found, where it is not clean."""
    log: str | None = None
    """The end of what the group printed; null where the driver has the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """The engine's process is gone before its group ended; its host lives."""

    error: TrialError
    """Why, as far as it can be told."""
    trial_id: str | None
    """Trial in hand; null while the engine was built or closed."""
    clean: bool
    """As in `Released`."""
    detail: str = ""
    log: str | None = None
    """As in `Released`."""


Message = Progress | Finished | Released | Died


def _packed(rows: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _unpacked(packed: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(packed).read_next_batch()


def _finished(
    trial_id: str,
    outcome: Outcome,
    throughput_tok_s: float | None,
    record: bytes,
    samples: bytes | None,
    activations: bytes | None,
    sheet: bytes | None,
) -> Finished:
    return Finished(
        trial_id=trial_id,
        outcome=outcome,
        record=_unpacked(record),
        samples=None if samples is None else _unpacked(samples),
        activations=None if activations is None else _unpacked(activations),
        sheet=None if sheet is None else _unpacked(sheet),
        throughput_tok_s=throughput_tok_s,
    )
