"""Which tuned file vLLM's MoE kernels take, seen where vLLM looks for it.

The lookup itself is vLLM's own and reads the files that come with it. Only the device's name is a
stand-in: on a CPU no kernel looks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.model_executor.layers.fused_moe import fused_moe

from workers.engines import vllm_tuning

H100 = "NVIDIA_H100_80GB_HBM3"


@pytest.fixture(autouse=True)
def lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: H100)
    monkeypatch.setattr(fused_moe, "get_moe_configs", fused_moe.get_moe_configs.__wrapped__)
    monkeypatch.setattr(vllm_tuning, "_taken", set())


def _look(experts: int, width: int, dtype: str | None = None) -> dict[str, int]:
    """As `TritonExperts` does before it multiplies."""
    w13, w2 = (experts, 2 * width, 4096), (experts, 4096, width)
    found: dict[str, int] = fused_moe.try_get_optimal_moe_config(w13, w2, 2, dtype, 16)
    return found


def test_a_shape_with_a_file_and_one_without_are_told_apart() -> None:
    vllm_tuning.take_over()
    vllm_tuning.take_over()  # once is enough
    with_file = f"E=8,N=1792,device_name={H100}.json"
    assert (Path(fused_moe.__file__).parent / "configs" / with_file).exists()
    assert _look(8, 1792)["BLOCK_SIZE_M"] > 0
    assert vllm_tuning.taken() == {with_file}
    assert _look(12, 14336)["BLOCK_SIZE_M"] > 0
    assert vllm_tuning.taken() == {with_file, vllm_tuning.DEFAULT}


def test_a_file_of_the_user_s_own_goes_first_and_is_told_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    vllm_tuning.take_over()
    name = f"E=12,N=14336,device_name={H100},dtype=fp8_w8a8.json"
    (tmp_path / name).write_text('{"16": {"BLOCK_SIZE_M": 77}}')
    assert _look(12, 14336, "fp8_w8a8") == {"BLOCK_SIZE_M": 77}
    (told,) = vllm_tuning.taken()
    assert told.startswith(f"{name}@") and len(told) == len(name) + 9


def test_a_lookup_that_was_made_is_not_made_again() -> None:
    vllm_tuning.take_over()
    for _ in range(3):
        _look(8, 1792)
    assert fused_moe.get_moe_configs.cache_info()[:2] == (2, 1)  # hits and misses
