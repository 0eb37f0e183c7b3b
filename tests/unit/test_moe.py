"""Structure and counts, against published totals and the checkpoint's own configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.contract.errors import Infeasible
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.moe.architecture import bend, catalogue, catalogue_name, check, resolve, run_dtype
from workers.moe.families import read
from workers.moe.fields import UnknownModel

GOLDEN = """
mixtral-8x7b        46702792704   12.880  12.749  176.161   41.943   0.000  131072
mixtral-8x22b       140630071296  39.161  38.960  301.990   88.080   0.000  229376
qwen1.5-moe-a2.7b   14315784192    2.689   2.378    8.651   16.783  34.605  196608
qwen3-30b-a3b       30532122624    3.353   3.042    4.719   18.875   0.000   98304
deepseek-v2-lite    15706484224    2.661   2.451    8.651   13.763  17.302   31104
deepseek-r1         671026419200  37.552  36.626   44.040  187.107  44.040   70272
olmoe-1b-7b         6919161856     1.282   1.179    6.291   16.781   0.000  131072
deepseek-vl2-tiny   2934734080     0.740   0.574    3.441    6.554   6.881   61440
deepseek-vl2-small  15816584704    2.771   2.506    8.651   13.763  17.302   31104
deepseek-vl2        27033548328    4.455   4.124   11.796   31.884  23.593   34560
"""
"""Parameters; active ones with and without the input embedding in 10^9; one expert, the
attention and the shared experts of a layer (with their gate) in 10^6; bytes that a token
leaves in a 16-bit cache."""


@pytest.mark.parametrize("line", GOLDEN.split("\n")[1:-1], ids=lambda line: line.split()[0])
def test_counts_are_those_of_the_published_models(line: str) -> None:
    name, total, *rounded, kv = line.split()
    a = resolve(Model(name=name))
    assert a is not None and a.moe is not None and a.exact
    shared = sum(weight.params for weight in a.moe.shared_weights)
    billions = (a.params_active, a.params_active_no_embedding)
    millions = (a.expert_params, a.attention_params, shared)
    assert a.params_total == int(total)
    assert [f"{n / 1e9:.3f}" for n in billions] + [f"{n / 1e6:.3f}" for n in millions] == rounded
    assert a.kv_values_per_token * 2 == int(kv)


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_catalogue_entry_is_read_exactly(name: str) -> None:
    entry = catalogue()[name]
    a = read(entry["config"])
    assert a.exact
    published = entry["published"]
    if exact := published.get("exact"):
        assert a.params_total == exact
    if exact := published.get("exact_with_vision"):
        assert a.params_total + a.params_vision + a.params_projector == exact
    for line in entry.get("derivation", [])[-1:]:
        assert f"{a.params_total:,}" in line


def test_parts_stand_in_the_order_of_the_layers() -> None:
    a = read(catalogue()["deepseek-r1"]["config"])
    assert [layer.experts is None for layer in a.layers] == [True] * 3 + [False] * 58
    assert len({id(layer) for layer in a.layers}) == 2
    assert a.layers[5].attention.cached_values == 512 + 64


def test_arctic_has_a_dense_ffn_beside_its_experts() -> None:
    layer = read(catalogue()["arctic"]["config"]).layers[0]
    assert layer.experts is not None
    assert sum(weight.params for weight in layer.dense) == 3 * 7168**2


def test_switch_keeps_its_encoder_apart() -> None:
    a = read(catalogue()["switch-c"]["config"])
    assert (a.num_layers, a.num_experts, a.top_k, a.tied) == (15, 2048, 1, True)
    assert a.params_encoder == 785_493_262_304


def test_windows_are_where_the_family_has_them() -> None:
    oss = read(
        {
            "model_type": "gpt_oss",
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "vocab_size": 201088,
        }
    )
    assert [layer.attention.window for layer in oss.layers] == [128, None, 128, None]
    scout = read(catalogue()["llama-4-scout"]["config"])
    assert [layer.attention.window for layer in scout.layers[:5]] == [8192] * 3 + [None, 8192]
    assert scout.layers[0].attention.chunked and not oss.layers[0].attention.chunked
    qwen = read(catalogue()["qwen3-30b-a3b"]["config"] | {"sliding_window": 4096})
    assert {layer.attention.window for layer in qwen.layers} == {None}


def test_cuts_follow_the_engine() -> None:
    layer = read(catalogue()["deepseek-r1"]["config"]).layers[-1]
    cuts = {weight.name: weight.cut for weight in (*layer.always(), *layer.expert())}
    attention = "q_a_proj none q_b_proj out kv_a_proj_with_mqa none kv_b_proj out o_proj in".split()
    for name, cut in zip(attention[::2], attention[1::2], strict=True):
        assert cuts[f"self_attn.{name}"] == cut
    assert cuts["mlp.gate"] == cuts["self_attn.kv_a_layernorm"] == "none"
    assert cuts["mlp.shared_experts.up_proj"] == cuts["mlp.experts.*.gate_proj"] == "out"
    assert cuts["mlp.shared_experts.down_proj"] == cuts["mlp.experts.*.down_proj"] == "in"
    a = read(catalogue()["qwen3-30b-a3b"]["config"])
    assert [weight.cut for weight in a.layers[0].attention.weights] == [
        *("out", "kv", "kv", "in"),
        *("none", "none"),  # norms of one head, the same for all
    ]
    assert a.head.cut == a.embedding[0].cut == "vocab"


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_names_are_module_paths(name: str) -> None:
    for layer in set(read(catalogue()[name]["config"]).layers):
        for weight in (*layer.always(), *layer.expert()):
            assert re.fullmatch(r"[\w*]+(\.[\w*]+)*", weight.name)


GENERIC = {
    "model_type": "something_new",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def test_an_unknown_family_is_an_estimate() -> None:
    dense = read(GENERIC)
    assert not dense.exact
    assert dense.params_total == 2 * 6400 + 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    moe = read(
        GENERIC
        | {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }
    )
    assert [layer.experts is None for layer in moe.layers] == [True, False, False]
    assert (moe.num_experts, moe.top_k, moe.ffn_dim, moe.shared_experts) == (8, 2, 32, 1)
    assert moe.layers[0].attention.cached_values == 20


def test_a_known_language_model_in_an_unknown_wrapper_is_an_estimate() -> None:
    text = catalogue()["qwen3-30b-a3b"]["config"]
    a = read({"model_type": "some_vl", "text_config": text})
    assert not a.exact and a.params_total == 30_532_122_624


@pytest.mark.parametrize("key", sorted(set(GENERIC) - {"model_type"}))
def test_what_an_estimate_cannot_do_without_is_named(key: str) -> None:
    with pytest.raises(UnknownModel, match=f"{key}.* is missing"):
        read({k: v for k, v in GENERIC.items() if k != key})


HOSTILE = [None, "many", "8", -1, 0, 1.5, True, [], [1], [[1]], {}, {"a": "b"}]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_hostile_configurations_raise_nothing_else(data: st.DataObject) -> None:
    config = json.loads(json.dumps(catalogue()[data.draw(st.sampled_from(sorted(catalogue())))]))
    place = config["config"]
    nested = sorted(key for key, value in place.items() if isinstance(value, dict))
    if nested and data.draw(st.booleans()):
        place = place[data.draw(st.sampled_from(nested))]
    key = data.draw(st.sampled_from([*sorted(place), "layer_types", "mlp_only_layers", "head_dim"]))
    place[key] = data.draw(st.sampled_from(HOSTILE))
    try:
        a = read(bend(config["config"], Model(name="x", weights="dummy")))
    except UnknownModel as error:
        assert str(error)  # noqa: PT017 - both ways out are fine
    else:
        assert a.params_total >= 0


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok is 'two', not a whole number"),
        ({"hidden_size": None}, "hidden_size or .* is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_a_broken_configuration_names_file_and_key(
    tmp_path: Path, broken: dict[str, object], reason: str
) -> None:
    config = catalogue()["mixtral-8x7b"]["config"] | broken
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownModel, match=f"{tmp_path.name}.*{reason}"):
        resolve(Model(name=str(tmp_path)))


@pytest.mark.parametrize("name", sorted(n for n in catalogue() if not n.startswith("qwen3-")))
def test_every_override_reaches_the_structure(name: str) -> None:
    config = catalogue()[name]["config"]
    top_k = None if name == "switch-c" else 3
    model = Model(
        name=name, weights="dummy", ffn_dim=640, num_experts=12, top_k=top_k, num_layers=5
    )
    a = read(bend(config, model))
    assert (a.ffn_dim, a.num_experts, a.top_k, a.num_layers) == (640, 12, top_k or 1, 5)
    assert config == catalogue()[name]["config"]


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_without_overrides_a_configuration_stays_as_it_is(name: str) -> None:
    config = catalogue()[name]["config"]
    assert bend(config, Model(name=name)) == config


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_scale_keeps_head_dimension_and_ranks(name: str) -> None:
    config = catalogue()[name]["config"]
    a, b = read(config), read(bend(config, Model(name=name, weights="dummy", scale=0.25)))
    before, after = a.layers[0].attention, b.layers[0].attention
    assert (after.qk_dim, after.v_dim) == (before.qk_dim, before.v_dim)
    assert (after.latent, after.rope) == (before.latent, before.rope)
    assert after.heads * 4 == pytest.approx(before.heads, rel=0.2)
    assert b.hidden_size * 4 == pytest.approx(a.hidden_size, rel=0.2)
    assert b.ffn_dim * 4 == pytest.approx(a.ffn_dim, rel=0.1)
    assert (b.num_experts, b.top_k, b.num_layers) == (a.num_experts, a.top_k, a.num_layers)
    if a.moe and b.moe and a.moe.shared_weights:
        whole, quarter = (m.shared_weights[0].shape[0] for m in (a.moe, b.moe))
        assert quarter * 4 == pytest.approx(whole, rel=0.1)
    check(b, Layout())


def test_groups_of_experts_still_divide_them() -> None:
    config = catalogue()["deepseek-r1"]["config"]
    bent = bend(config, Model(name="r1", weights="dummy", num_experts=12, top_k=5))
    assert (bent["n_group"], bent["topk_group"]) == (6, 4)
    few = bend(config, Model(name="r1", weights="dummy", num_experts=2, top_k=2))
    assert (few["n_group"], few["topk_group"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [
        ("switch-c", {"top_k": 4}, "switch-c has a top_k of 1 by design: 4 has no place"),
        ("deepseek-r1", {"num_layers": 3}, "first 3 layers of deepseek-r1 are dense"),
        ("qwen3-8b", {"num_experts": 4}, "qwen3-8b has none of num_local_experts"),
    ],
)
def test_overrides_without_a_place_are_refused(
    name: str, model: dict[str, int], reason: str
) -> None:
    with pytest.raises(Infeasible, match=reason):
        resolve(Model(name=name, weights="dummy", **model))  # type: ignore[arg-type]


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
        ({}, {"tensor": 3}, r"^tensor 3 does not divide 32 attention heads \(32 / 3 = 10\.67\)$"),
        (
            {},
            {"tensor": 16, "pipeline": 33},
            "pipeline 33 has more stages than the 32 layers fill .32 / 33 = 0.97.",
        ),
        (
            {"ffn_dim": 1001},
            {"tensor": 2},
            "tensor 2 does not divide an FFN width of 1001 .1001 / 2 = 500.50.",
        ),
        (
            {"ffn_dim": 1002},
            {"tensor": 2, "data": 2},
            "tensor 2 x data 2 = 4 does not divide an FFN width of 1002",
        ),
        (
            {},
            {"tensor": 8, "data": 2, "expert": True},
            "8 experts are too few for 16 .*8 / 16 = 0.50",
        ),
        ({"num_layers": 4}, {"pipeline": 8}, "pipeline 8 has more stages than the 4 layers fill"),
    ],
)
def test_what_cannot_run_is_refused_with_its_arithmetic(
    model: dict[str, int], layout: dict[str, int], reason: str
) -> None:
    a = resolve(Model(name="mixtral-8x7b", weights="dummy", **model))  # type: ignore[arg-type]
    assert a is not None
    with pytest.raises(Infeasible, match=reason):
        check(a, Layout(**layout))  # type: ignore[arg-type]


def test_kv_heads_are_repeated_or_divided() -> None:
    a = read(catalogue()["qwen3-235b-a22b"]["config"])  # 64 heads, 4 KV heads
    for tensor in (2, 4, 8, 16):
        check(a, Layout(tensor=tensor))
    odd = read(catalogue()["qwen3-235b-a22b"]["config"] | {"num_key_value_heads": 6})
    with pytest.raises(Infeasible, match=r"tensor 4 does not divide 6 KV heads .6 / 4 = 1.50."):
        check(odd, Layout(tensor=4))
    with pytest.raises(Infeasible, match=r"tensor 8 is no multiple of 6 KV heads .8 / 6 = 1.33."):
        check(odd, Layout(tensor=8))


def test_widths_beside_the_experts_are_checked_too() -> None:
    shared = read(catalogue()["deepseek-v2-lite"]["config"] | {"intermediate_size": 10945})
    with pytest.raises(Infeasible, match=r"does not divide an FFN width of 10945"):
        check(shared, Layout(tensor=2, expert=True))
    qwen = catalogue()["qwen1.5-moe-a2.7b"]["config"] | {"shared_expert_intermediate_size": 5633}
    with pytest.raises(Infeasible, match=r"shared experts. FFN width of 5633"):
        check(read(qwen), Layout(tensor=2, expert=True))


def test_experts_need_not_divide_over_expert_parallel_devices() -> None:
    check(read(catalogue()["qwen1.5-moe-a2.7b"]["config"]), Layout(data=8, expert=True))


def test_a_hub_id_of_the_catalogue_needs_no_hub() -> None:
    by_name = resolve(Model(name="qwen3-30b-a3b"))
    assert by_name is not None
    assert catalogue_name("Qwen/Qwen3-30B-A3B") == "qwen3-30b-a3b"
    assert resolve(Model(name="Qwen/Qwen3-30B-A3B")) == by_name
    for entry in catalogue().values():
        for alias in entry.get("aliases", ()):
            assert catalogue_name(alias) == catalogue_name(entry["hub_id"])
    assert catalogue_name("someone/some-model") is None


def test_the_dtype_that_runs() -> None:
    for name, own in (("mixtral-8x7b", "bfloat16"), ("molmoe-1b", "bfloat16")):
        a = resolve(Model(name=name))
        assert a is not None
        assert run_dtype(a, Model(name=name, dtype="auto")) == own
        assert run_dtype(a, Model(name=name, dtype="float32")) == "float32"


def test_a_scaled_skeleton_is_not_quantised() -> None:
    whole = resolve(Model(name="deepseek-r1", weights="dummy"))
    small = resolve(Model(name="deepseek-r1", weights="dummy", scale=0.125, num_layers=5))
    assert whole is not None and small is not None
    assert whole.config["quantization_config"]["quant_method"] == "fp8"
    assert "quantization_config" not in small.config
