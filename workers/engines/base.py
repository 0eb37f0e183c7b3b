"""What every engine must offer, so that one runner measures them all.

An engine is built for one group: its model, layout and settings, and the largest of the
group's workloads. Trials of a group share the weights, not the number of experts per token:
an engine that can change that in place says so (`become`). It only generates and reports;
warm-up, repeats, statistics and records belong to the runner. Whatever goes wrong inside
comes out as an `EngineError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from workers.contract.engine import EngineKind, StandIn
from workers.contract.errors import OutOfMemory, Unsupported
from workers.contract.measurement import Memory, Pass, PassKind
from workers.contract.trace import Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.reference import Reference
from workers.moe.partial import Partial
from workers.moe.structure import Architecture
from workers.texts import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a built engine says of itself."""

    version: str
    args: dict[str, Any]
    """Arguments that build it as it now runs, as JSON data."""
    architecture: Architecture | Partial
    """Structure that it really runs; where that cannot be told, the dimensions that can."""
    threads: int | None
    """CPU threads per device; null on GPUs."""
    moe_kernel: str | None = None
    """Kernel of its MoE layers, by the engine's own name; null where it tells of none."""
    too_large: Mapping[Workload, OutOfMemory] = field(default_factory=dict)
    """Workloads that it was built for and whose batch its KV cache does not hold at once: no
    engine would. It still generates them, with requests that wait or are computed anew."""
    too_tight: frozenset[Workload] = frozenset()
    """The same where an engine built without larger workloads may have the little that lacks."""
    moe_config: str | None = None
    """What that kernel was tuned by, as in the column of this name; null where nothing tunes it."""

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows.

        Raises:
            Unsupported: it does not tell, so no prompt can be made.
        """
        if self.architecture.vocab_size is None:
            raise Unsupported("the model tells no size of its vocabulary, and prompts need one")
        return self.architecture.vocab_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where an engine is built."""

    scratch: Path
    """Folder for files of its own, removed by the caller."""
    device: str
    """Class of device that the sweep is planned for."""


class Engine(Protocol):
    """A model in memory that generates tokens."""

    loaded: Loaded

    def __init__(self, trial: Trial, workloads: Sequence[Workload], site: Site) -> None:
        """Builds the engine for `trial`'s engine key and all of `workloads`.

        Args:
            trial: the trial whose top-k it begins with.
            workloads: every workload that the engine must carry.
            site: where it is built.

        Raises:
            EngineError: with the stage at which memory ran out, where it did.
        """

    @classmethod
    def prepare(cls) -> None:
        """Imports what the engine needs, so that a process pays for it once, before it
        counts as idle.

        Raises:
            EngineError: the engine cannot be imported.
        """

    @classmethod
    def stands_for(cls, device: str) -> StandIn | None:
        """What its figures are of when a sweep is planned for that class of device; null for
        the machine in hand, measured."""

    @classmethod
    def refuses(cls, trial: Trial) -> str | None:
        """Why this engine cannot do what `trial` asks for; null if it can try.

        Raises:
            Infeasible: the trial contradicts itself, as only a machine with its files can tell.
        """

    def become(self, trial: Trial) -> bool:
        """Turns into the engine of another trial of the group, whose weights are the same.

        Returns:
            True when it now is that engine, to the last logit, and `loaded` says so; false
            when it cannot become it in place, and has to be closed and built anew.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        *,
        kind: PassKind,
        repeat: int,
        temperature: float = 0.0,
    ) -> Pass:
        """Sends all prompts at once and waits for exactly `output_tokens` of each.

        Nothing cached by an earlier pass is used.

        Args:
            prompts: token ids, batch × input tokens.
            output_tokens: tokens to generate per prompt; end-of-sequence is ignored.
            kind: what the pass is for.
            repeat: its position among the passes of its kind.
            temperature: of sampling; 0 is greedy.

        Raises:
            EngineError: out of memory (stage `run`), or the engine's death.
        """

    def trace(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int | Sequence[int],
        *,
        routes: bool = False,
        temperature: float = 0.0,
    ) -> Trace:
        """What `generate` does, with every choice of experts counted.

        Whatever is needed for that is there for this batch alone: no pass before or after it
        is slowed or changed.

        Args:
            prompts: token ids, batch × input tokens; lengths may differ.
            output_tokens: tokens to generate, of all prompts or of each; end-of-sequence is
                ignored. Where they differ, requests end at different times, as they do in
                serving.
            routes: also tell the experts of every single token.
            temperature: of sampling; 0 is greedy.

        Raises:
            ValueError: not a number of output tokens per prompt.
            Unsupported: this engine, or the way it was built, has no routing to look at.
            EngineError: out of memory (stage `run`), or the engine's death.
        """

    def tokenizer(self) -> Tokenizer | None:
        """That of the model, for prompts of text; null where prompts are only counted.

        Raises:
            Infeasible: the model comes without one.
        """

    def reference(self) -> Reference | None:
        """Runs the short load of fixed work (`workers.hardware.reference`) on every rank.

        Never raises: a load that cannot run says nothing of the engine, and an engine that is
        dead says so at its next pass.

        Returns:
            What all ranks reached together; null where nothing is measured, or nothing could be.
        """

    def memory(self) -> Memory:
        """Memory of the fullest device since the engine began to load."""

    def close(self) -> None:
        """Gives everything back; never raises, may be called twice."""


def engine_class(kind: EngineKind) -> type[Engine]:
    """The implementation of an engine kind; imports it.

    Raises:
        Unsupported: this version has no such engine.
    """
    if kind == "vllm":
        from workers.engines.vllm_engine import VllmEngine

        return VllmEngine
    if kind == "roofline":
        from workers.engines.roofline_engine import RooflineEngine

        return RooflineEngine
    raise Unsupported(f"engine.kind {kind} is not available in this version; vllm and roofline are")
