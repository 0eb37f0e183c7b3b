"""What a model is made of, weight by weight.

Bytes, FLOPs and utilisation all follow from the same list: every weight of every layer,
with its shape, the part it plays, and how tensor parallelism cuts it. So that list is the
one thing that is written down per family, and each sum over it (parameters, bytes under a
quantisation, FLOPs per token, the share of one rank) is written once, in
`workers.moe.accounting`. A number that is counted twice in two ways cannot disagree with
itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Part = Literal[
    "embedding", "attention", "norm", "router", "expert", "shared", "dense", "head",
    "encoder", "vision", "projector",
]  # fmt: skip
"""What a weight is for. `expert` is a routed one; `encoder`, `vision` and `projector` stand
outside the language model's decoder and are counted apart."""

Cut = Literal["none", "out", "in", "kv", "vocab"]
"""How tensor parallelism of degree t cuts a weight: into t parts by rows of outputs (`out`),
by inputs (`in`), by vocabulary (`vocab`), by key-value heads (`kv`: into as many parts as
there are heads, each repeated on the ranks left over), or not at all: every rank has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One matrix or vector, with its bias."""

    name: str
    """Module path as checkpoints name it, without `.weight`; a layer's weights begin below
    `model.layers.N.`, and `*` stands for an expert's number: `mlp.experts.*.up_proj`."""
    part: Part
    shape: tuple[int, ...]
    """(outputs, inputs) of a matrix; (n,) of a vector."""
    bias: bool = False
    """A vector of `outputs` belongs to it."""
    cut: Cut = "none"

    @property
    def values(self) -> int:
        """Numbers in it without the bias."""
        return math.prod(self.shape)

    @property
    def params(self) -> int:
        """Numbers in it, bias included."""
        return math.prod(self.shape) + (self.shape[0] if self.bias else 0)

    @property
    def multiplies(self) -> bool:
        """Whether every token is multiplied by it, at 2 FLOPs per value."""
        return len(self.shape) == 2 and self.part != "embedding"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Attention of one layer.

    With a latent (MLA, DeepSeek-V2 §2.1) the cache holds `latent + rope` numbers per token
    instead of keys and values of every head.
    """

    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads; with a latent, as many as query heads."""
    qk_dim: int
    """Width of one query or key, rotary part included."""
    v_dim: int
    """Width of one value."""
    latent: int = 0
    """`kv_lora_rank`; 0 where keys and values are cached."""
    rope: int = 0
    """Rotary part of a latent's key, shared by the heads; 0 without a latent."""
    window: int | None = None
    """Tokens that a query can see; null for all before it."""
    chunked: bool = False
    """The window is the chunk of that many tokens that the query lies in, not the last ones."""
    weights: tuple[Weight, ...]

    @property
    def cached_values(self) -> int:
        """Numbers that one token leaves in the KV cache of this layer."""
        if self.latent:
            return self.latent + self.rope
        return self.kv_heads * (self.qk_dim + self.v_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Routed and shared experts of one layer."""

    num: int
    """Routed experts."""
    top_k: int
    """Routed experts per token."""
    width: int
    """FFN width of one routed expert."""
    shared: int = 0
    """Shared experts, used by every token; as the configuration counts them."""
    router: tuple[Weight, ...]
    expert: tuple[Weight, ...]
    """Weights of one routed expert; all have the same."""
    shared_weights: tuple[Weight, ...] = ()
    """All shared experts together, and their gate where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer. It has experts, a dense FFN, or both side by side."""

    attention: Attention
    norms: tuple[Weight, ...]
    dense: tuple[Weight, ...] = ()
    experts: Experts | None = None

    def always(self) -> Iterator[Weight]:
        """Weights that every forward pass uses."""
        yield from self.attention.weights
        yield from self.norms
        yield from self.dense
        if self.experts is not None:
            yield from self.experts.router
            yield from self.experts.shared_weights

    def expert(self) -> tuple[Weight, ...]:
        """Weights of one routed expert; empty without experts."""
        return self.experts.expert if self.experts else ()

    @property
    def params(self) -> int:
        """All its parameters."""
        experts = self.experts.num * count(self.experts.expert) if self.experts else 0
        return count(self.always()) + experts

    @property
    def params_active(self) -> int:
        """Parameters that one token uses."""
        experts = self.experts.top_k * count(self.experts.expert) if self.experts else 0
        return count(self.always()) + experts


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A whole model. Layers that are alike are one object, repeated."""

    family: str
    """`model_type` of the configuration (of its text part, where it has one)."""
    exact: bool
    """The family is spelled out, so parameters are exact; else they are an estimate from
    the fields that most families share."""
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    """Decoder layers, first to last."""
    embedding: tuple[Weight, ...]
    """Token embedding first; learned positions after it."""
    final: tuple[Weight, ...]
    """What stands between the last layer and the head: norms."""
    head: Weight
    """Projection to the vocabulary."""
    tied: bool
    """The head is the token embedding: its parameters are not counted again."""
    apart: tuple[tuple[Weight, int], ...] = ()
    """Weights outside the decoder (encoder, vision, projector), each with its copies."""
    config: Mapping[str, Any]
    """The Hugging Face configuration behind it, every override applied."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @cached_property
    def moe(self) -> Experts | None:
        """Experts of the first MoE layer; null for a dense model."""
        return next((layer.experts for layer in self.layers if layer.experts), None)

    @property
    def num_experts(self) -> int:
        """Routed experts per MoE layer; 1 is a dense model."""
        return self.moe.num if self.moe else 1

    @property
    def top_k(self) -> int:
        """Routed experts per token; 1 for a dense model."""
        return self.moe.top_k if self.moe else 1

    @property
    def shared_experts(self) -> int:
        """Shared experts per MoE layer."""
        return self.moe.shared if self.moe else 0

    @property
    def ffn_dim(self) -> int:
        """Width of one routed expert; of the dense FFN where there are no experts."""
        if self.moe:
            return self.moe.width
        return next((weight.shape[0] for weight in self.layers[0].dense if weight.cut == "out"), 0)

    @property
    def num_heads(self) -> int:
        """Query heads of the first layer."""
        return self.layers[0].attention.heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of the first layer."""
        return self.layers[0].attention.kv_heads

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert; 0 for a dense model."""
        return count(self.moe.expert) if self.moe else 0

    @property
    def attention_params(self) -> int:
        """Parameters of the attention of the first layer."""
        return count(self.layers[0].attention.weights)

    @cached_property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache, over all layers."""
        return sum(layer.attention.cached_values for layer in self.layers)

    @cached_property
    def params_total(self) -> int:
        """All parameters of the language model; vision and projectors are counted apart."""
        return self._outside + sum(layer.params for layer in self.layers) + self.params_encoder

    @cached_property
    def params_active(self) -> int:
        """Parameters that one token uses, input embedding included."""
        return self._outside + sum(layer.params_active for layer in self.layers)

    @property
    def params_active_no_embedding(self) -> int:
        """The same without the input embedding; a tied one stays, for it is the head."""
        return self.params_active - (0 if self.tied else self.embedding[0].params)

    @property
    def params_encoder(self) -> int:
        """Parameters of the encoder of an encoder-decoder model."""
        return self._apart("encoder")

    @property
    def params_vision(self) -> int:
        """Parameters of the vision tower."""
        return self._apart("vision")

    @property
    def params_projector(self) -> int:
        """Parameters between vision tower and language model."""
        return self._apart("projector")

    @property
    def _outside(self) -> int:
        head = 0 if self.tied else self.head.params
        return count(self.embedding) + count(self.final) + head

    def _apart(self, part: Part) -> int:
        return sum(weight.params * copies for weight, copies in self.apart if weight.part == part)


def count(weights: Iterator[Weight] | tuple[Weight, ...]) -> int:
    """Parameters of `weights` together."""
    return sum(weight.params for weight in weights)
