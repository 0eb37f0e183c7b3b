"""The device in hand: what it can do by its data sheet, and what it did when asked.

Utilisation needs a peak to be taken against. A GPU has one in the catalogue; a CPU has
only what a measurement shows. Both are calibrated once per machine, by a process of its
own, and every record carries what its figures were taken against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.hardware import peaks
from workers.hardware.device import CPU, Device, device
from workers.hardware.host import Host
from workers.hardware.peaks import Calibration, CalibrationError, calibrated


@dataclass(frozen=True, kw_only=True, slots=True)
class Hand:
    """One device of this machine."""

    device: Device | None
    """Its class; null for a GPU that the catalogue does not know."""
    calibration: Calibration | None
    """Null where the measurement failed."""

    def columns(self, dtype: str) -> dict[str, Any]:
        """What was measured, as columns of a record in data type `dtype`."""
        if self.calibration is None:
            return {}
        return {
            "calibrated_bandwidth_gb_s": self.calibration.bandwidth_gb_s,
            "calibrated_tflops": self.calibration.tflops.get(_SHORT.get(dtype, dtype)),
        }


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def in_hand(host: Host) -> Hand:
    """The device of `host`; measures it the first time that a machine is met, and again where
    that was disturbed and the machine is quiet now."""
    calibration = None
    try:
        calibration = calibrated(host)
    except CalibrationError as error:
        print(f"this device could not be calibrated: {error}")
    return _hand(host, calibration)


def doubted(host: Host) -> Hand | None:
    """The device of `host`, measured once more because more than its peak was seen; null where
    its peak is of the catalogue, or another measurement is of no use (`peaks.doubted`)."""
    calibration = peaks.doubted(host) if host.device_class == CPU else None
    return None if calibration is None else _hand(host, calibration)


def _hand(host: Host, calibration: Calibration | None) -> Hand:
    known = host.device_class
    if known is None or (known == CPU and calibration is None):
        return Hand(device=None, calibration=calibration)
    return Hand(device=device(known), calibration=calibration)
