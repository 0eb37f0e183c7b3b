"""What our own code does on a GPU, with torch and NVML alone: no vLLM, no Ray.

So a machine with a GPU and nothing but torch is of use, too. Not run so far: no GPU was at hand.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from workers.hardware.gpus import Gpus
from workers.moe.skew import inclusion, parse, probabilities

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "int32", "uint8"])
def test_random_codes_are_drawn_on_the_device_in_little_memory(dtype: str) -> None:
    from workers.engines.random_weights import fill

    storage = getattr(torch, dtype)
    weight = torch.zeros(8, 4096, 4096, dtype=torch.uint8, device="cuda")  # 128 MiB
    layer = {
        "w13_weight": weight.view(storage),
        "w13_weight_scale": torch.zeros(8, 4096, 1, device="cuda"),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    fill(layer, bits=4 if dtype == "int32" else None, seed=1)
    torch.cuda.synchronize()
    print(f"{dtype}: {weight.nbytes / 2**30 / (time.perf_counter() - start):.1f} GiB/s")
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 2
    counts = torch.bincount(weight[0].flatten().int(), minlength=256)
    assert (counts > 0).sum() > 100 and counts.max() < 0.05 * counts.sum()
    assert (layer["w13_weight_scale"] > 0).all()


def test_multiplying_zeros_is_not_what_random_codes_are() -> None:
    """Why skeletons hold random codes: the same product, of zeros and of random numbers. Prints
    both; on a GPU that is held by its power limit zeros are faster."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    from workers.engines.random_weights import fill

    one, took = torch.ones((), device="cuda"), {}
    side = 8192
    for name in ("zeros", "random"):
        pair = {key: torch.zeros(side, side, device="cuda") for key in ("a_weight", "b_weight")}
        codes = {key: value.to(torch.float8_e4m3fn) for key, value in pair.items()}
        if name == "random":
            assert fill(codes, bits=None, seed=1) == set(codes)
        a, b = codes["a_weight"], codes["b_weight"].t()
        for repeats in (20, 200):  # the first ones warm up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
            end.record()
            end.synchronize()
            took[name] = start.elapsed_time(end) / repeats
    print({name: f"{2 * side**3 / ms / 1e9:.0f} TFLOPS" for name, ms in took.items()})
    assert took["random"] > 0.97 * took["zeros"]


def test_fast_accumulation_is_at_least_as_fast() -> None:
    """Of FP8 products, whose peak the calibration takes with it."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    side = 8192
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one, took = torch.ones((), device="cuda"), {}
    for fast in (False, True):
        for repeats in (10, 100):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)
            end.record()
            end.synchronize()
            took[fast] = start.elapsed_time(end) / repeats
    print({fast: f"{2 * side**3 / ms / 1e9:.0f} TFLOPS" for fast, ms in took.items()})
    assert took[True] < 1.05 * took[False]


def test_experts_one_by_one_are_the_same_on_both_devices() -> None:
    from workers.engines.unfused_kernel import unfused_experts

    torch.manual_seed(0)
    x, w13, w2 = torch.randn(9, 64), torch.randn(8, 96, 64), torch.randn(8, 64, 48)
    weights, ids = torch.rand(9, 8).topk(2)
    told = []
    for device in ("cpu", "cuda"):
        output = torch.empty(9, 64, device=device)
        given = [one.to(device) for one in (x, w13, w2, weights, ids)]
        unfused_experts(output, *given, "silu")
        told.append(output.cpu())
    torch.testing.assert_close(told[0], told[1], rtol=1e-2, atol=1e-1)  # TF32 may be on


def test_no_graph_can_hold_experts_one_by_one() -> None:
    """Which is why the engine captures none around them."""
    from workers.engines.unfused_kernel import unfused_experts

    x = torch.randn(9, 64, device="cuda")
    w13, w2 = torch.randn(8, 96, 64, device="cuda"), torch.randn(8, 64, 48, device="cuda")
    weights, ids = torch.rand(9, 8, device="cuda").topk(2)
    output = torch.empty_like(x)
    unfused_experts(output, x, w13, w2, weights, ids, "silu")
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        unfused_experts(output, x, w13, w2, weights, ids, "silu")
    torch.cuda.synchronize()


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2", "all-to-one"])
def test_forced_routing_is_drawn_anew_by_each_replay_of_a_graph(routing: str) -> None:
    from workers.engines.forced_choice import choose, scores

    tokens, experts, top_k, replays = 512, 8, 2, 20
    log_p = scores(parse(routing), experts, torch.device("cuda"))
    choose(log_p, tokens, top_k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = choose(log_p, tokens, top_k)
    drawn = []
    for _ in range(replays):
        graph.replay()
        drawn.append(ids.cpu().numpy().copy())
    assert all((one[:, 0] != one[:, 1]).all() for one in drawn)
    if routing != "all-to-one":
        assert any((drawn[0] != one).any() for one in drawn[1:])
    chances = inclusion(probabilities(parse(routing), experts), top_k).chances
    count = tokens * replays
    shares = np.bincount(np.concatenate(drawn).ravel(), minlength=experts) / count
    allowed = 5 * np.sqrt(chances * (1 - chances) / count) + 1e-9
    assert (np.abs(shares - chances) <= allowed).all(), (shares, chances)


def test_the_reference_load_runs_and_gives_its_memory_back() -> None:
    from workers.engines.reference_load import on_cuda

    torch.ones(1, device="cuda")
    before = torch.cuda.memory_reserved()
    told = on_cuda(torch.device("cuda"))
    print(told)
    assert told.bandwidth_gb_s.median > 100 and told.tflops.median > 10
    assert torch.cuda.memory_reserved() <= before + 2**21


def test_nvml_tells_clocks_power_and_that_nobody_else_is_there() -> None:
    gpus = Gpus.open(1)
    assert gpus is not None
    try:
        before = gpus.throttled_s()
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(200):
            x @ x
        torch.cuda.synchronize()
        told = gpus.reading([os.getpid()], before)
    finally:
        gpus.close()
    print(told)
    assert told.sm_clock_mhz is not None and told.sm_clock_mhz > 500
    assert told.temperature_c is not None and told.power_limit_w is not None
    assert told.other_processes in (0, None)  # inside a container NVML may know other numbers
