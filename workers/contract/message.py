"""What an engine's host tells the driver while a group runs.

A host sends `Progress` when it enters a stage and `Finished` once per trial. The driver
needs nothing else: the deadline watch restarts on every message, and a group that dies
has lost exactly the trials for which no `Finished` arrived. `Released` or `Died` comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    throughput_tok_s: float | None = None
    """Headline for the live table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """The group's engine is gone."""

    clean: bool
    """Device memory is back to its baseline and no process is left."""
    detail: str = ""
    """What was found, where it is not clean."""


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


Message = Progress | Finished | Released | Died
