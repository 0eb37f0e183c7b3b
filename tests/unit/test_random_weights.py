"""Random weights that are stored quantised: distribution, scales, and what is left alone.

The reference is what vLLM's dummy loader writes, so the tests say what was wrong with it, too.
"""

from __future__ import annotations

import pytest
import torch

from workers.engines.random_weights import E2M1, LARGEST, fill, roles

SHAPE = (64, 256)
FP4 = torch.tensor([*E2M1, *(-one for one in E2M1)])


def _scales(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def _nibbles(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.view(-1).view(torch.uint8)
    return torch.cat([data & 15, data >> 4]).long()


def _is_normal(weights: torch.Tensor) -> None:
    """Centred, about as large as an unquantised skeleton's, with a bell's share inside of one
    standard deviation."""
    weights = weights.flatten().double()
    assert weights.isfinite().all()
    spread = weights.std()
    assert abs(weights.mean()) < 0.1 * spread
    assert 0.2 * LARGEST < spread < 0.5 * LARGEST
    assert weights.abs().max() <= 1.3 * LARGEST
    assert 0.6 < (weights.abs() <= spread * 1.01).double().mean() < 0.78


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_no_longer_zero(dtype: torch.dtype) -> None:
    as_before = torch.empty(SHAPE).uniform_(-LARGEST, LARGEST).to(dtype)
    if dtype == torch.float8_e4m3fn:  # of the dummy loader, 98 in 100
        assert (as_before.float() == 0).float().mean() > 0.95
    layer = {"weight": torch.zeros(SHAPE).to(dtype), "weight_scale": _scales((SHAPE[0], 1))}
    assert fill(layer, bits=None, seed=1) == set(layer)
    assert (layer["weight"].float() == 0).float().mean() < 0.05
    assert (layer["weight_scale"] > 0).all()
    _is_normal(layer["weight"].float() * layer["weight_scale"])


@pytest.mark.parametrize("scale", [torch.uint8, torch.float8_e8m0fnu])
def test_powers_of_two_are_of_the_right_size(scale: torch.dtype) -> None:
    layer = {
        "w13_weight": torch.zeros(4, *SHAPE).to(torch.float8_e4m3fn),
        "w13_weight_scale": torch.zeros(4, 64, 8, dtype=torch.uint8).view(scale),
    }
    fill(layer, bits=None, seed=1)
    exponents = layer["w13_weight_scale"].view(torch.uint8).double() - 127
    factors = (2**exponents).repeat_interleave(32, dim=-1)
    weights = layer["w13_weight"].double() * factors
    assert weights.isfinite().all()
    assert 0.1 * LARGEST < weights.std() < 0.6 * LARGEST


def test_int8_and_its_zero_points() -> None:
    layer = {
        "weight": torch.zeros(SHAPE, dtype=torch.int8),
        "weight_scale": _scales((SHAPE[0], 1)),
        "input_scale": _scales((1,)),
        "input_zero_point": torch.full((1,), 77, dtype=torch.int8),
    }
    fill(layer, bits=None, seed=1)
    _is_normal(layer["weight"].float() * layer["weight_scale"])
    assert len(layer["weight"].unique()) > 150
    assert layer["input_zero_point"].item() == 0
    assert layer["input_scale"].item() == pytest.approx(LARGEST / 127)


def test_four_bits_in_a_byte_of_their_own() -> None:
    """INT4 weights with INT8 activations, which vLLM packs after loading."""
    layer = {
        "weight": torch.zeros(SHAPE, dtype=torch.int8),
        "weight_scale": _scales((64, 2), torch.bfloat16),
    }
    fill(layer, bits=4, seed=1)
    assert layer["weight"].unique().tolist() == list(range(-7, 8))
    _is_normal(layer["weight"].float() * layer["weight_scale"].float().mean())


@pytest.mark.parametrize("names", [("qweight", "scales", "qzeros"), ("w2_weight_packed",) * 3])
def test_four_bits_around_the_middle(names: tuple[str, str, str]) -> None:
    weight, scales, zeros = names
    if weight != "qweight":
        scales, zeros = "w2_weight_scale", "w2_weight_zero_point"
    layer = {
        weight: torch.zeros(64, 32, dtype=torch.int32),
        scales: _scales((64, 2), torch.float16),
        zeros: torch.zeros(64, 1, dtype=torch.int32),
    }
    fill(layer, bits=4, seed=1)
    zero = _nibbles(layer[zeros]).unique().item()
    factors = layer[scales].double().mean()
    _is_normal((_nibbles(layer[weight]) - zero).double() * factors)
    assert len(_nibbles(layer[weight]).unique()) == 15  # of 16: the range is symmetrical
    assert (layer[scales] > 0).all()


@pytest.mark.parametrize("storage", [torch.int32, torch.uint8])
def test_eight_bits_around_the_middle(storage: torch.dtype) -> None:
    layer = {
        "w13_qweight": torch.zeros(8, 64, 32, dtype=storage),
        "w13_scales": _scales((8, 64, 1), torch.bfloat16),
        "w13_qzeros": torch.zeros(8, 64, 1, dtype=storage),
    }
    fill(layer, bits=8, seed=1)
    codes = layer["w13_qweight"].view(-1).view(torch.uint8).double()
    zero = layer["w13_qzeros"].view(-1).view(torch.uint8).unique().item()
    assert zero == 128
    _is_normal((codes - zero) * layer["w13_scales"].double().mean())


@pytest.mark.parametrize("bits", [None, 4])
def test_two_fp4_numbers_in_a_byte(bits: int | None) -> None:
    """NVFP4: a factor in FP8 for each block, and one of the matrix, which two libraries store as
    the inverse of each other."""
    told = []
    for name in ("weight_scale_2", "weight_global_scale"):
        layer = {
            "weight": torch.zeros(SHAPE, dtype=torch.uint8),
            "weight_scale": torch.zeros(64, 32).to(torch.float8_e4m3fn),
            name: _scales((1,)),
        }
        fill(layer, bits=bits, seed=1)
        whole = layer[name].double()
        factor = 1 / whole if name == "weight_global_scale" else whole
        codes = _nibbles(layer["weight"])
        assert len(codes.unique()) == 16
        told.append(FP4[codes] * layer["weight_scale"].double().mean() * factor)
        spread = told[-1].std()
        assert 0.15 * LARGEST < spread < 0.5 * LARGEST
    torch.testing.assert_close(told[0], told[1])


def test_codes_across_bytes_are_any_bits() -> None:
    layer = {
        "qweight": torch.zeros(24, 64, dtype=torch.int32),
        "scales": _scales((2, 64)),
        "qzeros": torch.zeros(2, 6, dtype=torch.int32),
    }
    fill(layer, bits=3, seed=1)
    shares = torch.bincount(layer["qweight"].view(-1).view(torch.uint8).int(), minlength=256)
    assert (shares > 0).all()


def test_a_draw_can_be_repeated_and_differs_by_seed_and_tensor() -> None:
    def layer(seed: int) -> dict[str, torch.Tensor]:
        made = {
            name: torch.zeros(SHAPE, dtype=torch.int8) for name in ("w13_weight", "w2_weight")
        } | {"w13_weight_scale": _scales((64, 1)), "w2_weight_scale": _scales((64, 1))}
        fill(made, bits=None, seed=seed)
        return made

    first, again, other = layer(1), layer(1), layer(2)
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["w13_weight"].equal(other["w13_weight"])
    assert not first["w13_weight"].equal(first["w2_weight"])


def test_pieces_and_strides_are_filled_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engines.random_weights.PIECE", 1000)
    layer = {
        "weight": torch.zeros(96, 63, dtype=torch.int8).t(),
        "weight_scale": _scales((63, 1)),
    }
    fill(layer, bits=None, seed=1)
    assert (layer["weight"] == 0).float().mean() < 0.05
    assert (layer["weight"][-1] != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "layer",
    [
        {"weight": torch.zeros(SHAPE, dtype=torch.bfloat16), "bias": torch.zeros(64)},
        {"k_scale": torch.ones(()), "v_scale": torch.ones(())},  # of a KV cache in FP8
        {"tid2eid": torch.zeros(8, 2, dtype=torch.int32)},
    ],
)
def test_what_is_not_stored_quantised_is_left_to_the_loader(layer: dict[str, torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in layer.items()}
    assert roles(layer) == {} and fill(layer, bits=None, seed=1) == set()
    assert all(layer[name].equal(before[name]) for name in layer)


def test_indices_in_a_quantised_layer_are_left_alone() -> None:
    layer = {
        "weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "weight_scale": _scales((8, 1)),
        "weight_shape": torch.tensor([8, 64]),
        "weight_g_idx": torch.arange(64, dtype=torch.int32),
        "_expert_map": torch.arange(4, dtype=torch.int32),
        "bias": torch.zeros(8),
    }
    assert fill(layer, bits=4, seed=1) == {"weight_packed", "weight_scale"}
    assert layer["weight_shape"].tolist() == [8, 64]
    assert layer["weight_g_idx"].equal(torch.arange(64, dtype=torch.int32))
