"""An engine that predicts instead of generating.

With `engine.kind: roofline` any sweep can be planned for hardware that one does not own:
the same grid, the same records, the same figures, from `workers.hardware.roofline` for
the device class that the sweep's profile names. It says `measured = false` in every
record, and it runs out of memory where the prediction does.

With `engine.args.pace` it takes its time too: building it and every pass last as many
seconds as predicted, times the pace (ending it takes none). Then a sweep holds devices as a
real one does, and scheduling can be seen at work on a cluster whose devices are not there.
The figures stay those of the prediction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from workers.contract import arguments
from workers.contract.engine import EngineSettings, StandIn
from workers.contract.errors import EngineError, Infeasible, Unsupported
from workers.contract.measurement import Memory, Pass, PassKind
from workers.contract.trace import Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Loaded, Site
from workers.hardware.device import UnknownDevice, device
from workers.hardware.roofline import (
    GIB,
    VERSION,
    Prediction,
    device_name,
    predict,
    unpredictable,
)
from workers.moe import hub, positions
from workers.moe.architecture import UnknownModel, check, structure
from workers.moe.structure import Architecture

PACE = "pace"
"""Key of `engine.args`: real seconds per predicted second."""


def pace(engine: EngineSettings) -> float | None:
    """Real seconds that a predicted second takes; null where nothing waits.

    Raises:
        Unsupported: it is not a number of at least 0.
    """
    asked = engine.args.get(PACE)
    if asked is None:
        return None
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked < math.inf:
        raise Unsupported(
            f"engine.args.{PACE} is {asked!r}: engine roofline takes a number of at least 0"
        )
    return float(asked)


class RooflineEngine:
    """Predicted passes; see `workers.engines.base.Engine`."""

    loaded: Loaded

    def __init__(self, trial: Trial, workloads: Sequence[Workload], site: Site) -> None:
        began = time.monotonic()
        self._workloads = workloads
        self._pace = pace(trial.engine)
        self._load_s = 0.0
        try:
            self._device = device(site.device)
        except UnknownDevice as error:
            raise Unsupported(str(error)) from error
        try:
            self._load(trial)
        finally:  # memory that runs out takes its time as well
            self._wait(began, self._load_s)

    @classmethod
    def prepare(cls) -> None:
        """Nothing is imported that is not there already."""

    @classmethod
    def stands_for(cls, device: str) -> StandIn | None:
        return StandIn(version=VERSION, device=device_name(device))

    @classmethod
    def refuses(cls, trial: Trial) -> str | None:
        asked = {
            "workload.arrivals": trial.workload.arrivals,
            "engine.routing": trial.engine.routing,
            "engine.speculative": trial.engine.speculative,
            "measure.activation": trial.measure.activation,
            "measure.accuracy": trial.measure.accuracy,
            "measure.energy": trial.measure.energy,
        }
        for key, value in asked.items():
            if value:
                return f"engine roofline does not predict {key}"
        try:
            pace(trial.engine)
            arguments.check(trial)
            positions.limit(trial).check(trial.workload)
        except (Unsupported, UnknownModel) as error:
            return str(error)
        return None

    def become(self, trial: Trial) -> bool:
        try:
            self._load(trial)
        except EngineError:
            return False  # said again by the engine that is built for it
        return True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        *,
        kind: PassKind,
        repeat: int,
        temperature: float = 0.0,
    ) -> Pass:
        began, started_at = time.monotonic(), time.time()
        workload = replace(
            self._trial.workload,
            batch_size=len(prompts),
            input_tokens=len(prompts[0]),
            output_tokens=output_tokens,
        )
        prediction = self._predict(workload)
        if prediction.oom is not None:
            raise prediction.oom
        tokens, steps = _stamps(prediction, len(prompts))
        e2e_s = max(row[-1] for row in tokens)
        self._wait(began, e2e_s)
        return Pass(
            kind=kind,
            repeat=repeat,
            started_at=started_at,
            e2e_s=e2e_s,
            input_tokens=workload.input_tokens,
            token_s=tokens,
            step_s=steps,
        )

    def trace(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int | Sequence[int],
        *,
        routes: bool = False,
        temperature: float = 0.0,
    ) -> Trace:
        """Refuses: an expectation under uniform routing is no count, and records already say
        where they use it."""
        raise Unsupported("engine roofline routes no tokens, so there is nothing to trace")

    def tokenizer(self) -> None:
        """Prompts are only counted."""

    def reference(self) -> None:
        return None

    def memory(self) -> Memory:
        one = self._largest
        return Memory(
            weights=round(one.weights_gib * GIB),
            kv_cache=round(one.kv_cache_gib * GIB),
            peak=round(min(one.memory_gib, one.limit_gib) * GIB),
            limit=round(one.limit_gib * GIB),
        )

    def close(self) -> None:
        """Nothing is held."""

    def _wait(self, began: float, predicted_s: float) -> None:
        """Until what began then has taken its predicted seconds, in the time that the pace
        makes of them."""
        if self._pace is not None:
            time.sleep(max(0.0, began + predicted_s * self._pace - time.monotonic()))

    def _load(self, trial: Trial) -> None:
        self._trial = trial
        self._architecture = _structure(trial)
        predictions = [self._predict(one) for one in self._workloads]
        self._load_s = max(one.load_s for one in predictions)
        for one in predictions:
            if one.oom is not None and one.oom.stage in ("load", "kv_cache"):
                raise one.oom
        self._largest = max(predictions, key=lambda one: one.memory_gib)
        self.loaded = Loaded(
            version=VERSION,
            args=asdict(self._device),
            architecture=self._architecture,
            threads=None,
        )

    def _predict(self, workload: Workload) -> Prediction:
        trial = replace(self._trial, workload=workload)
        prediction = predict(self._architecture, trial, self._device)
        if prediction is None:
            reason = unpredictable(self._architecture, trial)
            raise Unsupported(f"the roofline cannot tell what {trial.model.name} costs: {reason}")
        return prediction


def _structure(trial: Trial) -> Architecture:
    try:
        architecture = structure(trial)
        if architecture is not None:
            if architecture.exact:
                check(architecture, trial.layout)
            return architecture
    except (UnknownModel, Infeasible) as error:
        raise Unsupported(str(error)) from error
    raise Unsupported(hub.absent(trial.model.name, trial.model.revision))


def _stamps(one: Prediction, batch: int) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """When each request's tokens come, and when each pass ends: wave after wave, the
    prompts in as many passes as they need, then decode in lockstep."""
    decoding: list[tuple[float, ...]] = []
    steps: list[float] = []
    for number, wave in enumerate([one.wave] * (one.waves - 1) + [one.last]):
        start = number * one.wave.seconds
        steps += [start + wave.prefill_s * (i + 1) / wave.passes for i in range(wave.passes)]
        step_s = wave.step_s or 0.0
        later = tuple(start + wave.prefill_s + (i + 1) * step_s for i in range(wave.steps))
        steps += later
        decoding.append(later)
    # Replicas of a data-parallel layout do the same at the same time.
    places = [request % one.requests for request in range(batch)]
    tokens = [(one.first_token_s(at), *decoding[at // one.wave.requests]) for at in places]
    return tuple(tokens), tuple(steps)
