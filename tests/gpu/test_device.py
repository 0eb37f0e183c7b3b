"""The GPU in hand, against its data sheet. Not run so far: no GPU was at hand."""

from __future__ import annotations

import pytest

from workers.hardware.device import device
from workers.hardware.hand import in_hand
from workers.hardware.host import describe, device_class
from workers.hardware.peaks import calibrate

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_the_gpu_is_one_of_the_catalogue() -> None:
    host = describe()
    assert host.gpus > 0
    known = device(device_class(host))
    assert host.memory_gib == pytest.approx(known.memory_gib, rel=0.05)


def test_a_calibration_comes_near_the_peaks_of_the_data_sheet_and_not_above() -> None:
    host = describe()
    known = device(device_class(host))
    found = calibrate(host)
    assert found.kind == "cuda"
    assert 0.6 < found.bandwidth_gb_s / known.bandwidth_gb_s < 1.05
    assert 0.4 < found.tflops["bf16"] / known.bf16_tflops < 1.05


def test_utilisation_is_taken_against_the_data_sheet_with_the_calibration_beside_it() -> None:
    hand = in_hand(describe())
    assert hand.device is not None and hand.device.name != "cpu"
    columns = hand.columns("bfloat16")
    assert columns["calibrated_bandwidth_gb_s"] > 0 and columns["calibrated_tflops"] > 0
