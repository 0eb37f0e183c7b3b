"""Which engine generates tokens, and with which of its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from workers.contract.validate import at_least, named, positive

EngineKind = Literal["vllm", "transformers", "endpoint", "roofline"]
REMOTE_CODE = "trust_remote_code"
"""An argument that would let a checkpoint's own code run behind the record's back."""
SAY_IT = f"write model.{REMOTE_CODE}, which stands in the record"
DRAFTLESS = ("ngram", "ngram_gpu", "suffix", "mtp")
"""Methods that propose tokens without a model of their own: from the text so far, or by layers of
the target's own checkpoint."""
MODELLESS = ("ngram", "ngram_gpu", "suffix")
"""Those of them that need no pass of any model."""
DRAFT_MODEL = "draft_model"
"""The method of a small model that runs beside the target."""


UNFUSED = "unfused"
"""`moe_backend` of the reference path: one expert after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculative:
    """A draft that proposes tokens (MoE-Inference-Bench §6.3)."""

    model: str
    """Draft by catalogue name, folder or hub id; or a method that needs none (`ngram`, `mtp`)."""
    tokens: int = 4
    """Tokens proposed per step."""
    method: str | None = None
    """By the engine's own name (`eagle3`, `medusa`, …); null: what `model` says."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further settings of the engine's speculation (`prompt_lookup_max`, `revision`, …), as they
    are; none may contradict the fields above."""

    def __post_init__(self) -> None:
        named("engine.speculative.model", self.model)
        at_least("engine.speculative.tokens", self.tokens, 1)
        if self.method is not None:
            named("engine.speculative.method", self.method)

    @property
    def way(self) -> str:
        """The method, spelt out."""
        return self.method or (self.model if self.model in DRAFTLESS else DRAFT_MODEL)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Everything that an engine is built from besides model and layout."""

    kind: EngineKind = "vllm"
    """Implementation."""
    moe_backend: str | None = None
    """Kernel of the MoE layers by the engine's own name; `unfused` is one expert after the
    other, in plain matrix products; null lets the engine choose."""
    speculative: Speculative | None = None
    """Speculative decoding."""
    routing: str | None = None
    """`uniform`, `zipf:EXPONENT` or `all-to-one`; null keeps the model's own router."""
    eager: bool = False
    """Skip graph capture and compilation."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments passed to the engine as they are. They win over what the project would choose, but
    none may contradict a field of the trial (`workers.contract.arguments`)."""
    memory_limit_gib: float | None = None
    """Memory one device may use, in GiB; null is all of it."""

    def __post_init__(self) -> None:
        if self.memory_limit_gib is not None:
            positive("engine.memory_limit_gib", self.memory_limit_gib)
        if REMOTE_CODE in self.args:
            raise ValueError(f"engine.args holds {REMOTE_CODE}: {SAY_IT}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StandIn:
    """What an engine that predicts speaks for."""

    version: str
    """Of the model that predicts."""
    device: str
