"""One point of a sweep, ready to run.

Its identity follows from what its names stand for, which only a machine with the files can tell
(`workers.identity`). `named_id` and `engine_key` go by the names alone: the first is how version
0.1.0 identified results, and finds those records again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.contract.engine import EngineSettings
from workers.contract.fingerprint import fingerprint
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.model import Model
from workers.contract.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Model, layout, workload, engine and measurement settings of one point."""

    model: Model
    layout: Layout = field(default_factory=Layout)
    workload: Workload = field(default_factory=Workload)
    engine: EngineSettings = field(default_factory=EngineSettings)
    measure: Measure = field(default_factory=Measure)

    @property
    def named_id(self) -> str:
        """Identity of the whole trial by its names, as version 0.1.0 had it."""
        return fingerprint(self)

    @property
    def engine_key(self) -> str:
        """Identity of the engine that can run it, by its names."""
        return fingerprint([self.model, self.layout, self.engine])
