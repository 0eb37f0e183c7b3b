"""What is asked of the model: which one, with what weights, bent into which shape.

A model here is a request, not a structure. `workers.moe.architecture` turns it into the
dimensions that run; a record holds those, never the numbers asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.contract.validate import at_least, fraction, named

MOST_LAYERS = 10_000
"""Far beyond any model. A structure has an item for every layer, so a slip of the keyboard
must not ask for a billion."""

Weights = Literal["dummy", "checkpoint"]
PruneKind = Literal["inter", "intra"]
PruneCriterion = Literal["random", "frequency", "norm", "reconstruction"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Structured pruning of experts (MoE-Inference-Bench §6.2)."""

    kind: PruneKind = "inter"
    """`inter` removes whole experts and their router rows; `intra` narrows each expert."""
    ratio: float = 0.5
    """Share removed, strictly between 0 and 1."""
    criterion: PruneCriterion = "random"
    """How the experts or channels to remove are chosen."""

    def __post_init__(self) -> None:
        fraction("model.prune.ratio", self.ratio, closed=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model by name, and the shape overrides of a sweep."""

    name: str
    """Catalogue name, folder with a `config.json`, or hub id."""
    revision: str | None = None
    """Commit or tag on the hub."""
    weights: Weights = "checkpoint"
    """`dummy` builds a skeleton of random weights from the configuration alone."""
    ffn_dim: int | None = None
    """Width of one routed expert's FFN; null keeps the model's own."""
    num_experts: int | None = None
    """Routed experts per MoE layer; null keeps the model's own."""
    top_k: int | None = None
    """Routed experts per token; null keeps the model's own."""
    num_layers: int | None = None
    """Transformer layers; null keeps the model's own."""
    scale: float = 1.0
    """Factor on every width of a skeleton (hidden, FFN, heads, vocabulary), 0 < scale ≤ 1."""
    dtype: Dtype = "bfloat16"
    """Data type of weights and activations."""
    quantization: str | None = None
    """Weight quantisation by the engine's own name (`fp8`, `awq`, …)."""
    prune: Prune | None = None
    """Pruning applied before serving."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint. Recorded; off unless asked for."""

    def __post_init__(self) -> None:
        named("model.name", self.name)
        for key in ("ffn_dim", "num_experts", "top_k", "num_layers"):
            value = getattr(self, key)
            if value is not None and not (type(value) is int and value >= 1):
                at_least(f"model.{key}", value, 1)
        if self.num_layers is not None and self.num_layers > MOST_LAYERS:
            raise ValueError(
                f"model.num_layers is {self.num_layers}, but must be at most {MOST_LAYERS}"
            )
        fraction("model.scale", self.scale, closed=True)
        if self.weights == "checkpoint" and self.scale != 1.0:
            raise ValueError(
                f"model.scale {self.scale} shrinks a skeleton: it needs model.weights: dummy"
            )
