"""One point of a sweep, ready to run, and the two identities that follow from it.

`trial_id` covers everything that can change a number: a result is reused only for the
very same trial. `engine_key` covers only what a loaded engine is built from, so trials
that differ in workload or in how they are measured share one engine.
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
    def trial_id(self) -> str:
        """Identity of the whole trial."""
        return fingerprint(self)

    @property
    def engine_key(self) -> str:
        """Identity of the engine that can run it."""
        return fingerprint([self.model, self.layout, self.engine])
