"""What a class of device can do, and which class is in hand.

A profile of a sweep names such a class. Accelerators are looked up in the catalogue by the
exact name that their driver gives; one that is not there is an error that says how to add
or to calibrate it, because a guessed peak makes every utilisation wrong. A CPU has no data
sheet that a guest can trust, so its peaks are measured: by the calibration that was stored
for this machine, else by a quick estimate that is good enough to order a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

Kind = Literal["cpu", "gpu", "soc", "server"]
"""`soc`: accelerator that shares its CPU's memory. `server`: several GPUs taken as one."""

CPU = "cpu"
PEAKS = (
    "bandwidth_gb_s",
    "bf16_tflops",
    "fp8_tflops",
    "fp4_tflops",
    "int8_tflops",
    "fp32_tflops",
)
"""What a utilisation is taken against; a device is verified when these are."""
COMPUTE = ("bf16", "fp16", "fp32", "fp8", "int8", "fp4")
"""What a matrix product may be computed in."""

_HOW_TO_ADD = (
    "add it to workers/hardware/catalog/devices.yaml from the vendor's data sheet, or take "
    "its peaks from a calibration on it: python -m workers.engines.calibrate"
)


class UnknownDevice(ValueError):
    """A device class that the catalogue does not hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Peaks of one device of a class; null is a figure that is not known or not there."""

    name: str
    """Class, as profiles name it."""
    kind: Kind
    source: str
    """Where the peaks come from."""
    verified: bool
    """Whether every one of `PEAKS` that it has was checked or properly measured."""
    bandwidth_gb_s: float
    """Memory bandwidth, 10⁹ bytes per second."""
    bf16_tflops: float
    """Dense BF16 peak, 10¹² FLOP per second."""
    fp16_tflops: float | None = None
    """Dense FP16 peak where it is not that of BF16: on CPUs."""
    fp8_tflops: float | None = None
    """Dense FP8 peak."""
    fp4_tflops: float | None = None
    """Dense FP4 peak, of products of which both sides have 4 bits."""
    int8_tflops: float | None = None
    """Dense INT8 peak, 10¹² operations per second."""
    fp32_tflops: float | None = None
    """FP32 peak without TF32."""
    bf16_sparse_tflops: float | None = None
    """BF16 with 2:4 sparsity: never a peak to take a utilisation against."""
    fp8_sparse_tflops: float | None = None
    """FP8 with 2:4 sparsity: likewise."""
    fp4_sparse_tflops: float | None = None
    """FP4 with 2:4 sparsity: likewise."""
    memory_gb: float
    """Memory as sold, 10⁹ bytes."""
    memory_gib: float
    """Memory that a program finds there, GiB."""
    power_w: float | None = None
    """Power limit of the board (of a server: of all of it), watts."""
    price_usd: float | None = None
    """Purchase price, US dollars."""
    link_gb_s: float | None = None
    """To the other devices of its node, one direction, 10⁹ bytes per second."""
    network_gb_s: float | None = None
    """To other nodes, one direction, per device, 10⁹ bytes per second."""
    link_latency_s: float | None = None
    """Least time of a collective operation over the links, seconds; an assumption."""

    def tflops(self, compute: str) -> float:
        """Peak rate of matrix products computed in `compute`, 10¹² operations per second.

        Where the device has no unit for it, the weights are unpacked and the product is
        computed in BF16, so BF16's rate is the peak. For FP32 without a figure that rate is
        only an upper bound.

        Raises:
            ValueError: `compute` is none of `COMPUTE`.
        """
        match compute:
            case "bf16":
                return self.bf16_tflops
            case "fp16":
                return self.fp16_tflops or self.bf16_tflops
            case "fp8":
                return self.fp8_tflops or self.bf16_tflops
            case "fp4":
                return self.fp4_tflops or self.bf16_tflops
            case "int8":
                return self.int8_tflops or self.bf16_tflops
            case "fp32":
                return self.fp32_tflops or self.bf16_tflops
        raise ValueError(f"no peak is defined for {compute!r}: known are {', '.join(COMPUTE)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where one figure of the catalogue comes from."""

    source: str
    verified: bool
    """Agrees with the vendor's document, or with two public tables."""


def names() -> tuple[str, ...]:
    """Every class and alias that a profile may name."""
    return (CPU, *_spellings())


def devices() -> tuple[Device, ...]:
    """Every device of the catalogue, in its order; this machine's CPU is not among them."""
    return tuple(_device(entry) for entry in _catalogue()["devices"])


def device(name: str) -> Device:
    """The device class called `name`; for `cpu`, this machine's own, measured.

    Raises:
        UnknownDevice: with what is known and how to add or calibrate one.
    """
    if name == CPU:
        from workers.hardware.cpu import cpu  # which needs this module first

        return cpu()
    if name not in _spellings():
        raise UnknownDevice(
            f"unknown device class {name!r}: known are {', '.join(names())}; {_HOW_TO_ADD}"
        )
    return _device(_spellings()[name])


def provenance(name: str) -> Mapping[str, Provenance]:
    """Source of each figure that the catalogue gives for `name`, by its key.

    Raises:
        UnknownDevice: the catalogue does not hold it; it holds no CPU.
    """
    if name not in _spellings():
        raise UnknownDevice(f"the catalogue holds no {name!r}; {_HOW_TO_ADD}")
    catalogue = _catalogue()
    facts, default = catalogue["devices"][_spellings()[name]], catalogue["defaults"]
    sources = default["sources"] | facts.get("sources", {})
    unverified = {*default["unverified"], *facts.get("unverified", ())}
    return {
        key: Provenance(
            source=catalogue["sources"][sources.get(key, facts["source"])],
            verified=key not in unverified,
        )
        for key in facts
        if key not in _ABOUT
    }


def classify(driver_name: str) -> str | None:
    """The class of the device that its driver calls exactly `driver_name`; null if unknown.

    Exactly, because drivers tell variants apart by what they append: an H20-3e is no H20,
    a laptop's 4090 no 4090, and a MIG slice not the GPU it was cut from.
    """
    for entry, facts in _catalogue()["devices"].items():
        if driver_name.strip() in facts.get("detect", ()):
            return str(entry)
    return None


_ABOUT = ("kind", "aliases", "detect", "source", "sources", "unverified")
"""Keys of an entry that are not figures."""


@cache
def _device(entry: str) -> Device:
    facts = _catalogue()["devices"][entry]
    figures = {key: float(value) for key, value in facts.items() if key not in _ABOUT}
    figures.setdefault("memory_gib", figures["memory_gb"] * 1e9 / 2**30)
    origin = provenance(entry)
    return Device(
        name=entry,
        kind=facts["kind"],
        source=origin["bandwidth_gb_s"].source,
        verified=all(origin[key].verified for key in PEAKS if key in origin),
        **figures,
    )


@cache
def _spellings() -> dict[str, str]:
    """The entry that each name and alias stands for."""
    return {
        spelling: entry
        for entry, facts in _catalogue()["devices"].items()
        for spelling in (entry, *facts.get("aliases", ()))
    }


@cache
def _catalogue() -> dict[str, Any]:
    import yaml

    text = (resources.files("workers.hardware") / "catalog" / "devices.yaml").read_text("utf-8")
    return dict(yaml.safe_load(text))
