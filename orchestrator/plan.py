"""From points to ordered groups, before any machine is asked for.

Trials that can be measured on the weights of one engine make a group, and the group is the
unit of work (`engine_group`). Each trial is checked against the arithmetic of its layout and
predicted by the roofline. The longest group goes first: what is started last should be
short, or the end of a sweep is one device working while the others wait. Groups that are
predicted not to fit go last (`_turn`). A prediction never keeps a trial from running.

A hundred thousand points share few models, layouts and engines, and the grid hands their
blocks out as shared objects, so all that does not depend on the workload is worked out once
per engine and found again by the identity of those objects.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from operator import attrgetter
from typing import Any

from orchestrator.errors import Place
from orchestrator.grid import Expansion, Point, uncollected
from orchestrator.needs import Absent
from orchestrator.sweep import Sweep
from workers.contract import arguments
from workers.contract.engine import EngineSettings
from workers.contract.errors import Contradiction, Infeasible, Unsupported
from workers.contract.fingerprint import Fingerprints
from workers.contract.layout import Layout
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.roofline_engine import pace
from workers.hardware.device import Device, UnknownDevice
from workers.hardware.device import device as find_device
from workers.hardware.roofline import Prediction, Roofline, roofline, unpredictable
from workers.identity import Identities
from workers.moe import drafts, generators, hub, positions
from workers.moe.architecture import UnknownModel, Unread, check, resolve
from workers.moe.overrides import of as overrides_of
from workers.moe.structure import Architecture

ENGINE_SECTIONS = ("model", "layout", "engine")
"""Sections of a trial that its engine is built from."""
TOP_K = "model.top_k"
"""The one field of them that may vary within a group."""
_NAMED = 4
"""Names that are listed in one line; the rest is counted."""
DETAILED = 1_000
"""Trials of a plan that is told with what its models are made of."""
LOADING = ("vllm", "transformers")
"""Engines that load a model."""
ROOFLINE_S = 0.01
"""Building a roofline engine, seconds: it only computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One trial with what is known of it before it runs."""

    trial: Trial
    trial_id: str
    axes: Mapping[str, Any]
    prediction: Prediction | None = None
    """Null where the model's structure is not spelled out."""
    unpredicted: str | None = None
    """Why there is no prediction; null where there is one."""
    infeasible: Infeasible | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    """Columns of its record that say what its names stand for (`workers.identity.DIGESTS`)."""

    @property
    def predicted(self) -> Mapping[str, Any]:
        """The `predicted_*` columns of its record."""
        if self.prediction is not None:
            return self.prediction.columns()
        return {"predicted_reason": self.unpredicted} if self.unpredicted else {}

    @property
    def predicted_s(self) -> float:
        """Warm-ups, and repeats with their one-token passes, in seconds.

        0 if unknown, and where it is predicted to run out of memory: that takes as long as
        building the engine.
        """
        if self.prediction is None or self.prediction.oom is not None:
            return 0.0
        if self.trial.engine.kind == "roofline":
            each = self.prediction.e2e_s + self.prediction.prefill_s
            return each * (_pace(self.trial) or 0.0)  # one of each pass, and no warm-up
        measure, known = self.trial.measure, self.prediction
        repeat_s = known.e2e_s + known.prefill_s
        return measure.warmup * known.e2e_s + measure.repeats * repeat_s


@dataclass(frozen=True, kw_only=True, slots=True)
class _Estimate:
    """What the predictions of a group's trials come to."""

    load_s: float
    passes_s: float
    memory_gib: float | None
    limit_gib: float | None
    oom: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Trials that share the weights of one engine, those with one top-k side by side."""

    group_id: str
    devices: int
    trials: tuple[Planned, ...]
    label: str
    """What sets this engine apart within the sweep."""

    @property
    def held(self) -> int:
        """Devices that its process really holds: one slot where the engine only predicts, and
        does not take the time that it predicts."""
        first = self.trials[0].trial
        return 1 if self.predicts and _pace(first) is None else self.devices

    @property
    def predicts(self) -> bool:
        """Whether its engine computes figures instead of measuring them."""
        return self.trials[0].trial.engine.kind == "roofline"

    @property
    def predicted_load_s(self) -> float:
        """Building the engine once and ending it, in seconds; 0 if unknown."""
        if self.predicts:
            return ROOFLINE_S + self._estimate.load_s * (_pace(self.trials[0].trial) or 0.0)
        return self._estimate.load_s

    @property
    def predicted_passes_s(self) -> float:
        """Warm-ups and repeats of every trial, in seconds; 0 if unknown."""
        return self._estimate.passes_s

    @cached_property
    def predicted_s(self) -> float:
        """Building the engine once and measuring every trial, in seconds."""
        return self.predicted_load_s + self.predicted_passes_s

    @property
    def unpredicted(self) -> tuple[str, ...]:
        """Why trials have no prediction, each reason once; empty where all have one."""
        return tuple(dict.fromkeys(one.unpredicted for one in self.trials if one.unpredicted))

    @property
    def predicted_memory_gib(self) -> float | None:
        """Memory that the most demanding trial needs on one device."""
        return self._estimate.memory_gib

    @property
    def memory_limit_gib(self) -> float | None:
        """What one device may use: the sweep's limit, else the device's memory."""
        asked = self.trials[0].trial.engine.memory_limit_gib
        return asked if asked is not None else self._estimate.limit_gib

    @property
    def predicted_oom(self) -> int:
        """Trials that are predicted to run out of memory."""
        return self._estimate.oom

    @cached_property
    def _estimate(self) -> _Estimate:
        load_s = passes_s = 0.0
        memory = limit = None
        oom = 0
        for one in self.trials:
            known = one.prediction
            if known is None:
                continue
            passes_s += one.predicted_s
            ending_s = 0.0 if self.predicts else known.close_s
            load_s = max(load_s, known.load_s + ending_s)
            memory = max(memory or 0.0, known.memory_gib)
            limit = max(limit or 0.0, known.limit_gib)
            oom += known.oom is not None
        return _Estimate(
            load_s=load_s, passes_s=passes_s, memory_gib=memory, limit_gib=limit, oom=oom
        )

    def only(self, trial_ids: Iterable[str]) -> Group | None:
        """This group with the given trials left, or null if none is."""
        keep = frozenset(trial_ids)
        trials = tuple(one for one in self.trials if one.trial_id in keep)
        if not trials:
            return None
        return Group(group_id=self.group_id, devices=self.devices, trials=trials, label=self.label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All of a sweep, in the order in which it will be started."""

    sweep: str
    profile: str
    points: int
    """Points of the grid before constraints."""
    dropped: Mapping[str, int]
    """Constraint → points it dropped."""
    infeasible: tuple[Planned, ...]
    groups: tuple[Group, ...]
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Names of which nobody here can tell what they stand for, and why; identities go by them."""
    absent: tuple[Absent, ...] = ()
    """What its trials name and this machine has not."""

    def due(
        self, settled: Container[str] = (), limit: int | None = None
    ) -> tuple[list[Group], list[Planned]]:
        """Groups and infeasible points that owe a record.

        Args:
            settled: trials that have one.
            limit: so many trials of groups at most; null for all.
        """
        room = limit if limit is not None else sys.maxsize
        groups = []
        for group in self.groups:
            owed = [one.trial_id for one in group.trials if one.trial_id not in settled]
            if left := group.only(owed[:room]):
                groups.append(left)
                room -= len(left.trials)
        return groups, [one for one in self.infeasible if one.trial_id not in settled]

    def first(self, limit: int | None) -> Plan:
        """What a run begins with that has no records yet, and is to run `limit` trials."""
        return self if limit is None else replace(self, groups=tuple(self.due(limit=limit)[0]))

    notes: tuple[str, ...] = ()
    """What a reader must know of the predictions, and of models that no engine would load."""

    @property
    def trials(self) -> int:
        """Points that get a terminal record, infeasible ones included."""
        return len(self.infeasible) + sum(len(group.trials) for group in self.groups)

    def named_ids(self) -> set[str]:
        """What version 0.1.0 called these trials."""
        names = Fingerprints()
        grouped = (one for group in self.groups for one in group.trials)
        return {names.of(one.trial) for one in (*self.infeasible, *grouped)}

    @property
    def by_name(self) -> str | None:
        """Which names identities go by, in one line; null where all are resolved."""
        if not self.unknown:
            return None
        told = [f"{name} ({why})" for name, why in self.unknown.items()]
        more = f"; and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
        return (
            "what these names stand for cannot be told here, so trials are identified by the "
            f"names, and a change behind them would not be seen: {'; '.join(told[:_NAMED])}{more}"
        )

    @property
    def asks_for_sheets(self) -> bool:
        """Whether a trial takes the experts that ran from an earlier probe."""
        trials = (one.trial for group in self.groups for one in group.trials)
        return any(one.measure.activation == "sheet" for one in trials)

    @property
    def predicted_s(self) -> float:
        """All groups one after another, in seconds."""
        return sum(group.predicted_s for group in self.groups)

    @property
    def unpredicted(self) -> Mapping[str, int]:
        """Why trials have no prediction → how many; they are in no sum of the plan."""
        trials = (one for group in self.groups for one in group.trials)
        return Counter(one.unpredicted for one in trials if one.unpredicted)

    @property
    def device_hours(self) -> float:
        """Devices held times time held."""
        return sum(group.predicted_s * group.devices for group in self.groups) / 3600

    def to_json(self) -> dict[str, Any]:
        """The answer of `--dry-run --json`; of a small plan with what its models are made of."""
        detailed = self.trials <= DETAILED
        return {
            "sweep": self.sweep,
            "profile": self.profile,
            "points": self.points,
            "trials": self.trials,
            "dropped": dict(self.dropped),
            "infeasible": [
                {
                    "trial_id": one.trial_id,
                    "axes": dict(one.axes),
                    "reason": str(one.infeasible),
                    "digests": one.digests,
                    **({"named_ids": [one.trial.named_id]} if detailed else {}),
                }
                for one in self.infeasible
            ],
            "groups": [
                {
                    "group_id": group.group_id,
                    "label": group.label,
                    "devices": group.devices,
                    "trials": len(group.trials),
                    "trial_ids": [one.trial_id for one in group.trials],
                    "digests": group.trials[0].digests,
                    "predicted_memory_gib": group.predicted_memory_gib,
                    "memory_limit_gib": group.memory_limit_gib,
                    "predicted_oom": group.predicted_oom,
                    "predicted_seconds": None if group.unpredicted else group.predicted_s,
                    "unpredicted": list(group.unpredicted),
                    **(_details(group) if detailed else {}),
                }
                for group in self.groups
            ],
            "unpredicted": [
                {"reason": reason, "trials": count} for reason, count in self.unpredicted.items()
            ],
            "predicted_seconds": self.predicted_s,
            "predicted_device_hours": self.device_hours,
        }


def build(sweep: Sweep, expansion: Expansion, device: Device) -> Plan:
    """The plan of an expanded sweep on devices of one class.

    Raises:
        SweepError: a model that is neither in the catalogue, nor a folder, nor a hub id, or that
            this machine lacks and may not fetch.
    """
    planner = _Planner(sweep, device, expansion.identities)
    infeasible: list[Planned] = []
    groups: dict[str, list[Planned]] = {}
    with uncollected():
        for point in expansion.points:
            planned, group_id = planner.plan(point)
            if planned.infeasible is not None:
                infeasible.append(planned)
            else:
                groups.setdefault(group_id, []).append(planned)
        built = [_group(group_id, trials) for group_id, trials in groups.items()]
        built.sort(key=_turn)
    return Plan(
        sweep=sweep.name,
        profile=sweep.profile,
        points=expansion.size,
        dropped=expansion.dropped,
        infeasible=tuple(infeasible),
        groups=tuple(built),
        unknown=dict(expansion.identities.unknown),
        notes=_notes(built),
    )


def _details(group: Group) -> dict[str, Any]:
    """The structure that its first trial runs, as far as it is known, and what version 0.1.0
    called its trials."""
    try:
        structure = _dimensions(_structure(group.trials[0].trial.model))
    except Unread:  # which the trial says as `unpredicted`
        structure = None
    return {
        "named_ids": [one.trial.named_id for one in group.trials],
        "structure": structure,
    }


def _dimensions(a: Architecture | None) -> dict[str, int] | None:
    """Columns of a record; null where only the engine can find out."""
    if a is None:
        return None
    names = ("num_layers", "hidden_size", "ffn_dim", "num_experts", "top_k", "shared_experts")
    counted = ("params_total", "params_active") if a.exact else ()
    return {name: getattr(a, name) for name in (*names, *counted)}


def engine_group(trial: Trial) -> tuple[Model, Layout, EngineSettings]:
    """What trials must have in common to be measured on one engine's weights.

    Top-k is no weight: an engine that runs its model's own Python code can be given another
    one where it stands. One that was compiled or captured into graphs has it built in, so
    there every top-k is an engine of its own.
    """
    model = trial.model
    if trial.engine.eager and model.top_k is not None:
        model = replace(model, top_k=None)
    return model, trial.layout, trial.engine


def own_dimensions(model: Model) -> Mapping[str, Any]:
    """Shape of a model as constraints see it, for fields that the sweep leaves to it."""
    try:
        a = _structure(model)
    except (UnknownModel, Infeasible):
        a = None  # reported for the point itself, with its line
    if a is None:
        return {}
    return {
        "ffn_dim": a.ffn_dim,
        "num_experts": a.num_experts,
        "top_k": a.top_k,
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
    }


def forget() -> None:
    """Models are read again: their files may have changed since the last plan."""
    _resolved.cache_clear()


@dataclass(kw_only=True, slots=True)
class _Costs:
    """What is known of all engines that cost the same, whatever else sets them apart."""

    roofline: Roofline | None = None
    unpredicted: str | None = None
    """Why there is no roofline."""
    infeasible: Infeasible | None = None
    limit: positions.Limit | None = None
    """The longest request that they serve; null where they serve none."""
    predictions: dict[int, Prediction] = field(default_factory=dict)
    """By `id` of a workload."""
    too_long: dict[int, Infeasible] = field(default_factory=dict)
    """Likewise, of workloads that they cannot serve."""

    def refusal(self, workload: Workload) -> Infeasible | None:
        """Why they cannot run `workload`."""
        if self.infeasible is not None or self.limit is None:
            return self.infeasible
        if workload.tokens_per_request <= self.limit.tokens:
            return None
        found = self.too_long.get(id(workload))
        if found is None:
            try:
                self.limit.check(workload)
            except Infeasible as error:
                found = self.too_long[id(workload)] = error.with_traceback(None)
        return found


class _Planner:
    """Plans points one by one, and remembers what the next one can use.

    Memories go by the `id` of blocks, which the points keep alive.
    """

    def __init__(self, sweep: Sweep, device: Device, identities: Identities) -> None:
        self._sweep, self._device, self._identities = sweep, device, identities
        self._engines: dict[tuple[int, int, int], tuple[_Costs, str]] = {}
        self._costs: dict[tuple[Any, ...], _Costs] = {}
        self._weights: dict[tuple[int, bool], Model] = {}

    def plan(self, point: Point) -> tuple[Planned, str]:
        """The point with what is known of it, and its group; none if it is infeasible."""
        trial = point.trial
        engine = (id(trial.model), id(trial.layout), id(trial.engine))
        known = self._engines.get(engine)
        if known is None:
            known = self._engines[engine] = self._engine(trial)
        costs, group_id = known
        infeasible = costs.refusal(trial.workload)
        prediction = None
        if costs.roofline is not None and infeasible is None:
            workload = id(trial.workload)
            prediction = costs.predictions.get(workload)
            if prediction is None:
                prediction = costs.roofline.predict(trial.workload)
                costs.predictions[workload] = prediction
        planned = Planned(
            trial=trial,
            trial_id=point.trial_id,
            axes=point.axes,
            prediction=prediction,
            unpredicted=costs.unpredicted,
            infeasible=infeasible,
            digests=self._identities.digests(trial),
        )
        return planned, group_id

    def _engine(self, trial: Trial) -> tuple[_Costs, str]:
        model = trial.model
        alike = (
            *_shape(model), model.dtype, model.quantization, id(trial.layout), id(trial.engine)
        )  # fmt: skip
        costs = self._costs.get(alike)
        if costs is None:
            costs = self._costs[alike] = self._cost(trial)
        return costs, "" if costs.infeasible is not None else self._group_id(trial)

    def _cost(self, trial: Trial) -> _Costs:
        """The roofline of an engine, or why it cannot be."""
        asked, device = trial.layout.device, self._device
        found = _Costs()
        try:
            arguments.check(trial)
            if asked is not None:
                device = find_device(asked)
            if trial.engine.kind in LOADING:
                generators.check(trial)
            found.limit = positions.limit(trial)
            architecture = _structure(trial.model, trial.engine)
            if architecture is None:
                found.unpredicted = hub.absent(trial.model.name, trial.model.revision)
                return found
            if architecture.exact:
                check(architecture, trial.layout)
            drafted = self._draft(trial)
            found.roofline = roofline(architecture, trial, device, drafted)
            if found.roofline is None:
                reason = unpredictable(architecture, trial)
                found.unpredicted = f"{trial.model.name}: {reason}"
        except Unread as error:
            found.unpredicted = str(error)
        except UnknownModel as error:
            raise self._sweep.place("model.name", trial.model.name).error(str(error)) from error
        except UnknownDevice as error:
            raise self._sweep.place("layout.device", asked).error(str(error)) from error
        except Contradiction as error:
            raise self._place(trial, error.key).error(str(error)) from error
        except Infeasible as error:
            found.infeasible = error.with_traceback(None)  # which would keep all that it saw
        return found

    def _place(self, trial: Trial, key: str) -> Place:
        """Where the sweep writes `key`, or the innermost block around it."""
        written = key
        while written:
            found = self._sweep.place(written, _at(trial, written))
            if found != Place(self._sweep.path, None, written):
                return found
            written = written.rpartition(".")[0]
        return Place(self._sweep.path, None, key)

    def _draft(self, trial: Trial) -> Architecture | None:
        """The structure of its draft, whose vocabulary is the target's."""
        try:
            drafts.check(trial)
            return drafts.structure(trial)
        except Unread:
            raise
        except UnknownModel as error:
            speculative = trial.engine.speculative
            assert speculative is not None
            key = "engine.speculative"
            place = self._sweep.place(f"{key}.model", speculative.model)
            if place.line is None:
                place = self._sweep.place(key, speculative)
            raise place.error(str(error)) from error

    def _group_id(self, trial: Trial) -> str:
        key = (id(trial.model), trial.engine.eager)
        model = self._weights.get(key)
        if model is None:
            model = self._weights[key] = engine_group(trial)[0]
        return self._identities.engine_key(model, trial.layout, trial.engine)[:12]


def _at(trial: Trial, key: str) -> Any:
    """The value of a trial under a dotted key; null where there is none."""
    value: Any = trial
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value


def _notes(groups: Iterable[Group]) -> tuple[str, ...]:
    """What the predictions leave out, and models that a roofline reads and no engine loads."""
    left_out: Counter[str] = Counter()
    said: dict[str, None] = {}
    for group in groups:
        first = group.trials[0]
        if first.prediction is not None:
            left_out.update(dict.fromkeys(first.prediction.ignores, len(group.trials)))
        if group.predicts:
            try:
                generators.check(first.trial)
            except Infeasible as error:
                said[f"vLLM would not run this: {error}"] = None
        said |= dict.fromkeys(_short_draft(group))
    told = ", ".join(f"{key} ({count} trials)" for key, count in sorted(left_out.items()))
    notes = [f"predictions do not cover {told}"] if told else []
    return (*notes, *said)


def _short_draft(group: Group) -> Iterator[str]:
    """Says that a draft has fewer positions than requests have tokens."""
    trial = group.trials[0].trial
    most = positions.drafted(trial) if trial.engine.speculative is not None else None
    longest = max(one.trial.workload.tokens_per_request for one in group.trials)
    if most is not None and longest > most:
        assert trial.engine.speculative is not None
        yield (
            f"the draft {trial.engine.speculative.model} proposes nothing beyond its {most:,} "
            f"positions; requests have up to {longest:,} tokens"
        )


def _group(group_id: str, trials: list[Planned]) -> Group:
    """A group of `trials`, which come in the order of the grid."""
    first = trials[0]
    together = any(one.trial.model.top_k != first.trial.model.top_k for one in trials)
    if together:
        trials.sort(key=_top_k)
    parts = [
        f"{name} {_in_words(value)}"
        for key, value in first.axes.items()
        if (name := _engine_field(key)) and not (together and key == TOP_K)
    ]
    return Group(
        group_id=group_id,
        devices=first.trial.layout.devices,
        trials=tuple(trials),
        label=" · ".join(parts) or first.trial.model.name,
    )


def _in_words(value: Any) -> str:
    """A value of an axis; of a block its values alone."""
    return " ".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


@cache
def _engine_field(key: str) -> str:
    """What an engine is built from, without its section; empty for any other key."""
    section, _, name = key.partition(".")
    return name if section in ENGINE_SECTIONS else ""


def _turn(group: Group) -> tuple[bool, float]:
    """Place of a group in the plan; equal ones stay in the order of the grid.

    Longest predicted first. Groups of which no trial is predicted to fit go last, least
    demanding first: each costs no more than a load, so they fill the end of a sweep where
    anything longer would be waited for, and the first that really runs out of memory spares
    all those behind it that need at least as much.
    """
    if group.predicted_oom == len(group.trials):
        memory, limit = group.predicted_memory_gib, group.trials[0].prediction
        assert memory is not None and limit is not None
        return True, memory / limit.limit_gib
    return False, -group.predicted_s


def _pace(trial: Trial) -> float | None:
    """Real seconds per predicted second of a roofline engine; null where it does not wait.

    One that will refuse to run does not wait either.
    """
    try:
        return pace(trial.engine)
    except Unsupported:
        return None


def _top_k(planned: Planned) -> int:
    """Routed experts per token, the model's own where none is asked for."""
    model = planned.trial.model
    if model.top_k is not None:
        return model.top_k
    architecture = _structure(model, planned.trial.engine)
    return architecture.top_k if architecture is not None else 0


_shape = attrgetter(
    "name", "revision", "ffn_dim", "num_experts", "top_k", "num_layers", "scale", "prune"
)
"""All of a model that its structure follows from."""


def _structure(model: Model, engine: EngineSettings | None = None) -> Architecture | None:
    overrides = overrides_of(engine) if engine is not None else None
    told = json.dumps(overrides, sort_keys=True) if overrides else None
    return _resolved(told, *_shape(model))


@lru_cache(maxsize=16_384)
def _resolved(overrides: str | None, *shape: Any) -> Architecture | None:
    return resolve(_bare(*shape), json.loads(overrides) if overrides else None)


def _bare(
    name: str,
    revision: str | None,
    ffn_dim: int | None,
    num_experts: int | None,
    top_k: int | None,
    num_layers: int | None,
    scale: float,
    prune: Prune | None,
) -> Model:
    """A model of that shape, whatever its weights."""
    return Model(
        name=name,
        revision=revision,
        weights="dummy",  # which may be scaled
        ffn_dim=ffn_dim,
        num_experts=num_experts,
        top_k=top_k,
        num_layers=num_layers,
        scale=scale,
        prune=prune,
    )
