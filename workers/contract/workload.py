"""What is sent to the engine."""

from __future__ import annotations

from dataclasses import dataclass

from workers.contract.validate import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A batch of requests with exact lengths."""

    batch_size: int = 1
    """Requests in flight together."""
    input_tokens: int = 128
    """Prompt tokens of each request, exact."""
    output_tokens: int = 128
    """Generated tokens of each request, exact (end-of-sequence is ignored)."""
    seed: int = 0
    """Seed of the prompts' token ids."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy, so that every pass of the same prompts repeats."""
    arrivals: str | None = None
    """Arrival process; null submits the whole batch at once."""
    dataset: str | None = None
    """Source of prompts; null draws random token ids."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "input_tokens", "output_tokens"):
            at_least(f"workload.{key}", getattr(self, key), 1)
        at_least("workload.seed", self.seed, 0)
        at_least("workload.temperature", self.temperature, 0)

    @property
    def tokens_per_request(self) -> int:
        """Prompt and generated tokens of one request."""
        return self.input_tokens + self.output_tokens
