"""What one forward pass must read, write and compute, part by part.

A pass is described by what is fed to it: sequences, new tokens, tokens already cached. From
that and the list of weights (`workers.moe.structure`) follow the bytes and FLOPs of every
part of the model: each weight is read once per pass, a routed expert only where the batch
activates it, the cache once per sequence, as far as a layer's window reaches. All of it is
linear in a few sums over the batch (tokens, query-key pairs, cached tokens seen), so a cost
is a sheet of coefficients times those sums. Sheets add up as costs do: a pipeline stage of
sixty layers has one, and neither its layers nor a thousand decode steps are gone through
again for the next workload.

A multiply-add counts 2 FLOPs. Softmax, norms, activations and rotary embeddings are left
out, as in MoE-CAP §4.2 and in torch's own counter.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import accumulate
from math import ceil
from operator import attrgetter, mul
from typing import Any, Literal, TypeVar

from workers.contract.layout import Layout
from workers.moe.precision import Precision
from workers.moe.structure import Architecture, Attention, Layer, Part, Weight

Piece = TypeVar("Piece", "Look", "Choice")

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of it before it cuts it."""

SINGLE = Layout()
"""One device holds all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Sequences that stand at the same point of a forward pass."""

    sequences: float
    """A mean over data-parallel replicas may be fractional."""
    new: int
    """Tokens of each that are fed in this pass; 1 is a decode step."""
    context: float
    """Tokens of each that are cached already; a mean may be fractional."""


def prefill(batch: int, tokens: int, cached: int = 0) -> tuple[Slice, ...]:
    """`batch` prompts of `tokens` new tokens, `cached` tokens of each computed before."""
    return (Slice(sequences=batch, new=tokens, context=cached),)


def decode(batch: int, context: float) -> tuple[Slice, ...]:
    """One decode step of `batch` sequences with `context` tokens cached in each."""
    return (Slice(sequences=batch, new=1, context=context),)


def distinct_experts(experts: int, top_k: int, tokens: float) -> float:
    """Expected experts of one layer that `tokens` independent tokens activate.

    Uniform routing: E·(1 - (1 - k/E)^B), an upper bound for independent tokens.
    """
    missed: float = (1 - top_k / experts) ** tokens
    return experts * (1 - missed)


def expected_activation(a: Architecture, tokens: float) -> tuple[float, ...]:
    """Distinct routed experts of each layer under uniform routing; 0.0 without experts."""
    return tuple(
        distinct_experts(layer.experts.num, layer.experts.top_k, tokens) if layer.experts else 0.0
        for layer in a.layers
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes and FLOPs of some work, by part of the model. Costs add up and scale."""

    attention_bytes: float = 0.0
    router_bytes: float = 0.0
    expert_bytes: float = 0.0
    """Routed experts that were activated, each once per pass."""
    shared_bytes: float = 0.0
    """Shared experts and their gate."""
    dense_bytes: float = 0.0
    norm_bytes: float = 0.0
    embedding_bytes: float = 0.0
    """Rows looked up."""
    head_bytes: float = 0.0
    kv_read_bytes: float = 0.0
    kv_write_bytes: float = 0.0
    attention_flops: float = 0.0
    """Projections."""
    score_flops: float = 0.0
    """Queries times keys, and probabilities times values."""
    router_flops: float = 0.0
    expert_flops: float = 0.0
    shared_flops: float = 0.0
    dense_flops: float = 0.0
    head_flops: float = 0.0
    activated: float = 0.0
    """Distinct routed experts, over layers and passes."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            attention_bytes=self.attention_bytes + other.attention_bytes,
            router_bytes=self.router_bytes + other.router_bytes,
            expert_bytes=self.expert_bytes + other.expert_bytes,
            shared_bytes=self.shared_bytes + other.shared_bytes,
            dense_bytes=self.dense_bytes + other.dense_bytes,
            norm_bytes=self.norm_bytes + other.norm_bytes,
            embedding_bytes=self.embedding_bytes + other.embedding_bytes,
            head_bytes=self.head_bytes + other.head_bytes,
            kv_read_bytes=self.kv_read_bytes + other.kv_read_bytes,
            kv_write_bytes=self.kv_write_bytes + other.kv_write_bytes,
            attention_flops=self.attention_flops + other.attention_flops,
            score_flops=self.score_flops + other.score_flops,
            router_flops=self.router_flops + other.router_flops,
            expert_flops=self.expert_flops + other.expert_flops,
            shared_flops=self.shared_flops + other.shared_flops,
            dense_flops=self.dense_flops + other.dense_flops,
            head_flops=self.head_flops + other.head_flops,
            activated=self.activated + other.activated,
        )

    def times(self, copies: int) -> Cost:
        """The cost of doing the same `copies` times."""
        if copies == 1:
            return self
        return Cost(**{name: copies * getattr(self, name) for name in self.__slots__})

    @property
    def weight_bytes(self) -> float:
        """Weights read, embedding rows included."""
        return self._layer_bytes + self.router_bytes + self.norm_bytes + self._ends_bytes

    @property
    def read_bytes(self) -> float:
        """All that is read: weights and cache."""
        return self.weight_bytes + self.kv_read_bytes

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.flops_paper + self.head_flops

    @property
    def active_bytes_paper(self) -> float:
        """S_act of MoE-CAP Eq 4: attention, activated experts, shared experts, dense FFNs.

        The text under Eq 4 makes a dense layer one expert that is always active, so dense
        FFNs count; router, norms, embedding and head have no term. The batch-8 shares of
        parameters that follow (DeepSeek-V2-Lite 57.15 %, Qwen1.5-MoE 47.60 %, DeepSeek-R1
        24.19 % of the same parts in full) come out to the last digit only this way.
        """
        return self._layer_bytes

    @property
    def flops_paper(self) -> float:
        """Eq 5: attention with its scores, router, top-k and shared experts, dense FFNs."""
        return (
            self.attention_flops
            + self.score_flops
            + self.router_flops
            + self.expert_flops
            + self.shared_flops
            + self.dense_flops
        )

    @property
    def _layer_bytes(self) -> float:
        return self.attention_bytes + self.expert_bytes + self.shared_bytes + self.dense_bytes

    @property
    def _ends_bytes(self) -> float:
        return self.embedding_bytes + self.head_bytes


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one pass, layer by layer, on one device."""

    layers: tuple[Cost, ...]
    """One for each decoder layer of the device's pipeline stage."""
    outside: Cost
    """Embedding, final norm and head, as far as the stage has them."""

    @cached_property
    def total(self) -> Cost:
        """All together."""
        total = self.outside
        for cost, copies in _counted(self.layers):
            total += cost.times(copies)
        return total


def forward(
    a: Architecture,
    precision: Precision,
    slices: Iterable[Slice],
    *,
    activated: Sequence[float] | None = None,
    layout: Layout = SINGLE,
    stage: int = 0,
    logits: Literal["last", "all"] = "last",
    absorbed: bool = True,
    causal: bool = True,
) -> PassCost:
    """Cost of one forward pass on one device of pipeline stage `stage`.

    `slices` are those of one data-parallel replica. Experts are cut over the tensor × data
    devices (each expert in slices, or with expert parallelism whole experts), and so they
    see the tokens of every replica.

    Args:
        activated: distinct routed experts of each decoder layer of the model over the whole
            batch, as traced; null for the expectation under uniform routing.
        logits: whether the head runs for the last token of each sequence, or for all.
        absorbed: an MLA decode step attends to the cached latents themselves, as vLLM does
            it; false: every pass expands all of them to keys and values, as transformers 5
            does it.
        causal: false counts scores over the full rectangle of queries and keys, as a kernel
            that masks afterwards computes them and torch's counter counts them.

    Raises:
        ValueError: `activated` is not one number per decoder layer.
    """
    if activated is not None and len(activated) != a.num_layers:
        raise ValueError(f"activated has {len(activated)} numbers for {a.num_layers} layers")
    of = stage_of(a, precision, layout, stage)
    work = one_pass(slices, logits=logits, absorbed=absorbed, causal=causal)
    kinds: dict[tuple[int, float | None], Cost] = {}
    layers = []
    for index, sheet in zip(of.layers, of.of_layer, strict=True):
        traced = None if activated is None else activated[index]
        key = (id(sheet), traced)
        if key not in kinds:
            kinds[key] = sheet.cost(work, traced)
        layers.append(kinds[key])
    return PassCost(layers=tuple(layers), outside=of.outside.cost(work))


def decode_total(
    a: Architecture,
    precision: Precision,
    batch: float,
    input_tokens: int,
    output_tokens: int,
    *,
    layout: Layout = SINGLE,
    stage: int = 0,
    absorbed: bool = True,
) -> Cost:
    """Cost of all `output_tokens - 1` decode passes of a batch, on one device of a stage.

    Activation is the uniform expectation; see `decoding`.
    """
    if output_tokens < 2:
        return Cost()
    work = decoding(batch, input_tokens, output_tokens, absorbed=absorbed)
    return stage_of(a, precision, layout, stage).sheet.cost(work)


def weight_bytes(
    a: Architecture, precision: Precision, layout: Layout = SINGLE, stage: int = 0
) -> int:
    """Weights that one device of a pipeline stage holds, as vLLM allocates them, in bytes.

    Vocabulary padded to a multiple of 64, key-value heads repeated where there are more
    devices than heads, experts over tensor × data devices, a tied head once per device.
    What an engine makes of weights besides (repacked copies, MLA's absorbed ones) is not
    in it.
    """
    return stage_of(a, precision, layout, stage).weight_bytes


def kv_cache_bytes(
    a: Architecture,
    precision: Precision,
    tokens_per_request: int,
    batch: int,
    layout: Layout = SINGLE,
    stage: int = 0,
    block: int = 16,
) -> int:
    """KV cache that one device of a stage holds for `batch` requests at that length, in bytes.

    Tokens are rounded up to blocks of `block`. A layer with a window keeps the blocks that
    the window can touch, as vLLM frees those that fell out of it.
    """
    sheet = stage_of(a, precision, layout, stage).sheet
    return ceil(batch * sheet.cache_bytes(tokens_per_request, block))


def stage_layers(num_layers: int, pipeline: int) -> tuple[range, ...]:
    """Decoder layers of each pipeline stage, divided as vLLM divides them.

    Layers left over go to the stages before the last, the last but one first.
    """
    each, left = divmod(num_layers, pipeline)
    sizes = [
        each + (1 if pipeline - 1 - left <= stage < pipeline - 1 else 0)
        for stage in range(pipeline)
    ]
    ends = list(accumulate(sizes))
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the attention of one layer looks at, summed over sequences and passes."""

    pairs: float
    """Query-key pairs."""
    latent: float
    """Those of them that are computed on latents; 0 unless absorbed."""
    again: float
    """Cached latents that are expanded once more: for a prefill that goes on, and unless
    absorbed for every pass."""
    cached: float
    """Tokens whose cache is read, the new ones included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """All that a cost depends on besides the weights."""

    passes: int
    tokens: float
    logits: float
    """Tokens that the head runs for."""
    seen: Callable[[int | None, bool], Seen]
    """By a layer's window, and whether that is a chunk."""


def one_pass(
    slices: Iterable[Slice],
    *,
    logits: Literal["last", "all"] = "last",
    absorbed: bool = True,
    causal: bool = True,
) -> Work:
    """One forward pass; `forward` says what the arguments mean."""
    slices = tuple(slices)
    tokens = sum(one.sequences * one.new for one in slices)

    @cache
    def seen(window: int | None, chunked: bool) -> Seen:
        return _one_pass(slices, window, chunked, absorbed=absorbed, causal=causal)

    return Work(
        passes=1,
        tokens=tokens,
        logits=tokens if logits == "all" else sum(one.sequences for one in slices),
        seen=seen,
    )


def decoding(batch: float, input_tokens: int, output_tokens: int, *, absorbed: bool = True) -> Work:
    """All `output_tokens - 1` decode passes of a batch; there must be one.

    Exact and without a loop: over one sequence the passes see what the tokens of a prompt
    of that length see, and that sum is closed.
    """
    steps = output_tokens - 1

    @cache
    def seen(window: int | None, chunked: bool) -> Seen:
        pairs = batch * _pairs(steps, input_tokens, window, chunked)
        if absorbed:
            return Seen(pairs=pairs, latent=pairs, again=0.0, cached=pairs)
        return Seen(pairs=pairs, latent=0.0, again=pairs - batch * steps, cached=pairs)

    return Work(passes=steps, tokens=batch * steps, logits=batch * steps, seen=seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Attention of all layers with one window."""

    window: int | None
    chunked: bool
    score_flops: int
    """Per query-key pair."""
    latent_flops: int
    """Per pair on latents; where there are none, as any other pair."""
    expand_flops: int
    """Per cached latent that is expanded again."""
    kv_bytes: float
    """Per cached token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Routed experts of all layers that choose alike."""

    experts: int
    top_k: int
    replicas: int
    """Whose tokens the experts see."""
    read: float
    """Experts that this device reads, over its layers, per expert activated in one of them."""
    bytes: float
    """The same in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """Coefficients of a cost on one device: of a layer, or of several things together."""

    attention_bytes: int = 0
    """This and the next five: per pass."""
    router_bytes: int = 0
    shared_bytes: int = 0
    dense_bytes: int = 0
    norm_bytes: int = 0
    head_bytes: int = 0
    embedding_bytes: float = 0.0
    """This and the next six: per token."""
    kv_bytes: float = 0.0
    attention_flops: int = 0
    router_flops: int = 0
    expert_flops: float = 0.0
    shared_flops: int = 0
    dense_flops: int = 0
    head_flops: int = 0
    """Per token that has logits."""
    looks: tuple[Look, ...] = ()
    choices: tuple[Choice, ...] = ()

    def cost(self, work: Work, traced: float | None = None) -> Cost:
        """Cost of `work`; `traced` are the experts that one layer activated, if they are known."""
        return Cost(**dict(zip(Cost.__slots__, self.figures(work, traced), strict=True)))

    def figures(self, work: Work, traced: float | None = None) -> tuple[float, ...]:
        """The fields of `cost` in their order, for those who need no more than the numbers."""
        n, tokens = work.passes, work.tokens
        kv_read = scores = expanded = 0.0
        for look in self.looks:
            seen = work.seen(look.window, look.chunked)
            kv_read += seen.cached * look.kv_bytes
            scores += (seen.pairs - seen.latent) * look.score_flops
            scores += seen.latent * look.latent_flops
            expanded += seen.again * look.expand_flops
        expert_bytes = activated = 0.0
        for one in self.choices:
            if traced is None:
                hit = n * distinct_experts(one.experts, one.top_k, tokens / n * one.replicas)
            else:
                hit = traced
            expert_bytes += hit * one.bytes
            activated += hit * one.read
        return (
            n * self.attention_bytes,
            n * self.router_bytes,
            expert_bytes,
            n * self.shared_bytes,
            n * self.dense_bytes,
            n * self.norm_bytes,
            tokens * self.embedding_bytes,
            n * self.head_bytes,
            kv_read,
            tokens * self.kv_bytes,
            tokens * self.attention_flops + expanded,
            scores,
            tokens * self.router_flops,
            tokens * self.expert_flops,
            tokens * self.shared_flops,
            tokens * self.dense_flops,
            work.logits * self.head_flops,
            activated,
        )

    def cache_bytes(self, tokens: int, block: int) -> float:
        """KV cache of one request of that length in blocks of `block` tokens, in bytes."""
        total = 0.0
        for look in self.looks:
            blocks = -(-tokens // block)
            if look.window is not None:
                # A sliding window begins anywhere in a block, so it touches one more.
                blocks = min(blocks, -(-look.window // block) + (0 if look.chunked else 1))
            total += blocks * block * look.kv_bytes
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One device of a pipeline stage: what it holds, and what its share of a pass costs."""

    layers: range
    of_layer: tuple[Sheet, ...]
    """Layers that are alike share one object."""
    outside: Sheet
    """What stands before the first and after the last layer, as far as it is here."""
    sheet: Sheet
    """All together."""
    weight_bytes: int


_SHEETS: dict[int, dict[tuple[Precision, Layout, int], Stage]] = {}
"""By `id` of an architecture, for as long as it lives."""


def stage_of(
    a: Architecture, precision: Precision, layout: Layout = SINGLE, stage: int = 0
) -> Stage:
    """Coefficients of one pipeline stage, worked out once."""
    known = _SHEETS.get(id(a))
    if known is None:
        known = _SHEETS[id(a)] = {}
        weakref.finalize(a, _SHEETS.pop, id(a), None)
    key = (precision, layout, stage)
    if key not in known:
        known[key] = _stage(a, precision, layout, stage)
    return known[key]


def _stage(a: Architecture, precision: Precision, layout: Layout, stage: int) -> Stage:
    layers = stage_layers(a.num_layers, layout.pipeline)[stage]
    own = a.layers[layers.start : layers.stop]
    alike = {id(layer): layer for layer in own}
    local = {
        key: [_local(weight, layer, layout) for weight in (*layer.always(), *layer.expert())]
        for key, layer in alike.items()
    }
    kinds: Sequence[tuple[int, tuple[int, ...]]]
    if precision.scheme is None:
        kind_of = {key: (key, tuple(map(precision.bytes, local[key]))) for key in alike}
        kinds = [kind_of[id(layer)] for layer in own]
    else:  # which may leave single layers alone
        kinds = [
            (key, tuple([precision.bytes(weight, index) for weight in local[key]]))
            for index, key in zip(layers, map(id, own), strict=True)
        ]
    copies = Counter(kinds)
    sheets = {
        (key, sizes): _sheet(alike[key], local[key], sizes, precision, layout)
        for key, sizes in copies
    }
    outside = _outside(a, precision, layout, stage)
    return Stage(
        layers=layers,
        of_layer=tuple([sheets[kind][0] for kind in kinds]),
        outside=outside,
        sheet=_together([*((sheets[kind][0], n) for kind, n in copies.items()), (outside, 1)]),
        weight_bytes=sum([n * sheets[kind][1] for kind, n in copies.items()])
        + _ends_bytes(a, precision, layout, stage),
    )


def _sheet(
    layer: Layer,
    weights: Sequence[Weight],
    sizes: Sequence[int],
    precision: Precision,
    layout: Layout,
) -> tuple[Sheet, int]:
    """Coefficients of one layer, and the bytes of its weights."""
    at, experts = layer.attention, layer.experts
    size: dict[Part, int] = dict.fromkeys(_PARTS, 0)
    flops: dict[Part, int] = dict.fromkeys(_PARTS, 0)
    for weight, stored in zip(weights, sizes, strict=True):
        size[weight.part] += stored
        if weight.multiplies:
            flops[weight.part] += 2 * weight.values
    ranks = layout.tensor * layout.data
    # With expert parallelism a device has whole experts: its share of those activated.
    share = 1 / ranks if layout.expert else 1.0
    held = 0
    choices: tuple[Choice, ...] = ()
    if experts:
        held = ceil(experts.num / ranks) if layout.expert else experts.num
        choices = (
            Choice(
                experts=experts.num,
                top_k=experts.top_k,
                replicas=layout.data,
                read=share,
                bytes=share * size["expert"],
            ),
        )
    heads = ceil(at.heads / layout.tensor)
    scores = 2 * heads * (at.qk_dim + at.v_dim)
    kv_bytes = _cached_values(at, layout.tensor) * precision.kv_bytes
    sheet = Sheet(
        attention_bytes=size["attention"],
        router_bytes=size["router"],
        shared_bytes=size["shared"],
        dense_bytes=size["dense"],
        norm_bytes=size["norm"],
        kv_bytes=kv_bytes,
        attention_flops=flops["attention"],
        router_flops=flops["router"],
        expert_flops=experts.top_k * layout.data * share * flops["expert"] if experts else 0.0,
        shared_flops=flops["shared"],
        dense_flops=flops["dense"],
        looks=(
            Look(
                window=at.window,
                chunked=at.chunked,
                score_flops=scores,
                latent_flops=2 * heads * (2 * at.latent + at.rope) if at.latent else scores,
                expand_flops=2 * heads * at.latent * (at.qk_dim - at.rope + at.v_dim),
                kv_bytes=kv_bytes,
            ),
        ),
        choices=choices,
    )
    return sheet, sum(size.values()) + (held - 1) * size["expert"]


def _outside(a: Architecture, precision: Precision, layout: Layout, stage: int) -> Sheet:
    first, last = stage == 0, stage == layout.pipeline - 1
    head = _local(a.head, None, layout)
    return Sheet(
        embedding_bytes=sum(
            precision.bytes(_local(w, None, layout)) / w.shape[0] for w in a.embedding
        )
        if first
        else 0.0,
        norm_bytes=sum(precision.bytes(weight) for weight in a.final) if last else 0,
        head_bytes=precision.bytes(head) if last else 0,
        head_flops=2 * head.values if last else 0,
    )


def _ends_bytes(a: Architecture, precision: Precision, layout: Layout, stage: int) -> int:
    """Weights of a stage that belong to no layer."""
    first, last = stage == 0, stage == layout.pipeline - 1
    ends: list[tuple[Weight, int]] = []
    if first:
        ends += [(weight, 1) for weight in a.embedding] + list(a.apart)
    if last:
        ends += [(weight, 1) for weight in a.final]
        if not (a.tied and first):
            ends.append((a.head, 1))
    return sum(
        copies * precision.bytes(_local(_padded(weight), None, layout)) for weight, copies in ends
    )


def _together(kinds: Sequence[tuple[Sheet, int]]) -> Sheet:
    """The sheet whose cost is that of so many copies of each sheet."""
    looks: dict[object, list[tuple[Look, int]]] = {}
    choices: dict[object, list[tuple[Choice, int]]] = {}
    for sheet, copies in kinds:
        for look in sheet.looks:
            looks.setdefault((look.window, look.chunked), []).append((look, copies))
        for one in sheet.choices:
            choices.setdefault((one.experts, one.top_k, one.replicas), []).append((one, copies))
    return Sheet(
        **_sums(kinds, _LINEAR),
        looks=tuple([_merged(found, _LOOK) for found in looks.values()]),
        choices=tuple([_merged(found, _CHOICE) for found in choices.values()]),
    )


def _merged(found: Sequence[tuple[Piece, int]], linear: tuple[str, ...]) -> Piece:
    return replace(found[0][0], **_sums(found, linear))


def _sums(found: Sequence[tuple[Any, int]], names: tuple[str, ...]) -> dict[str, Any]:
    """So many copies of each, field by field."""
    read, copies = _reader(names), [n for _, n in found]
    columns = zip(*[read(one) for one, _ in found], strict=True)
    return {
        name: sum(map(mul, copies, column)) for name, column in zip(names, columns, strict=True)
    }


@cache
def _reader(names: tuple[str, ...]) -> attrgetter[tuple[Any, ...]]:
    return attrgetter(*names)


_LOOK = ("score_flops", "latent_flops", "expand_flops", "kv_bytes")
_CHOICE = ("read", "bytes")
_LINEAR = tuple(part.name for part in fields(Sheet) if part.name not in ("looks", "choices"))
_PARTS: tuple[Part, ...] = ("attention", "norm", "router", "expert", "shared", "dense")


def _counted(layers: Iterable[Cost]) -> list[tuple[Cost, int]]:
    """Each cost once, and how many layers have it; layers that are alike share one object."""
    numbers = Counter(map(id, layers))
    return [(cost, numbers[key]) for key, cost in {id(cost): cost for cost in layers}.items()]


def _one_pass(
    slices: Iterable[Slice], window: int | None, chunked: bool, *, absorbed: bool, causal: bool
) -> Seen:
    pairs = latent = again = cached = 0.0
    for one in slices:
        past = _visible(one.context, window, chunked)
        if causal:
            seen = one.sequences * _pairs(one.new, one.context, window, chunked)
        else:
            seen = one.sequences * one.new * (past + one.new)
        pairs += seen
        cached += one.sequences * (past + one.new)
        if absorbed and one.new == 1:
            latent += seen
        else:
            again += one.sequences * past
    return Seen(pairs=pairs, latent=latent, again=again, cached=cached)


def _visible(context: float, window: int | None, chunked: bool) -> float:
    """Cached tokens that the next token can see."""
    if window is None:
        return context
    return context % window if chunked else min(context, window - 1)


def _pairs(new: int, context: float, window: int | None, chunked: bool) -> float:
    """Keys that `new` tokens after `context` see together, themselves included."""
    if window is None:
        return new * context + new * (new + 1) / 2
    if chunked:
        return _chunked(context + new, window) - _chunked(context, window)
    growing = min(max(int(window - context), 0), new)
    return growing * context + growing * (growing + 1) / 2 + (new - growing) * window


def _chunked(tokens: float, chunk: int) -> float:
    """Keys that the first `tokens` tokens of a sequence see in chunks."""
    whole, rest = divmod(tokens, chunk)
    return whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2


def _cached_values(attention: Attention, tensor: int) -> int:
    """Numbers that one token leaves in the cache of one device; latents are on all."""
    if attention.latent:
        return attention.cached_values
    return ceil(attention.kv_heads / tensor) * (attention.qk_dim + attention.v_dim)


def _padded(weight: Weight) -> Weight:
    missing = -weight.shape[0] % VOCAB_PADDING
    if weight.cut != "vocab" or not missing:
        return weight
    rows = weight.shape[0] + missing
    return replace(weight, shape=(rows, *weight.shape[1:]))


def _local(weight: Weight, layer: Layer | None, layout: Layout) -> Weight:
    """The part of `weight` that one device holds."""
    parts = layout.tensor
    if weight.part == "expert":
        parts = 1 if layout.expert else layout.tensor * layout.data
    if parts == 1 or weight.cut == "none":
        return weight
    if weight.cut == "kv" and layer is not None:
        parts = min(parts, layer.attention.kv_heads)
    axis = len(weight.shape) - 1 if weight.cut == "in" else 0
    shape = list(weight.shape)
    shape[axis] = ceil(shape[axis] / parts)
    return replace(weight, shape=tuple(shape))
