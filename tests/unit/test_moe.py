"""Structure and counts, against published totals and the checkpoint's own configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.contract.errors import Infeasible
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.moe.architecture import UnknownModel, check, resolve

TOTALS = {"mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_630_071_296}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals_are_those_of_the_published_models(name: str, total: int) -> None:
    architecture = resolve(Model(name=name))
    assert architecture is not None
    assert architecture.params_total == total


def test_mixtral_parts() -> None:
    a = resolve(Model(name="mixtral-8x7b"))
    assert a is not None
    assert a.params_active == 12_879_925_248
    assert a.expert_params == 176_160_768
    assert a.attention_params == 41_943_040
    assert a.kv_values_per_token * 2 == 131_072


def test_overrides_bend_the_structure() -> None:
    a = resolve(Model(name="mixtral-8x7b", weights="dummy", ffn_dim=1792, num_experts=64, top_k=4))
    assert a is not None
    assert (a.ffn_dim, a.num_experts, a.top_k, a.hidden_size) == (1792, 64, 4, 4096)


def test_scale_shrinks_widths_and_keeps_ratios() -> None:
    a = resolve(Model(name="mixtral-8x7b", weights="dummy", scale=0.125, ffn_dim=1792))
    assert a is not None
    assert (a.hidden_size, a.ffn_dim, a.num_heads, a.num_kv_heads) == (512, 224, 4, 1)
    assert (a.layers[0].attention.qk_dim, a.vocab_size, a.num_layers) == (128, 4000, 32)


def test_a_folder_is_read_and_a_hub_id_is_left_to_the_engine(tmp_path: Path) -> None:
    config = resolve(Model(name="mixtral-8x7b")).config  # type: ignore[union-attr]
    (tmp_path / "config.json").write_text(json.dumps(dict(config) | {"num_hidden_layers": 2}))
    a = resolve(Model(name=str(tmp_path)))
    assert a is not None and a.num_layers == 2
    assert resolve(Model(name="someone/some-model")) is None


@pytest.mark.parametrize("name", ["mixtral-8x8b", "/nowhere", "./nowhere", "a/b/c"])
def test_unknown_models_are_refused(name: str) -> None:
    with pytest.raises(UnknownModel, match="unknown model"):
        resolve(Model(name=name))


def test_a_torn_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(UnknownModel, match=r"config\.json cannot be read"):
        resolve(Model(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("model", "layout", "reason"),
    [
        ({"top_k": 16}, {}, "top_k 16 is above the 8 experts"),
        ({}, {"tensor": 3}, "32 .attention heads. is not divisible by the tensor degree 3"),
        ({}, {"tensor": 16, "pipeline": 33}, "32 layers cannot fill 33 pipeline stages"),
        ({"ffn_dim": 1001}, {"tensor": 2}, "1001 .FFN width. is not divisible"),
    ],
)
def test_what_cannot_run_is_refused_with_its_arithmetic(
    model: dict[str, int], layout: dict[str, int], reason: str
) -> None:
    a = resolve(Model(name="mixtral-8x7b", weights="dummy", **model))  # type: ignore[arg-type]
    assert a is not None
    with pytest.raises(Infeasible, match=reason):
        check(a, Layout(**layout))  # type: ignore[arg-type]
