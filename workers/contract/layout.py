"""How one engine is spread over devices."""

from __future__ import annotations

from dataclasses import dataclass

from workers.contract.validate import at_least, named


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Parallel degrees; their product is the number of devices an engine asks Ray for."""

    tensor: int = 1
    """Tensor-parallel degree."""
    pipeline: int = 1
    """Pipeline-parallel degree."""
    data: int = 1
    """Data-parallel degree."""
    expert: bool = False
    """Spread experts over the tensor × data devices instead of cutting each of them."""
    device: str | None = None
    """Class of device that the engine must run on, by the catalogue's name; null takes any."""

    def __post_init__(self) -> None:
        for key in ("tensor", "pipeline", "data"):
            at_least(f"layout.{key}", getattr(self, key), 1)
        if self.device is not None:
            named("layout.device", self.device)

    @property
    def devices(self) -> int:
        """Devices of one engine."""
        return self.tensor * self.pipeline * self.data
