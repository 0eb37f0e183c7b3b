"""How the numbers of one matrix are stored.

Bytes per parameter is not one number: beside each group of quantised values stand a scale,
perhaps a zero point, and per matrix a scale of scales. A format holds all of it, as a checkpoint
stores it and vLLM creates it for loading. What a kernel pads or repacks afterwards is not in it:
that depends on the kernel, and so on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How the values of one matrix are stored."""

    bits: int
    """Per value."""
    scale_bytes: float = 0.0
    """Per block; a mean where scales have scales of their own."""
    block: tuple[int, int] = (0, 0)
    """Outputs × inputs that share a scale; 0 stands for all of them."""
    zero_bits: int = 0
    """Zero point, per block."""
    output_bytes: int = 0
    """Beside each output: the bias that a method gives matrices which have none."""
    matrix_bytes: int = 0
    """Beside the whole matrix: scales of scales, scales of its inputs."""
    compute: str | None = None
    """Type of the product, as `Device.tflops` names it; null where the values are unpacked
    to the type of the activations first.
    """

    def __post_init__(self) -> None:
        if min(self.block) < 0:
            raise ValueError(f"values share a scale in blocks of {self.block}")

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of (outputs, inputs) with all that belongs to it."""
        outputs, inputs = shape
        rows, columns = self.block
        blocks = ceil(outputs / (rows or outputs)) * ceil(inputs / (columns or inputs))
        beside = blocks * (self.scale_bytes + self.zero_bits / 8) + outputs * self.output_bytes
        return ceil(outputs * inputs * self.bits / 8 + beside) + self.matrix_bytes


FP8_TENSOR = Format(bits=8, scale_bytes=4, compute="fp8")
FP8_CHANNEL = Format(bits=8, scale_bytes=4, block=(1, 0), compute="fp8")
FP8_BLOCK = Format(bits=8, scale_bytes=4, block=(128, 128), compute="fp8")
INT8_CHANNEL = Format(bits=8, scale_bytes=4, block=(1, 0), compute="int8")
INT8_WEIGHT_ONLY = Format(bits=8, scale_bytes=4, block=(1, 0))
MXFP8 = Format(bits=8, scale_bytes=1, block=(1, 32), compute="fp8")
MXFP4 = Format(bits=4, scale_bytes=1, block=(1, 32))
"""4-bit weights whose products are computed in 16 bits, which is what a checkpoint of weights
alone asks for; a kernel may compute in less.
"""


def nvfp4(group: int = 16, *, scales: int = 2, compute: str | None = "fp4") -> Format:
    """4 bits and one FP8 scale per `group` inputs; `scales` in 32 bits beside the matrix: that of
    the weights, and that of its inputs where they are quantised too.
    """
    return Format(bits=4, scale_bytes=1, block=(1, group), matrix_bytes=4 * scales, compute=compute)


def grouped(bits: int, group: int, *, zero_bits: int = 0, output_bytes: int = 0) -> Format:
    """Integers in groups of `group` inputs with a 16-bit scale; -1 for one group per output."""
    return Format(
        bits=bits,
        scale_bytes=2,
        block=(1, max(group, 0)),
        zero_bits=zero_bits,
        output_bytes=output_bytes,
    )
