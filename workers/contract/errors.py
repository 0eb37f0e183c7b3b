"""Every way a trial can end other than `ok`, as exceptions.

    TrialError
    ├── Infeasible      the trial contradicts itself; refused before any engine is built
    │   └── Contradiction   one thing is asked for twice, and differently; a mistake in the sweep
    └── EngineError     raised around a real engine
        ├── OutOfMemory     stage: load | kv_cache | warmup | run; scope: device | host
        ├── Unsupported     the engine, or this build of it, does not offer what was asked
        ├── TimedOut        the trial's own deadline passed
        └── Crashed         anything else, with the engine's own words

An engine raises these and nothing else; the broad `except` that turns a foreign
exception into one of them lives once, in `workers.engines.failures`. `outcome` is
the word that the record carries.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from workers.contract.outcome import OomScope, OomStage, Outcome


class TrialError(Exception):
    """A trial that ends without a measurement."""

    outcome: ClassVar[Outcome] = "crashed"


class Infeasible(TrialError, ValueError):
    """The trial contradicts itself; the message shows the arithmetic."""

    outcome = "infeasible"


class Contradiction(Infeasible):
    """Two keys of a sweep ask for one thing, and differently.

    A plan refuses the sweep with it; where there is no sweep at hand, the trial is infeasible.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason)
        self.key = key
        """The dotted key of the trial that is at fault."""

    def __reduce__(self) -> Any:
        """Lets it travel between processes with its key."""
        return partial(Contradiction, key=self.key), self.args


class EngineError(TrialError, RuntimeError):
    """Something an engine did, or refused to do."""


class OutOfMemory(EngineError):
    """Memory ran out, which is a result."""

    outcome = "oom"

    def __init__(
        self,
        reason: str,
        *,
        stage: OomStage,
        scope: OomScope,
        requested_bytes: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.stage: OomStage = stage
        self.scope: OomScope = scope
        self.requested_bytes = requested_bytes
        """Size of the allocation that failed, in bytes, where the exception tells it."""

    def __reduce__(self) -> Any:
        """Lets it travel between processes: keywords are no `args` of an exception."""
        again = partial(
            OutOfMemory, stage=self.stage, scope=self.scope, requested_bytes=self.requested_bytes
        )
        return again, self.args


class Unsupported(EngineError):
    """The engine does not offer what the trial asks for."""

    outcome = "unsupported"


class TimedOut(EngineError):
    """A deadline passed."""

    outcome = "timeout"


class Crashed(EngineError):
    """The engine died or raised something that has no better name."""

    outcome = "crashed"
