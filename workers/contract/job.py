"""What the driver hands to an engine's host: one group, and what to write beside each trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from workers.contract.trial import Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """One execution of one trial."""

    trial: Trial
    trial_id: str
    attempt: int = 1
    """Executions of this trial in this run, this one included."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """The sweep's axes at this point, as written."""
    predicted: Mapping[str, Any] = field(default_factory=dict)
    """The `predicted_*` columns of its record."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """The columns of its record that say what the names in the trial stand for."""

    @property
    def predicted_pass_s(self) -> float | None:
        """Predicted length of a pass with its one-token pass, seconds; null without a
        prediction."""
        e2e_s, ttft_s = (self.predicted.get(f"predicted_{key}") for key in ("e2e_s", "ttft_s"))
        return None if e2e_s is None or ttft_s is None else float(e2e_s) + float(ttft_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Trials that share one engine."""

    sweep: str
    run_id: str
    group_id: str | None
    """Null for trials that never reach an engine."""
    profile: str
    tickets: tuple[Ticket, ...]
    log: str | None = None
    """File for the output of the engine and its ranks on the host; null is one of the host's own,
    of which the driver is sent the end."""
    log_name: str | None = None
    """The file that the record names, relative to the dataset: the same, or what was sent."""
    side_by_side: bool | None = None
    """Other engines can run on the machine at the same time; null where nothing is measured."""
    side_by_side_ratio: float | None = None
    """Time of a pass beside others over its time alone, as checked on that machine."""
    slowness: float | None = None
    """Seconds that trials have taken so far over those predicted; null where the predictions
    are of another class of device than the one at hand."""
    sheets: pa.RecordBatch | None = None
    """Activation sheets that may fit trials which ask for one (`workers.moe.sheets.to_rows`)."""
    scratch: str | None = None
    """Folder for temporary files on the host; null is the host's own."""
    fastest_read_gb_s: float = 0.0
    """Best that reference loads of the group's earlier engines read, 10⁹ bytes per second."""
    last_failure: str | None = None
    """Why the group's last engine could not be built; null if it was."""
