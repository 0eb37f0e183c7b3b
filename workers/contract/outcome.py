"""The words in which a trial can end."""

from __future__ import annotations

from typing import Literal, get_args

Outcome = Literal["ok", "oom", "infeasible", "unsupported", "timeout", "crashed", "skipped"]
OomStage = Literal["load", "kv_cache", "warmup", "run"]
OomScope = Literal["device", "host"]
Rerun = Outcome | Literal["disturbed"]
"""What records may be asked to be made again: those that ended so, or were disturbed."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
DISTURBED: Literal["disturbed"] = "disturbed"
RERUNS: tuple[Rerun, ...] = (*OUTCOMES, DISTURBED)
OOM_STAGES: tuple[OomStage, ...] = get_args(OomStage)
FAULTS: frozenset[Outcome] = frozenset({"timeout", "crashed"})
"""Outcomes that say something went wrong, rather than that something was found out."""
