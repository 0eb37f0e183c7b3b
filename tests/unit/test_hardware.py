"""The device catalogue and the roofline, against hand-made arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.workload import Workload
from workers.hardware.device import UnknownDevice, classify, device
from workers.hardware.host import describe, device_class
from workers.hardware.roofline import distinct_experts, predict
from workers.moe.architecture import resolve


def test_devices_are_found_by_class_alias_and_driver_name() -> None:
    assert device("h100") == device("h100-sxm")
    assert device("h100").bandwidth_gb_s == 3350
    assert classify("NVIDIA H100 80GB HBM3") == "h100"
    assert classify("NVIDIA H200") == "h200"
    assert classify("NVIDIA H20") == "h20"
    assert classify("Tesla K80") is None


def test_an_unknown_device_says_where_to_add_it() -> None:
    with pytest.raises(UnknownDevice, match=r"unknown device class 'h900'.*devices\.yaml"):
        device("h900")


def test_a_gpu_outside_the_catalogue_is_never_taken_for_another_class() -> None:
    here = describe()
    odd = replace(here, device="Tesla K80", device_class=classify("Tesla K80"), gpus=1)
    with pytest.raises(UnknownDevice, match=r"Tesla K80 on .* --profile"):
        device_class(odd)
    assert device_class(replace(here, device_class="h100")) == "h100"


def test_the_cpu_is_measured() -> None:
    cpu = device("cpu")
    assert cpu.bandwidth_gb_s > 0.1
    assert cpu.bf16_tflops > 0.001
    assert cpu.memory_gib > 0.5


def test_distinct_experts_under_uniform_routing() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2)
    assert distinct_experts(64, 6, 8) == pytest.approx(64 * (1 - (58 / 64) ** 8))
    assert distinct_experts(8, 8, 5) == 8


def test_weights_and_cache_of_mixtral_on_four_devices() -> None:
    model = Model(name="mixtral-8x7b", weights="dummy")
    a = resolve(model)
    assert a is not None
    workload = Workload(batch_size=16, input_tokens=2048, output_tokens=2048)
    prediction = predict(a, model, Layout(tensor=4), workload, device("h100"))
    assert prediction is not None
    assert prediction.weights_gib == pytest.approx(46_702_792_704 * 2 / 4 / 2**30)
    assert prediction.kv_cache_gib == pytest.approx(16 * 4096 * 131_072 / 4 / 2**30)


def test_decode_of_one_sequence_is_bound_by_the_bytes_it_reads() -> None:
    model = Model(name="mixtral-8x7b", weights="dummy")
    a = resolve(model)
    assert a is not None
    h100 = device("h100")
    short = predict(a, model, Layout(), Workload(input_tokens=1, output_tokens=1), h100)
    long = predict(a, model, Layout(), Workload(input_tokens=1, output_tokens=101), h100)
    assert short is not None and long is not None
    step = (long.e2e_s - short.e2e_s) / 100
    active = 12_879_925_248 * 2 / 3350e9  # every active byte once, cache of ~51 tokens aside
    assert step == pytest.approx(active + h100.step_s, rel=0.01)
