"""Which trials a witnessed out-of-memory makes pointless.

A trial that ran out of memory is a witness against every trial that needs at least as much
of it. "At least as much" is a partial order, and it must never be wrong: a trial that is
skipped is not measured by anybody. So one trial is *at or above* another only where each
tensor that an engine allocates for the first is at least as large for the second; where
that cannot be argued, the two must be equal, or they are not compared. Dimensions are read
off the structure that runs (`workers.moe.structure`), not off names or off what was asked.

In the order, because memory can only grow with it:

- The shape of every weight: FFN widths, hidden size, vocabulary, routers, shared experts,
  heads. Each is a factor of a weight, an activation or the cache.
- Experts per layer (weights), experts per token (workspace of the MoE kernels: tokens ×
  top-k × width).
- Layers, kind by kind. On a pipeline of layers that are all alike: those of the first, the
  last and the longest stage, which carry embedding, head and most layers. Stages of unlike
  layers are cut at other places when the number changes, so there the whole pattern is equal.
- Data type, from 16 to 32 bits: weights, activations and a cache that follows it. The two
  16-bit types are not compared: kernels differ. Quantisation is equal, with its layers: it
  needs workspace of its own, and rules that name layers mean others in a longer model. So is
  a type of the cache that the sweep names: it can change the attention kernel.
- Tensor degree, downwards: each device holds a larger part; repeated KV heads are no
  smaller than cut ones. But fewer devices also talk less, so the weights of a device must
  outgrow what the buffers towards each further one could have taken (`PEER_GIB`).
- Pipeline degree, downwards, by the layers of its stages.
- Batch, prompt and total length: cache, activations, logits. A CPU engine of fewer devices
  feeds fewer tokens to one pass, so that number is a dimension too.
- Memory that one device may use, downwards: the sweep's limit, or the share of a GPU
  (`gpu_memory_utilization`) where the sweep sets none.

Equal, because nothing orders it: kind and settings of the engine, class of device, family,
form of attention (latents, windows, head widths: they choose the kernel), which weights
there are and how they are cut, what the widths divide by (kernels with and without padding),
weights from a checkpoint or made up, data-parallel degree and expert parallelism (fewer
replicas gather fewer tokens while each holds more experts).

A model whose structure is not spelled out is compared only with itself, in the same layout.

What the engine was doing matters. Weights are loaded before anything else is allocated, so
memory that ran out at `load` says that no batch, no length and no top-k can help: those do
not count. The stage comes from a traceback, and an engine process that dies without one is
said to have been loading; therefore the arithmetic has to agree that the weights alone do
not fit, else the workload counts. From `kv_cache` on it always does, and it is the largest
of the whole group's, since the engine was built for all of them. A GPU engine that captures
graphs has one for each batch size of its group, while a trial alone needs one: a group of
several batch sizes is then evidence of nothing but its weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from operator import ge
from typing import Any

from orchestrator.plan import Planned
from workers.contract.errors import Infeasible
from workers.contract.model import Model
from workers.contract.outcome import OomStage
from workers.hardware.device import CPU
from workers.moe.accounting import stage_layers
from workers.moe.architecture import UnknownModel, resolve, run_dtype
from workers.moe.fields import NESTED, Fields
from workers.moe.overrides import of as overrides_of
from workers.moe.storage.found import carried
from workers.moe.structure import Architecture, Layer, Weight

PEER_GIB = 0.5
"""More than a device's communication buffers take per further device, in GiB."""
CPU_PASS_TOKENS = 4096
"""Tokens that a CPU engine feeds to one pass by default, per device (vLLM's arg_utils)."""
ALIGNMENT = 128
"""Widths that are multiples of this are alike to every kernel."""

_TYPES = {"bfloat16": (1, 0), "float16": (0, 1), "float32": (1, 1)}
"""As two dimensions: 32 bits above both 16-bit types, which are beside each other."""
_NONE = -math.inf
"""At or below everything: a dimension that does not count."""

Vector = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Where a trial stands in the order."""

    key: Hashable
    """What must be equal."""
    load: Vector
    """What the memory for weights grows with."""
    use: Vector
    """What only the memory for using them grows with."""

    def above(self, other: Point) -> bool:
        """Whether it needs at least as much memory as `other`; true of itself."""
        return (
            self.key == other.key
            and all(map(ge, self.load, other.load))
            and all(map(ge, self.use, other.use))
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Witness:
    trial_id: str
    load: Vector
    use: Vector

    def below(self, load: Vector, use: Vector) -> bool:
        return all(map(ge, use, self.use)) and all(map(ge, load, self.load))


@dataclass(slots=True)
class Frontier:
    """The least demanding trials that ran out of device memory, on one class of device.

    On a cluster of several classes keep one for each; a trial that may run on any of them is
    pointless where each has a witness against it.
    """

    _witnesses: dict[int, list[_Witness]] = field(default_factory=dict)
    """By key; no one of them is at or above another."""
    _keys: dict[Hashable, int] = field(default_factory=dict)
    _loads: dict[Vector, Vector] = field(default_factory=dict)
    """Each once: trials of one engine share it."""
    _points: dict[str, tuple[int, Vector, Vector]] = field(default_factory=dict)
    """By trial: number of its key, and its place."""

    def __len__(self) -> int:
        return sum(map(len, self._witnesses.values()))

    def add(
        self, one: Planned, stage: OomStage | None = None, together: Iterable[Planned] = ()
    ) -> bool:
        """Takes `one` for a witness; whether that says anything new.

        Its memory must have run out on the device (`oom_scope`), as it was run and not as it
        was predicted, but for the roofline engine, whose prediction is its result.

        Args:
            stage: at which it ran out; null where that is not known.
            together: all trials of the group as it was given to the engine, those that have
                ended included: from the cache on, the engine held memory for all of them.
        """
        key, load, use = self._place(one)
        if stage == "load" and _predicted_stage(one) == "load":
            use = (_NONE,) * len(use)
        else:
            group = tuple(together)
            for other in group:
                other_key, other_load, other_use = self._place(other)
                if other_key != key:
                    return False  # the engine held more than the order can tell
                load = tuple(map(max, load, other_load))
                use = tuple(map(max, use, other_use))
            if _captures(one) and len({t.trial.workload.batch_size for t in (one, *group)}) > 1:
                return False
        known = self._witnesses.setdefault(key, [])
        if any(witness.below(load, use) for witness in known):
            return False
        new = _Witness(trial_id=one.trial_id, load=load, use=use)
        known[:] = [witness for witness in known if not new.below(witness.load, witness.use)]
        known.append(new)
        return True

    def witness(self, one: Planned) -> str | None:
        """The trial that ran out of memory and that `one` is at or above; null if there is
        none. A trial is no witness against itself."""
        if not self._witnesses:
            return None
        key, load, use = self._place(one)
        for witness in self._witnesses.get(key, ()):
            if witness.below(load, use) and witness.trial_id != one.trial_id:
                return witness.trial_id
        return None

    def _place(self, one: Planned) -> tuple[int, Vector, Vector]:
        found = self._points.get(one.trial_id)
        if found is None:
            point = place(one)
            number = self._keys.setdefault(point.key, len(self._keys))
            load = self._loads.setdefault(point.load, point.load)
            found = self._points[one.trial_id] = (number, load, point.use)
        return found


def order(one: Planned) -> tuple[float, float]:
    """Sorts candidates so that a trial comes after those that it is above.

    Share of a device's memory that the weights need, then that all needs: among trials that
    are predicted not to fit, the first to fail makes most of the others pointless.
    """
    if one.prediction is None:
        return (0.0, 0.0)
    limit = one.prediction.limit_gib
    return (one.prediction.weights_gib / limit, one.prediction.memory_gib / limit)


def place(one: Planned) -> Point:
    """Where a trial stands in the order."""
    trial, prediction = one.trial, one.prediction
    model, layout, workload, settings = trial.model, trial.layout, trial.workload, trial.engine
    changed = overrides_of(settings)
    overrides = json.dumps(changed, sort_keys=True) if changed else None
    shape = _shape(model, overrides) if prediction is not None else None
    args = dict(settings.args)
    if prediction is not None and prediction.device != CPU and settings.memory_limit_gib is None:
        args.pop("gpu_memory_utilization", None)  # it is in the limit
    equal: tuple[Hashable, ...] = (
        settings.kind,
        settings.moe_backend,
        repr(settings.speculative),  # it may hold a dictionary
        settings.routing,
        settings.eager,
        json.dumps(args, sort_keys=True, default=repr),
        layout.device,
        layout.data,
        layout.expert,
        workload.arrivals,
        workload.dataset,
    )
    use: Vector = (
        workload.batch_size,
        workload.tokens_per_request,
        workload.input_tokens,
        workload.temperature > 0,
        trial.measure.activation is True,
        bool(trial.measure.accuracy),
    )
    if prediction is None or shape is None:
        limit = settings.memory_limit_gib
        return Point(key=(*equal, model, layout, limit), load=(), use=use)
    tokens = workload.batch_size * workload.tokens_per_request
    if prediction.device == CPU:
        tokens = min(tokens, CPU_PASS_TOKENS * layout.devices)
    layers = _stages(shape, layout.pipeline)
    ranks = 1 if layout.expert else layout.tensor * layout.data
    return Point(
        key=(
            *equal,
            prediction.device,
            shape.form,
            tuple(math.gcd(width // ranks, ALIGNMENT) for width in shape.widths),
            (layout.pipeline, shape.pattern) if layers is None else None,
        ),
        load=(
            -prediction.limit_gib,
            *(shape.counts if layers is None else layers),
            *shape.sizes,
            -layout.tensor,
            prediction.weights_gib + PEER_GIB * (layout.devices - 1),
        ),
        use=(*use, tokens, *shape.top_k),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """A model as the order sees it."""

    form: Hashable
    """What must be equal."""
    sizes: Vector
    """What weights grow with, but for the number of layers."""
    top_k: Vector
    widths: tuple[int, ...]
    """Of one routed expert, per kind of layer that has them."""
    counts: Vector
    """Layers of each kind."""
    pattern: tuple[int, ...]
    """Kind of each layer."""
    alike: bool
    """All layers are, and quantisation has no say in it."""


def _stages(shape: _Shape, pipeline: int) -> Vector | None:
    """Layers by which pipelines of unlike degree or length compare; null if they do not."""
    if pipeline > 1 and not shape.alike:
        return None
    if not shape.alike:
        return shape.counts
    sizes = [len(stage) for stage in stage_layers(len(shape.pattern), pipeline)]
    return (sizes[0], sizes[-1], max(sizes))


@lru_cache(maxsize=100_000)
def _shape(model: Model, overrides: str | None) -> _Shape | None:
    try:
        a = resolve(model, json.loads(overrides) if overrides else None)
    except (UnknownModel, Infeasible):
        return None
    if a is None or not a.exact:
        return None
    dtype = run_dtype(a, model)
    if dtype not in _TYPES:
        return None
    forms: dict[Layer, Hashable] = {layer: _form(layer) for layer in dict.fromkeys(a.layers)}
    if len(set(forms.values())) < len(forms):  # one form in several sizes: equal throughout
        forms = {layer: (form, _sizes(layer)) for layer, form in forms.items()}
    kinds = sorted(forms, key=lambda layer: repr(forms[layer]))
    number = {layer: i for i, layer in enumerate(kinds)}
    pattern = tuple(number[layer] for layer in a.layers)
    counts = Counter(pattern)
    stored = carried(a.config) or model.quantization
    ends = (*a.embedding, *a.final, a.head)
    return _Shape(
        form=(
            a.family,
            a.tied,
            a.apart,
            tuple(forms[layer] for layer in kinds),
            tuple(map(_cut, ends)),
            model.weights,
            model.quantization,
            model.prune,
            model.trust_remote_code,
            math.gcd(a.hidden_size, ALIGNMENT),
            (json.dumps(stored, sort_keys=True), pattern) if stored else None,
        ),
        sizes=(
            *_TYPES[dtype],
            *(size for layer in kinds for size in _sizes(layer)),
            *(size for weight in ends for size in weight.shape),
            _positions(a),
        ),
        top_k=tuple(layer.experts.top_k for layer in kinds if layer.experts),
        widths=tuple(layer.experts.width for layer in kinds if layer.experts),
        counts=tuple(counts[i] for i in range(len(kinds))),
        pattern=pattern,
        alike=len(kinds) == 1 and not stored,
    )


def _form(layer: Layer) -> Hashable:
    """What must be equal in a layer."""
    at = layer.attention
    attention = (at.qk_dim, at.v_dim, at.latent, at.rope, at.window, at.chunked)
    shared = layer.experts.shared if layer.experts else None
    return (attention, shared, tuple(map(_cut, _weights(layer))))


def _sizes(layer: Layer) -> tuple[int, ...]:
    """What the memory of a layer grows with."""
    heads = (layer.attention.heads, layer.attention.kv_heads)
    experts = (layer.experts.num,) if layer.experts else ()
    shapes = (size for weight in _weights(layer) for size in weight.shape)
    return (*experts, *heads, *shapes)


def _weights(layer: Layer) -> tuple[Weight, ...]:
    return (*layer.always(), *layer.expert())


def _cut(weight: Weight) -> Hashable:
    return (weight.name, weight.part, len(weight.shape), weight.bias, weight.cut)


def _positions(a: Architecture) -> int:
    """Length of the table of rotary positions; 0 where it is not told."""
    whole: dict[str, Any] = dict(a.config)
    text = next((whole[key] for key in NESTED if isinstance(whole.get(key), dict)), whole)
    return Fields(text).maybe("max_position_embeddings") or 0


def _captures(one: Planned) -> bool:
    """Whether its engine captures graphs, or may."""
    if one.trial.engine.eager or one.trial.engine.kind == "roofline":
        return False
    return one.prediction is None or one.prediction.device != CPU


def _predicted_stage(one: Planned) -> OomStage | None:
    found = one.prediction
    return found.oom.stage if found is not None and found.oom is not None else None
