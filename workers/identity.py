"""Which trial a trial is: its identity, after everything that has another name is resolved.

A result may stand for a trial only if nothing that decides its numbers differs. So identities
are hashes not of what was typed but of what it stands for: a model's and a draft's content
(`workers.moe.content`), the texts behind `workload.dataset`, and, where text is turned into
tokens, the tokenizer. A folder that moved or a relative name from elsewhere is the same trial;
other files under the old name are another one.

The other way round, what is spelled differently and runs equally is one trial: null beside the
model's own number, 1 beside 1.0 among the engine's arguments. That goes field by field. Two
points that merely come to one structure (half of the experts pruned, beside a configuration with
half as many; two ratios that round to as many) stay two: the records say different things of them.

Where this machine cannot tell what a name stands for, the name counts, and `unknown` says so.
A sweep of a hundred thousand points has few models and workloads, so a block is turned into text
once and found again by its `id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

from workers.contract.engine import EngineSettings
from workers.contract.errors import Infeasible
from workers.contract.fingerprint import Fingerprints, digits, json_text
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.moe import drafts
from workers.moe.architecture import (
    UnknownModel,
    bend,
    catalogue,
    catalogue_name,
    configuration,
    resolve,
)
from workers.moe.content import Content, content, tokenizer
from workers.moe.structure import Architecture

FORMAT = 2
"""Version of identities. Those of version 0.1.0 (`Trial.named_id`) went by names."""
DIGESTS = ("model_digest", "draft_digest", "dataset_digest")
"""Columns of a record that say what its names stood for."""

_SHAPE = ("ffn_dim", "num_experts", "top_k", "num_layers")
_PLAIN = ("dtype", "quantization", "scale", "trust_remote_code", "weights")
_NAMED = ("name", "revision", "weights", "trust_remote_code")
_shape = attrgetter(*_SHAPE)
_named = attrgetter(*_NAMED)
"""All of a model that decides which content it has."""
_kind = attrgetter(*_NAMED, "dtype", "quantization", "scale")
"""All of a model but its shape and its pruning."""
_DEFAULTS = {one.name: one.default for one in fields(Model)}


class Identities:
    """Identities of the trials of one sweep, and what is behind the names in them.

    What a name stands for is looked up once. Blocks of trials must not change meanwhile.
    """

    def __init__(self) -> None:
        self.unknown: dict[str, str] = {}
        """Names that count as they are, and why."""
        self._plain = Fingerprints()
        self._models: dict[bool, dict[int, tuple[Model, str]]] = {False: {}, True: {}}
        self._fixed: dict[tuple[Any, ...], tuple[str, Mapping[str, int]]] = {}
        self._workloads: dict[int, tuple[Workload, str]] = {}
        self._measures: dict[int, tuple[Measure, str]] = {}
        self._engines: dict[tuple[Any, ...], tuple[EngineSettings, str]] = {}
        self._contents: dict[tuple[Any, ...], Content] = {}
        self._texts: dict[str, Content] = {}
        self._digests: dict[tuple[Any, ...], Mapping[str, str]] = {}

    def trial_id(self, trial: Trial) -> str:
        """Identity of the whole trial: 16 hexadecimal digits."""
        workload, measure = trial.workload, trial.measure
        tokenised = workload.dataset is not None or bool(measure.accuracy)
        known = self._workloads.get(id(workload))
        if known is None:
            known = self._workloads[id(workload)] = (workload, self._workload(workload))
        how = self._measures.get(id(measure))
        if how is None:
            how = self._measures[id(measure)] = (measure, self._plain.text(_bounded(measure)))
        layout = self._plain.text(trial.layout)
        model, engine = self._model(trial.model, tokenised), self._engine(trial.model, trial.engine)
        return digits(f"[{FORMAT},{model},{layout},{known[1]},{engine},{how[1]}]")

    def engine_key(self, model: Model, layout: Layout, engine: EngineSettings) -> str:
        """Identity of what a loaded engine is built from: 16 hexadecimal digits."""
        parts = self._model(model, False), self._plain.text(layout), self._engine(model, engine)
        return digits(f"[{FORMAT},{','.join(parts)}]")

    def digests(self, trial: Trial) -> Mapping[str, str]:
        """The columns `DIGESTS` of its record, those that are known."""
        drafted = trial.engine.speculative is not None
        key = (*_named(trial.model), id(trial.engine) if drafted else 0)
        known = self._digests.get(key)
        if known is None:
            found = {"model_digest": self._content(trial.model).digest}
            if (draft := drafts.draft(trial)) is not None:
                found["draft_digest"] = self._content(draft).digest
            known = {name: digest for name, digest in found.items() if digest is not None}
            self._digests[key] = known
        if trial.workload.dataset is None:
            return known
        digest = self._dataset(trial.workload.dataset).digest
        return known if digest is None else {**known, "dataset_digest": digest}

    def _model(self, model: Model, tokenised: bool) -> str:
        models = self._models[tokenised]
        known = models.get(id(model))
        if known is None:
            known = models[id(model)] = (model, self._model_text(model, tokenised))
        return known[1]

    def _model_text(self, model: Model, tokenised: bool) -> str:
        kind = (tokenised, *_kind(model))
        known = self._fixed.get(kind)
        if known is None:
            fixed = self._fixed_text(model, tokenised)
            known = self._fixed[kind] = (fixed, _own_shape(model.name, model.revision))
        fixed, own = known
        parts = [fixed]
        for name, value in zip(_SHAPE, _shape(model), strict=True):
            if value is not None and value != own.get(name):
                parts.append(f'"{name}":{value}')
        if model.prune is not None:
            parts.append(f'"prune":{self._plain.text(_pruning(model, model.prune))}')
        return f"{{{','.join(parts)}}}"

    def _fixed_text(self, model: Model, tokenised: bool) -> str:
        """All of a model but its shape, as the inside of a JSON object."""
        told = {"model": self._stands_for(model)}
        told |= {
            name: value for name in _PLAIN if (value := getattr(model, name)) != _DEFAULTS[name]
        }
        if tokenised:
            found = tokenizer(model)
            if found.digest is None:
                self.unknown.setdefault(f"the tokenizer of {model.name}", str(found.unknown))
            told["tokenizer"] = found.digest or _by_name(model)
        return json_text(told)[1:-1]

    def _stands_for(self, model: Model) -> Any:
        """What stands for the model's name."""
        found = self._content(model)
        if found.digest is not None:
            return found.digest
        self.unknown.setdefault(model.name, str(found.unknown))
        return _by_name(model)

    def _content(self, model: Model) -> Content:
        key = _named(model)
        if key not in self._contents:
            self._contents[key] = content(model)
        return self._contents[key]

    def _workload(self, workload: Workload) -> str:
        if workload.dataset is None:
            return self._plain.text(workload)
        found = self._dataset(workload.dataset)
        source = workload.dataset
        if found.digest is None:
            self.unknown.setdefault(source, str(found.unknown))
        source = f"texts {found.digest}" if found.digest is not None else f"name {source}"
        return self._plain.text(replace(workload, dataset=source))

    def _dataset(self, dataset: str) -> Content:
        if dataset not in self._texts:
            from workers.texts import digest

            try:
                self._texts[dataset] = Content(digest=digest(dataset))
            except (OSError, ValueError) as error:  # TextError, or what can be no file's name
                self._texts[dataset] = Content(digest=None, unknown=str(error))
        return self._texts[dataset]

    def _engine(self, model: Model, engine: EngineSettings) -> str:
        key: tuple[Any, ...] = (id(engine),)
        if engine.speculative is not None:  # its draft has weights and types like the target's
            key = (id(engine), model.weights, model.trust_remote_code)
        known = self._engines.get(key)
        if known is None:
            known = self._engines[key] = (engine, self._engine_text(model, engine))
        return known[1]

    def _engine_text(self, model: Model, engine: EngineSettings) -> str:
        told = replace(engine, args=_numbers(engine.args) | _folders(engine.args))
        if engine.speculative is not None:
            speculative = replace(
                engine.speculative,
                method=engine.speculative.way,
                args=_numbers(engine.speculative.args),
            )
            draft = drafts.draft(Trial(model=model, engine=engine))
            if draft is not None:
                speculative = replace(
                    speculative,
                    model=f"model {json_text(self._stands_for(draft))}",
                    args={k: v for k, v in speculative.args.items() if k != "revision"},
                )
            told = replace(told, speculative=speculative)
        return self._plain.text(told)


def _bounded(measure: Measure) -> Measure:
    """With the bound on repeats that holds where none is asked for; without a width to reach
    there is nothing to bound."""
    most = None if measure.ci_width is None else measure.most_repeats
    return replace(measure, max_repeats=most)


def _by_name(model: Model) -> dict[str, Any]:
    """What stands for a model of which only the name is known."""
    known = catalogue_name(model.name)
    name = model.name if known is None else catalogue()[known]["hub_id"]
    return {"name": name, "revision": model.revision}


def _pruning(model: Model, prune: Prune) -> Prune:
    """Random weights have nothing to choose by."""
    return replace(prune, criterion="random") if model.weights == "dummy" else prune


def _own_shape(name: str, revision: str | None) -> Mapping[str, int]:
    try:
        config = configuration(name, revision)
        model = Model(name=name, revision=revision, weights="dummy")
        a = None if config is None else resolve(model)
    except (UnknownModel, Infeasible):  # the plan says it with its place
        return {}
    if config is None or a is None:
        return {}
    return {key: getattr(a, key) for key in _SHAPE if _changes_nothing(config, name, key, a)}


def _changes_nothing(config: Mapping[str, Any], name: str, key: str, a: Architecture) -> bool:
    """Whether asking for the model's own number leaves its configuration as it is."""
    try:
        return bend(config, Model(name=name, **{key: getattr(a, key)})) == config
    except (UnknownModel, ValueError):  # no place for it, or 0
        return False


def _folders(args: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's arguments that name a model's files, by content where that is known."""
    look = {"tokenizer": tokenizer, "hf_config_path": content}
    named = {key: args[key] for key in look if isinstance(args.get(key), str) and args[key].strip()}
    found = {
        key: look[key](Model(name=name, weights="dummy")).digest
        for key, name in named.items()
        if name.isprintable()
    }
    return {key: f"content {digest}" for key, digest in found.items() if digest is not None}


def _numbers(value: Any) -> Any:
    """Plain data in which equal numbers have one spelling."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(inner) for inner in value]
    return value
