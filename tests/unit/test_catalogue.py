"""The model catalogue: form, sources, and counts against those of others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import pytest

from workers.moe.architecture import catalogue
from workers.moe.families import read
from workers.moe.structure import Architecture

NAMES = sorted(catalogue())

# Counts of others, apart from the entries' own: hub, or transformers on the meta device.
GOLDEN = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-r1": 671_026_419_200,
    "olmoe-1b-7b": 6_919_161_856,
    "phi-3.5-moe": 41_873_153_344,
    "dbrx": 131_596_523_520,
    "deepseek-vl2-tiny": 2_934_734_080,
    "deepseek-vl2-small": 15_816_584_704,
    "deepseek-vl2": 27_033_548_328,
    "llama-4-scout": 107_769_861_120,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}

UNVERIFIED = {"arctic", "grok-1", "molmoe-1b", "moonlight-16b-a3b", "switch-c"}

REQUIRED = {"hub_id", "aliases", "source", "verified", "published", "papers", "notes", "config"}
OPTIONAL = {"sources", "language_only", "derivation"}
HUB_ID = re.compile(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+")


def built(name: str) -> Architecture:
    return read(catalogue()[name]["config"])


def language(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part: Mapping[str, Any] = config.get("text_config") or config.get("language_config") or config
    return part


def test_every_model_of_the_papers_is_there() -> None:
    assert set(NAMES) == GOLDEN.keys() | UNVERIFIED


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_has_the_form(name: str) -> None:
    entry = catalogue()[name]
    assert entry.keys() >= REQUIRED
    assert entry.keys() <= REQUIRED | OPTIONAL
    assert entry["source"] and entry["notes"] and all(entry["notes"])
    assert isinstance(entry["verified"], bool)
    assert entry["published"]["total_b"] > 0 and entry["published"]["source"]
    assert all(HUB_ID.fullmatch(hub) for hub in (entry["hub_id"], *entry["aliases"]))
    assert all(entry.get("sources", {"": "any"}).values())
    config = entry["config"]
    assert config["model_type"] and config["architectures"] and config["torch_dtype"]
    assert isinstance(language(config).get("tie_word_embeddings"), bool)


def test_a_name_means_one_entry() -> None:
    names = [
        name
        for key, entry in catalogue().items()
        for name in (key, entry["hub_id"], *entry["aliases"])
    ]
    assert len({name.casefold() for name in names}) == len(names)


def test_there_are_names_of_checkpoints_but_no_addresses() -> None:
    for file in (resources.files("workers.moe") / "catalog").iterdir():
        text = file.read_text()
        assert "://" not in text and ".co/" not in text and ".com" not in text, file.name


@pytest.mark.parametrize("name", GOLDEN)
def test_totals_are_those_that_others_count(name: str) -> None:
    entry = catalogue()[name]
    assert built(name).params_total == GOLDEN[name] == entry["published"]["exact"]
    assert entry["verified"] and entry["published"]["exact_source"]


@pytest.mark.parametrize("name", sorted(UNVERIFIED))
def test_what_nobody_else_counted_is_not_called_verified(name: str) -> None:
    entry = catalogue()[name]
    assert not entry["verified"] and "exact" not in entry["published"]
    total = f"{built(name).params_total:,}"
    assert any(line.endswith(total) for line in entry["derivation"])


@pytest.mark.parametrize("name", NAMES)
def test_rounded_figures_of_the_authors_agree(name: str) -> None:
    published, a = catalogue()[name]["published"], built(name)
    total = a.params_total
    if "exact_with_vision" in published:
        total += a.params_vision + a.params_projector
    assert a.exact
    assert total / 1e9 == pytest.approx(published["total_b"], rel=0.025)
    if active := published["active_b"]:
        low, high = sorted((a.params_active_no_embedding, a.params_active))
        assert low / 1e9 * 0.95 <= active <= high / 1e9 * 1.05


def test_llama_4_with_its_vision_tower_has_the_total_of_the_hub() -> None:
    a = built("llama-4-scout")
    whole = a.params_total + a.params_vision + a.params_projector
    assert whole == catalogue()["llama-4-scout"]["published"]["exact_with_vision"]
    assert whole == 108_641_793_536


def test_a_derivation_ends_in_the_total() -> None:
    derived = {name: e["derivation"] for name, e in catalogue().items() if "derivation" in e}
    assert derived.keys() >= UNVERIFIED
    for name, lines in derived.items():
        assert lines[-1].endswith(f"{built(name).params_total:,}"), name


@pytest.mark.parametrize("name", [n for n in NAMES if catalogue()[n]["papers"]])
def test_what_the_papers_print_differs_from_what_the_entry_holds(name: str) -> None:
    entry, a = catalogue()[name], built(name)
    counted = {"params_total": a.params_total, "expert_params": a.expert_params}
    for error in entry["papers"]:
        assert error.keys() == {"paper", "key", "printed", "true"}
        held = counted.get(error["key"], language(entry["config"]).get(error["key"]))
        assert held == error["true"] != error["printed"]


def test_the_tables_of_the_papers_have_these_errors() -> None:
    found = {
        (name, error["key"]): error["printed"]
        for name, entry in catalogue().items()
        for error in entry["papers"]
    }
    assert len(found) == 21
    assert found["qwen3-30b-a3b", "hidden_size"] == 5120
    assert found["deepseek-vl2", "n_routed_experts"] == 8
    assert found["switch-c", "num_experts"] == 128


def test_the_correction_bias_counts_where_the_router_has_one() -> None:
    config = dict(catalogue()["deepseek-vl2"]["config"])
    plain = config | {"language_config": config["language_config"] | {"topk_method": "greedy"}}
    assert built("deepseek-vl2").params_total - read(plain).params_total == 29 * 72


def test_a_model_without_latent_attention_is_read_as_such() -> None:
    tiny, small = built("deepseek-vl2-tiny"), built("deepseek-vl2-small")
    assert tiny.layers[0].attention.latent == 0
    assert tiny.kv_values_per_token * 2 == 61_440
    assert small.layers[0].attention.latent == 512
    assert small.kv_values_per_token * 2 == 31_104


def test_files_are_json_and_readme_lists_every_entry() -> None:
    folder = resources.files("workers.moe") / "catalog"
    readme = (folder / "README.md").read_text()
    for name in NAMES:
        assert json.loads((folder / f"{name}.json").read_text())["hub_id"]
        assert f"| {name} | {built(name).params_total:,} |" in readme
