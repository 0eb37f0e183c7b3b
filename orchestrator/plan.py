"""From points to ordered groups, before any machine is asked for.

Trials with one engine key share an engine, so the unit of work is the group. Each trial
is checked against the arithmetic of its layout and predicted by the roofline. The longest
group goes first: what is started last should be short, or the end of a sweep is one
device working while the others wait. A prediction never keeps a trial from running.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.grid import Expansion, Point
from orchestrator.sweep import Sweep
from workers.contract.errors import Infeasible
from workers.contract.fingerprint import fingerprint
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.hardware.device import Device, UnknownDevice
from workers.hardware.device import device as find_device
from workers.hardware.roofline import Prediction, predict
from workers.moe.architecture import UnknownModel, check, resolve
from workers.moe.structure import Architecture

ENGINE_SECTIONS = ("model", "layout", "engine")
"""Sections of a trial that its engine is built from."""
ROOFLINE_S = 0.01
"""A trial of the roofline engine, seconds: it only computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One trial with what is known of it before it runs."""

    trial: Trial
    trial_id: str
    axes: Mapping[str, Any]
    prediction: Prediction | None = None
    """Null where the model's structure is not spelled out."""
    infeasible: Infeasible | None = None

    @property
    def predicted_s(self) -> float:
        """Warm-ups and repeats, each with its one-token pass, in seconds.

        0 if unknown, and where it is predicted to run out of memory: that takes as long as
        building the engine.
        """
        if self.prediction is None or self.prediction.oom is not None:
            return 0.0
        if self.trial.engine.kind == "roofline":
            return 0.0
        measure = self.trial.measure
        passes = measure.warmup + measure.repeats
        return passes * (self.prediction.e2e_s + self.prediction.prefill_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Trials that share one engine."""

    group_id: str
    devices: int
    trials: tuple[Planned, ...]
    label: str
    """What sets this engine apart within the sweep."""

    @property
    def held(self) -> int:
        """Devices that its process really holds: one slot where the engine only predicts."""
        return 1 if self.predicts else self.devices

    @property
    def predicts(self) -> bool:
        """Whether its engine computes figures instead of measuring them."""
        return self.trials[0].trial.engine.kind == "roofline"

    @property
    def predicted_load_s(self) -> float:
        """Building the engine once and ending it, in seconds; 0 if unknown."""
        if self.predicts:
            return ROOFLINE_S
        known = [one.prediction for one in self.trials if one.prediction]
        return max((one.load_s + one.close_s for one in known), default=0.0)

    @property
    def predicted_passes_s(self) -> float:
        """Warm-ups and repeats of every trial, in seconds; 0 if unknown."""
        return sum(one.predicted_s for one in self.trials)

    @property
    def predicted_s(self) -> float:
        """Building the engine once and measuring every trial, in seconds."""
        return self.predicted_load_s + self.predicted_passes_s

    @property
    def predicted_memory_gib(self) -> float | None:
        """Memory that the most demanding trial needs on one device."""
        known = [one.prediction.memory_gib for one in self.trials if one.prediction]
        return max(known, default=None)

    @property
    def memory_limit_gib(self) -> float | None:
        """What one device may use: the sweep's limit, else the device's memory."""
        asked = self.trials[0].trial.engine.memory_limit_gib
        known = [one.prediction.limit_gib for one in self.trials if one.prediction]
        return asked if asked is not None else max(known, default=None)

    @property
    def predicted_oom(self) -> int:
        """Trials that are predicted to run out of memory."""
        return sum(1 for one in self.trials if one.prediction and one.prediction.oom)

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

    @property
    def trials(self) -> int:
        """Points that get a terminal record, infeasible ones included."""
        return len(self.infeasible) + sum(len(group.trials) for group in self.groups)

    @property
    def predicted_s(self) -> float:
        """All groups one after another, in seconds."""
        return sum(group.predicted_s for group in self.groups)

    @property
    def device_hours(self) -> float:
        """Devices held times time held."""
        return sum(group.predicted_s * group.devices for group in self.groups) / 3600

    def to_json(self) -> dict[str, Any]:
        """The answer of `--dry-run --json`."""
        return {
            "sweep": self.sweep,
            "profile": self.profile,
            "points": self.points,
            "trials": self.trials,
            "dropped": dict(self.dropped),
            "infeasible": [
                {"trial_id": one.trial_id, "axes": dict(one.axes), "reason": str(one.infeasible)}
                for one in self.infeasible
            ],
            "groups": [
                {
                    "group_id": group.group_id,
                    "label": group.label,
                    "devices": group.devices,
                    "trials": len(group.trials),
                    "predicted_memory_gib": group.predicted_memory_gib,
                    "memory_limit_gib": group.memory_limit_gib,
                    "predicted_oom": group.predicted_oom,
                    "predicted_seconds": group.predicted_s,
                }
                for group in self.groups
            ],
            "predicted_seconds": self.predicted_s,
            "predicted_device_hours": self.device_hours,
        }


def build(sweep: Sweep, expansion: Expansion, device: Device) -> Plan:
    """The plan of an expanded sweep on devices of one class.

    Raises:
        SweepError: a model that is neither in the catalogue, nor a folder, nor a hub id.
    """
    infeasible: list[Planned] = []
    groups: dict[str, list[Planned]] = {}
    keys: dict[Any, str] = {}
    for point in expansion.points:
        planned = _plan(sweep, point, device)
        if planned.infeasible is not None:
            infeasible.append(planned)
        else:
            groups.setdefault(_engine_key(planned.trial, keys), []).append(planned)
    built = [
        Group(
            group_id=key[:12],
            devices=trials[0].trial.layout.devices,
            trials=tuple(trials),
            label=_label(trials[0]),
        )
        for key, trials in groups.items()
    ]
    built.sort(key=lambda group: group.predicted_s, reverse=True)
    return Plan(
        sweep=sweep.name,
        profile=sweep.profile,
        points=expansion.size,
        dropped=expansion.dropped,
        infeasible=tuple(infeasible),
        groups=tuple(built),
    )


def own_dimensions(model: Model) -> Mapping[str, Any]:
    """Shape of a model as constraints see it, for fields that the sweep leaves to it."""
    try:
        a = _structure(model)
    except (UnknownModel, Infeasible):
        return {}  # reported for the point itself, with its line
    if a is None:
        return {}
    return {
        "ffn_dim": a.ffn_dim,
        "num_experts": a.num_experts,
        "top_k": a.top_k,
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
    }


def _plan(sweep: Sweep, point: Point, device: Device) -> Planned:
    trial = point.trial
    prediction, reason = None, None
    asked = trial.layout.device
    try:
        if asked is not None:
            device = find_device(asked)
        architecture = _structure(trial.model)
        if architecture is not None:
            check(architecture, trial.layout)
            prediction = predict(architecture, trial, device)
    except UnknownModel as error:
        raise sweep.place("model.name", trial.model.name).error(str(error)) from error
    except UnknownDevice as error:
        raise sweep.place("layout.device", asked).error(str(error)) from error
    except Infeasible as error:
        reason = error
    return Planned(
        trial=trial,
        trial_id=trial.trial_id,
        axes=point.axes,
        prediction=prediction,
        infeasible=reason,
    )


@lru_cache(maxsize=100_000)
def _structure(model: Model) -> Architecture | None:
    return resolve(model)


def _engine_key(trial: Trial, known: dict[Any, str]) -> str:
    """`trial.engine_key`, computed once per distinct engine."""
    identity = (trial.model, trial.layout, id(trial.engine))
    if identity not in known:
        known[identity] = fingerprint([trial.model, trial.layout, trial.engine])
    return known[identity]


def _label(planned: Planned) -> str:
    parts = [
        f"{key.partition('.')[2]} {value}"
        for key, value in planned.axes.items()
        if key.partition(".")[0] in ENGINE_SECTIONS
    ]
    return " · ".join(parts) or planned.trial.model.name
