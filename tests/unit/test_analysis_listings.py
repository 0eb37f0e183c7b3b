"""`models` and `devices`: what other programs and people are told of the catalogues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from analysis.__main__ import main
from workers.hardware.device import devices
from workers.moe.architecture import catalogue

PROMISED = {
    "name",
    "params_total",
    "params_active",
    "params_active_no_embedding",
    "num_layers",
    "hidden_size",
    "num_experts",
    "top_k",
    "shared_experts",
    "expert_params",
    "attention_params_per_layer",
    "kv_bytes_per_token",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_models_as_json_have_the_promised_keys_and_true_values() -> None:
    result = run("models", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert sorted(found) == sorted(catalogue())
    assert all(set(one) >= PROMISED and one["exact"] for one in found.values())
    mixtral = found["mixtral-8x7b"]
    assert {key: mixtral[key] for key in PROMISED} == {
        "name": "mixtral-8x7b",
        "params_total": 46_702_792_704,
        "params_active": 12_879_925_248,
        "params_active_no_embedding": 12_748_853_248,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_experts": 8,
        "top_k": 2,
        "shared_experts": 0,
        "expert_params": 176_160_768,
        "attention_params_per_layer": 41_943_040,
        "kv_bytes_per_token": 131_072,
    }
    assert found["deepseek-r1"]["kv_bytes_per_token"] == 70_272
    assert found["deepseek-v2-lite"]["params_total"] == 15_706_484_224


def test_models_table_has_a_row_each_and_the_papers_errors() -> None:
    result = run("models")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["mixtral-8x7b", "46.703", "12.880", "12.749"] in [row[:4] for row in rows]
    assert "prints moe_intermediate_size 5632, the configuration gives 1408" in result.stdout


def test_one_model_shows_its_layers_its_source_and_its_notes() -> None:
    result = run("models", "deepseek-v2-lite")
    assert result.exit_code == 0
    for words in ("1 dense layer", "26 MoE layers", "routed experts", "553.648"):
        assert words in result.stdout
    assert "deepseek-ai/DeepSeek-V2-Lite: " in result.stdout


def test_vision_is_counted_apart() -> None:
    (one,) = json.loads(run("models", "llama-4-scout", "--json").stdout)
    apart = one["params_vision"] + one["params_projector"]
    assert apart > 800e6
    assert one["params_total"] == 107_769_861_120
    shown = run("models", "llama-4-scout").stdout
    assert f"Vision tower and projector, counted apart: {apart:,} parameters." in shown


def test_a_folder_is_listed_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(catalogue()["olmoe-1b-7b"]["config"]))
    (one,) = json.loads(run("models", str(tmp_path), "--json").stdout)
    assert (one["params_total"], one["hub_id"]) == (6_919_161_856, None)
    assert "16 MoE layers" in run("models", str(tmp_path)).stdout


def test_devices_as_json_have_the_promised_keys_in_order_of_bandwidth() -> None:
    found = json.loads(run("devices", "--json").stdout)
    assert len(found) == len(devices())
    promised = "name bandwidth_gb_s bf16_tflops fp8_tflops memory_gb power_w price_usd verified"
    assert all(set(promised.split()) <= set(one) for one in found)
    speeds = [one["bandwidth_gb_s"] for one in found]
    assert speeds == sorted(speeds)
    h100 = next(one for one in found if one["name"] == "h100")
    assert (h100["bf16_tflops"], h100["bf16_sparse_tflops"]) == (989, 1979)
    assert (h100["memory_gb"], h100["power_w"], h100["verified"]) == (80, 700, True)
    assert h100["figures"]["price_usd"]["verified"] is False
    m3 = next(one for one in found if one["name"] == "m3-max")
    assert m3["power_w"] is None and m3["price_usd"] is None and m3["fp8_tflops"] is None


def test_devices_table_keeps_sparse_peaks_apart_and_sources_on_request() -> None:
    result = run("devices", "h100", "m3-max")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["h100", "3,350", "989", "1,979", "–", "1,979", "1,979", "3,958"] in [
        r[:8] for r in rows
    ]
    assert ["m3-max", "400", "28", "–", "–", "–", "–"] in [r[:7] for r in rows]
    sources = run("devices", "h100", "--sources").stdout
    assert "price_usd ?" in sources
    assert "NVIDIA H100" in sources


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models", "mixtra"), "no model 'mixtra'; did you mean 'mixtral-8x7b'?"),
        (("models", "nobody/nothing"), "nobody/nothing is not in the hub cache"),
        (("devices", "h10"), "no device 'h10'; did you mean 'h100'?"),
    ],
)
def test_mistakes_end_with_two_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stored", "size", "words"),
    [
        (None, 2 * 46_702_792_704, "Weights as stored (not quantised): 93,405,585,408 bytes."),
        ({"quant_method": "mxfp4"}, None, "Weights as stored (mxfp4): "),
        ({"quant_method": "xyz"}, 0, "unknown quantisation 'xyz': weights of this method"),
    ],
)
def test_models_say_what_their_weights_take_as_stored(
    stored: dict[str, str] | None, size: int | None, words: str, tmp_path: Path
) -> None:
    config = {**catalogue()["mixtral-8x7b"]["config"], "quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (found,) = json.loads(run("models", str(tmp_path), "--json").stdout)
    assert found["quantization"] == (stored["quant_method"] if stored and size != 0 else None)
    if size == 0:
        assert found["weight_bytes"] is None and words in found["weight_bytes_reason"]
    else:
        assert found["weight_bytes_reason"] is None
        assert found["weight_bytes"] == size if size else found["weight_bytes"] < 46_702_792_704
    assert words in run("models", str(tmp_path)).stdout.replace("\n", " ")
