"""Pruned checkpoints against the unpruned model with the same experts masked, or the same
channels zeroed: in transformers, in vLLM, and one against the other.

Checkpoints are tiny, with random weights of ordinary size.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.contract import tiny
from workers.contract.engine import EngineSettings
from workers.contract.errors import Unsupported
from workers.contract.model import Model, Prune, PruneKind
from workers.contract.record import ACTIVATIONS, rows
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.moe.architecture import configuration, resolve
from workers.moe.pruning import cache, calibration, checkpoint, shards
from workers.moe.pruning.__main__ import main
from workers.moe.pruning.checkpoint import PROVENANCE, Cut, open_checkpoint, prune
from workers.moe.pruning.errors import PruneError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

TINY: dict[str, Any] = tiny.SHAPE | {
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # with the rotary part 576, which alone the kernel for CPUs takes
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 64, "sliding_window": None},
    "olmoe": tiny.FAMILIES["olmoe"] | {"intermediate_size": 64},
    "qwen2_moe": tiny.FAMILIES["qwen2_moe"] | {"mlp_only_layers": [1]},
    "qwen3_moe": tiny.FAMILIES["qwen3_moe"],
    "deepseek_v2": LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT
    | {
        "q_lora_rank": 32,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",  # by these two vLLM knows the correction bias
        "scoring_func": "sigmoid",
    },
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
KINDS: tuple[PruneKind, ...] = ("inter", "intra")
IDS = torch.tensor([[17 * i + j for j in range(24)] for i in range(1, 4)])


def _moe(folder: Path, family: str, **changes: Any) -> Path:
    config = AutoConfig.for_model(family, **TINY | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "layernorm.weight", "norm.weight", ".gate.weight")):
            tensor.data.add_(torch.randn_like(tensor) / 4)  # they begin as 0 and 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("unpruned")
    return {family: _moe(root / family, family) for family in FAMILIES}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _told(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / PROVENANCE).read_text())
    return told


def _load(folder: Path) -> Any:
    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values()), said
    return model


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _channels(told: Mapping[str, Any], width: int) -> dict[int, list[np.ndarray]]:
    """Of each layer and expert, a flag per channel that stays."""
    return {
        int(layer): [
            np.unpackbits(np.frombuffer(bytes.fromhex(one), np.uint8), count=width).astype(bool)
            for one in row
        ]
        for layer, row in told["kept_channels"].items()
    }


def _masked(folder: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits of the unpruned model with what `pruned` lacks masked or zeroed."""
    model, told = _load(folder), _told(pruned)
    if told["arguments"]["kind"] == "intra":
        width = open_checkpoint(folder).structure.ffn_dim
        for layer, flags in _channels(told, width).items():
            experts = model.model.layers[layer].mlp.experts
            for expert, kept in enumerate(flags):
                both = torch.from_numpy(np.tile(kept, 2)[:, None])
                experts.gate_up_proj.data[expert] *= both
                experts.down_proj.data[expert] *= torch.from_numpy(kept)
        return _logits(model)
    gone: dict[int, torch.Tensor] = {}
    for layer, kept in told["kept_experts"].items():
        gate = model.model.layers[int(layer)].mlp.gate
        mask = torch.ones(gate.weight.shape[0], dtype=torch.bool)
        mask[kept] = False
        gone[gate.weight.data_ptr()] = mask
        if (bias := getattr(gate, "e_score_correction_bias", None)) is not None:
            bias.data[mask] = -math.inf
    linear = torch.nn.functional.linear

    def masked(states: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        answer = linear(states, weight, *rest)
        mask = gone.get(weight.data_ptr())
        return answer if mask is None else answer.masked_fill(mask, -math.inf)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masked)
        return _logits(model)


def _near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _cut(kind: PruneKind, ratio: float = 0.5, criterion: Any = "norm", **settings: Any) -> Cut:
    return Cut(prune=Prune(kind=kind, ratio=ratio, criterion=criterion), **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_masked_model_does(
    family: str,
    kind: PruneKind,
    folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, whole = folders[family], _logits(_load(folders[family]))
    for ratio, criterion in ((0.5, "norm"), (0.25, "random"), (0.125, "norm")):
        if (family, kind, ratio) == ("deepseek_v3", "inter", 0.125):
            continue  # 7 experts are not 2 groups
        target = tmp_path / f"{criterion}-{ratio}"
        made = prune(source, target, _cut(kind, ratio, criterion))
        model = _load(target)
        found = _logits(model)
        _near(found, _masked(source, target, monkeypatch))
        assert (found - whole).abs().max() > 0.01 * whole.abs().max(), "something is gone"
        left = round(8 * (1 - ratio)), round(64 * (1 - ratio))
        assert (made.num_experts, made.ffn_dim) == (
            (left[0], 64) if kind == "inter" else (8, left[1])
        )
        resolved = resolve(Model(name=str(target)))
        asked = resolve(Model(name=str(source), prune=Prune(kind=kind, ratio=ratio)))
        assert resolved is not None and asked is not None and resolved.exact
        counted = sum(one.numel() for one in model.parameters())
        counted += sum(one.numel() for n, one in model.named_buffers() if "correction" in n)
        written = sum(one.numel() for one in _weights(target).values())
        assert written == counted == resolved.params_total == asked.params_total
        assert made.params_total == _told(target)["params_total"] == written


def test_a_grouped_router_keeps_as_many_of_each_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _moe(tmp_path / "moe", "deepseek_v2", **GROUPED, n_routed_experts=16)
    prune(source, tmp_path / "half", _cut("inter", 0.5))
    _near(_logits(_load(tmp_path / "half")), _masked(source, tmp_path / "half", monkeypatch))
    for kept in _told(tmp_path / "half")["kept_experts"].values():
        assert [sum(i // 4 == group for i in kept) for group in range(4)] == [2] * 4
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (4, 2)


def test_shared_experts_keep_what_they_compute(folders: Mapping[str, Path], tmp_path: Path) -> None:
    for ratio, shared, width in ((0.5, 4, 128), (0.25, 3, 144)):
        made = prune(folders["deepseek_v2"], tmp_path / str(ratio), _cut("intra", ratio))
        assert made.shared_experts == shared
        name = "model.layers.1.mlp.shared_experts.{}.weight"
        before, after = _weights(folders["deepseek_v2"]), _weights(tmp_path / str(ratio))
        for matrix in ("gate_proj", "up_proj"):
            found = after[name.format(matrix)]
            assert torch.equal(found[:128], before[name.format(matrix)])
            assert found.shape[0] == width and not found[128:].any()
        found = after[name.format("down_proj")]
        assert torch.equal(found[:, :128], before[name.format("down_proj")])
        assert found.shape[1] == width and not found[:, 128:].any()


def test_shared_experts_may_have_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _moe(tmp_path / "moe", "deepseek_v2", mlp_bias=True)
    assert any(name.endswith("shared_experts.up_proj.bias") for name in _weights(source))
    prune(source, tmp_path / "pruned", _cut("intra", 0.25))
    _near(_logits(_load(tmp_path / "pruned")), _masked(source, tmp_path / "pruned", monkeypatch))


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_tensors_are_read_as_well(
    family: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    stacked = tmp_path / "stacked"
    _load(folders[family]).save_pretrained(stacked, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in _weights(stacked))
    for kind in KINDS:
        prune(folders[family], tmp_path / f"{kind}-a", _cut(kind))
        prune(stacked, tmp_path / f"{kind}-b", _cut(kind))
        a, b = _weights(tmp_path / f"{kind}-a"), _weights(tmp_path / f"{kind}-b")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def _by_hand(folder: Path, layer: int) -> tuple[list[float], np.ndarray]:
    """Norms of the experts of a Mixtral layer, and of their channels, the slow way."""
    weights = _weights(folder)
    experts, channels = [], []
    for i in range(8):
        path = f"model.layers.{layer}.block_sparse_moe.experts.{i}"
        w1, w2, w3 = (weights[f"{path}.w{n}.weight"].double().numpy() for n in (1, 2, 3))
        experts.append(math.sqrt((w1**2).sum() + (w2**2).sum() + (w3**2).sum()))
        channels.append((w1**2).sum(1) + (w3**2).sum(1) + (w2**2).sum(0))
    return experts, np.array(channels)


def test_the_smallest_norms_go(folders: Mapping[str, Path], tmp_path: Path) -> None:
    source = folders["mixtral"]
    prune(source, tmp_path / "inter", _cut("inter", 0.25))
    prune(source, tmp_path / "intra", _cut("intra", 0.25))
    experts, channels = _told(tmp_path / "inter"), _told(tmp_path / "intra")
    for layer in range(3):
        norms, of_channels = _by_hand(source, layer)
        expected = sorted(np.argsort(norms)[2:].tolist())
        assert experts["kept_experts"][str(layer)] == expected
        for expert, flags in enumerate(_channels(channels, 64)[layer]):
            assert set(np.flatnonzero(flags)) == set(np.argsort(of_channels[expert])[16:])


def test_random_is_the_seed_and_nothing_else(folders: Mapping[str, Path], tmp_path: Path) -> None:
    chosen = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        np.random.default_rng().random(5)
        prune(folders["olmoe"], tmp_path / name, _cut("inter", 0.5, "random", seed=seed))
        chosen.append(_told(tmp_path / name)["kept_experts"])
    assert chosen[0] == chosen[1] != chosen[2]
    assert len({tuple(kept) for kept in chosen[0].values()}) > 1, "each layer draws its own"


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("criterion", ["norm", "random", "reconstruction"])
def test_the_same_arguments_give_the_same_bytes(
    criterion: str, readable: Path, tmp_path: Path
) -> None:
    for kind in KINDS:
        cut = _cut(kind, 0.5, criterion, seed=2, samples=4, tokens=16)
        prune(readable, tmp_path / f"{kind}-a", cut)
        torch.rand(5)  # the global generator is nobody's business
        prune(readable, tmp_path / f"{kind}-b", cut)
        assert _bytes(tmp_path / f"{kind}-a") == _bytes(tmp_path / f"{kind}-b")


def _tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {chr(97 + i) + chr(97 + j): 26 * i + j for i in range(9) for j in range(26)}
    inner = Tokenizer(models.WordLevel(words | {"<unk>": 255}, unk_token="<unk>"))
    # pairs of letters: the built-in text becomes many different ids
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]{2}|."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = _moe(tmp_path_factory.mktemp("readable") / "moe", "mixtral")
    _tokenizer(folder)
    return folder


def _block_states(folder: Path, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What reaches the experts of each layer of the whole model."""
    model, states = _load(folder), {}
    for number, layer in enumerate(model.model.layers):

        def look(_: Any, given: Any, number: int = number) -> None:
            states[number] = given[0].reshape(-1, given[0].shape[-1])

        layer.mlp.register_forward_pre_hook(look)
    with torch.no_grad():
        model(ids)
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_the_states_of_the_whole_model(
    family: str, folders: Mapping[str, Path]
) -> None:
    seen: dict[int, torch.Tensor] = {}
    given = open_checkpoint(folders[family])
    calibration.run(given, IDS.tolist(), lambda n, _, __, states: seen.update({n: states}))
    expected = _block_states(folders[family], IDS)
    assert seen.keys() == given.places.layers.keys()
    for number, states in seen.items():
        assert torch.allclose(states, expected[number], atol=1e-5)


def test_reconstruction_keeps_the_set_with_the_least_error(readable: Path, tmp_path: Path) -> None:
    """Every set of 6 of 8 experts is tried again, by a model that was pruned to it."""
    cut = _cut("inter", 0.25, "reconstruction", samples=4, tokens=16)
    prune(readable, tmp_path / "best", cut)
    ids = torch.tensor(calibration.tokens(readable, cut))
    states, whole = _block_states(readable, ids)[0], _load(readable)
    chosen = tuple(_told(tmp_path / "best")["kept_experts"]["0"])
    block = whole.model.layers[0].mlp
    with torch.no_grad():
        expected = block(states[None])
    errors = {}
    for kept in combinations(range(8), 6):
        experts = torch.tensor(kept)
        logits = torch.nn.functional.linear(states, block.gate.weight[experts]).softmax(-1)
        weights, indices = logits.topk(2, dim=-1)
        with torch.no_grad():
            answer = block.experts(states, experts[indices], weights / weights.sum(-1, True))
        errors[kept] = float((answer - expected[0]).square().sum())
    assert errors[chosen] <= min(errors.values()) * (1 + 1e-5)


def _block_outputs(folder: Path, layer: int) -> torch.Tensor:
    """What the experts of one layer add, shared ones included."""
    model, found = _load(folder), []
    model.model.layers[layer].mlp.register_forward_hook(lambda _, __, answer: found.append(answer))
    _logits(model)
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_reconstruction_loses_less_than_the_others_in_every_family(
    family: str,
    kind: PruneKind,
    folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "tokens", lambda *_: IDS.tolist())
    first = min(open_checkpoint(folders[family]).places.layers)  # the same states reach it in all
    whole, lost = _block_outputs(folders[family], first), {}
    for criterion in ("reconstruction", "norm", "random"):
        prune(folders[family], tmp_path / criterion, _cut(kind, 0.5, criterion))
        error = _block_outputs(tmp_path / criterion, first) - whole
        lost[criterion] = float(error.square().sum())
    assert lost["reconstruction"] < min(lost["norm"], lost["random"])


def test_of_many_experts_the_worst_goes_first(
    readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = _cut("inter", 0.125, "reconstruction", samples=4, tokens=16)
    prune(readable, tmp_path / "tried", cut)
    monkeypatch.setattr(calibration, "MOST_SETS", 1)
    prune(readable, tmp_path / "greedy", cut)
    a, b = _told(tmp_path / "tried"), _told(tmp_path / "greedy")
    assert a["kept_experts"] == b["kept_experts"], "of one expert there is nothing to be greedy"


def test_frequency_counts_on_text_as_a_sheet_does(readable: Path, tmp_path: Path) -> None:
    cut = _cut("inter", 0.5, "frequency", samples=4, tokens=32)
    prune(readable, tmp_path / "text", cut)
    ids = torch.tensor(calibration.tokens(readable, cut))
    model, found = _load(readable), []
    for layer, states in _block_states(readable, ids).items():
        chosen = model.model.layers[layer].mlp.gate(states)[2]
        for expert in range(8):
            tokens = int((chosen == expert).sum())
            row = {"run_id": "r", "trial_id": "abc", "layer": layer, "expert": expert}
            found.append(row | {"phase": "prefill", "tokens": tokens - tokens // 3})
            found.append(row | {"phase": "decode", "tokens": tokens // 3})
    sheet = tmp_path / "data" / "activations" / "a.arrow"
    sheet.parent.mkdir(parents=True)

    def write(rows_: list[dict[str, Any]]) -> None:
        with pa.ipc.new_file(str(sheet), ACTIVATIONS) as writer:
            writer.write_batch(rows(ACTIVATIONS, rows_))

    write(found)
    for name, where in (("file", sheet), ("dataset", tmp_path / "data")):
        prune(readable, tmp_path / name, _cut("inter", 0.5, "frequency", sheet=where))
        assert _told(tmp_path / name)["kept_experts"] == _told(tmp_path / "text")["kept_experts"]
    other = [row | {"trial_id": "xyz"} for row in found]
    write(found + other)

    def refused(**settings: Any) -> str:
        with pytest.raises(PruneError) as caught:
            prune(readable, tmp_path / "no", _cut("inter", 0.5, "frequency", **settings))
        assert not (tmp_path / "no").exists()
        return str(caught.value)

    assert "has 2 trials, not one: abc, xyz; choose with --trial" in refused(sheet=sheet)
    assert "has 0 trials q" in refused(sheet=sheet, trial="q")
    prune(readable, tmp_path / "chosen", _cut("inter", 0.5, "frequency", sheet=sheet, trial="ab"))
    write([row | {"expert": row["expert"] + 1} for row in found])
    assert "counts expert 8 of layer 0, which is not in this model" in refused(sheet=sheet)
    write([row for row in found if row["layer"] < 2])
    assert "has no counts of layer 2" in refused(sheet=sheet)
    sheet.write_bytes(b"no arrow")
    assert "cannot be read as counts" in refused(sheet=sheet)
    assert "has no activations" in refused(sheet=tmp_path)


def _lines(*args: str) -> str:
    """What the command says when it refuses."""
    answer = CliRunner().invoke(main, list(args))
    assert answer.exit_code == 2, answer.output
    return " ".join(answer.stderr.split())


def _edited(source: Path, dest: Path, **changes: Any) -> Path:
    """A copy of `source` with other values in its configuration."""
    dest.mkdir(parents=True)
    for file in source.iterdir():
        (dest / file.name).write_bytes(file.read_bytes())
    config = json.loads((dest / "config.json").read_text())
    (dest / "config.json").write_text(json.dumps(config | changes))
    return dest


def test_what_cannot_be_pruned_is_refused_with_the_reason(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    dest, mixtral = str(tmp_path / "out" / "moe"), folders["mixtral"]

    def refused(source: Path, *args: str, kind: str = "inter", ratio: str = "0.5") -> str:
        said = _lines(str(source), dest, "--kind", kind, "--ratio", ratio, *args)
        assert list((tmp_path / "out").iterdir()) == [], "nothing is left behind"
        return said

    def bad(name: str, **changes: Any) -> str:
        return refused(_edited(mixtral, tmp_path / "in" / name, **changes))

    for ratio in ("0", "1", "-0.5", "nan", "1.5"):
        assert f"ratio is {float(ratio)}" in refused(mixtral, ratio=ratio)
    assert "5.0% of 8 experts is 0.4: nothing to remove" in refused(mixtral, ratio="0.05")
    assert "top_k 2 is above the 1 experts that pruning 90.0% of 8 leaves" in refused(
        mixtral, ratio="0.9"
    )
    assert "criterion frequency ranks experts" in refused(
        mixtral, "--criterion", "frequency", kind="intra"
    )
    assert "criterion norm reads no sheet" in refused(mixtral, "--sheet", "x")
    assert "samples is 0" in refused(mixtral, "--samples", "0")
    assert "needs the tokenizer of" in refused(mixtral, "--criterion", "reconstruction")
    assert "7 experts, which pruning 12.5% of 8 leaves, are not divisible by the 2 groups" in (
        refused(folders["deepseek_v3"], ratio="0.125")
    )
    assert "the 2 groups of this router do not allow" in refused(
        folders["deepseek_v3"], "--criterion", "reconstruction"
    )
    assert "has no experts" in bad("dense", model_type="llama")
    assert "'phimoe' cannot be pruned; known are" in bad("family", model_type="phimoe")
    assert "is quantised" in bad("quantised", quantization_config={"quant_method": "awq"})
    assert "[64, 128] where the configuration says [80, 128]" in bad("wide", intermediate_size=80)
    assert "lacks the weight model.layers.3." in bad("deep", num_hidden_layers=4)
    assert "is [8, 128] where the configuration says [9, 128]" in bad("more", num_local_experts=9)
    assert "is no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "cannot be read" in refused(tmp_path / "empty")
    torn = _edited(mixtral, tmp_path / "in" / "torn")
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors cannot be read" in refused(torn)
    file.write_bytes(b"\xff" * 100)
    assert "model.safetensors cannot be read" in refused(torn)
    file.unlink()
    assert "no .safetensors file" in refused(torn)
    index = torn / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    assert "lacks b.safetensors, which its index names" in refused(torn)
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    assert "names '../b.safetensors', which is no file of its folder" in refused(torn)
    index.write_text("[]")
    assert "index.json cannot be read" in refused(torn)
    index.unlink()
    weights = _weights(mixtral)
    lost = "model.layers.2.block_sparse_moe.experts.7.w2.weight"
    save_file({name: t for name, t in weights.items() if name != lost}, torn / "a.safetensors")
    assert f"lacks the weight {lost}" in refused(torn)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    save_file(weights, torn / "a.safetensors")
    save_file({name: weights.pop(name)}, torn / "b.safetensors")
    assert f"b.safetensors and a.safetensors hold {name}" in refused(torn)
    save_file(weights, torn / "a.safetensors")
    (torn / "b.safetensors").unlink()
    assert f"lacks the weight {name}" in refused(torn)


def test_a_folder_that_exists_is_left_alone(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    asked = ("--kind", "inter", "--ratio", "0.5")
    said = _lines(str(folders["olmoe"]), str(tmp_path / "mine"), *asked)
    assert f"{tmp_path / 'mine'} exists already" in said
    assert list((tmp_path / "mine").iterdir()) == []


def test_what_fails_while_writing_leaves_nothing(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_provenance", full)  # after every weight was written
    asked = ("--kind", "intra", "--ratio", "0.5")
    said = _lines(str(folders["olmoe"]), str(tmp_path / "moe"), *asked)
    assert said == "error: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_made_and_what_goes_along(readable: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "moe"
    asked = ["--kind", "inter", "--ratio", "0.5"]
    answer = CliRunner().invoke(main, [str(readable), str(target), *asked])
    assert answer.exit_code == 0, answer.output
    made = resolve(Model(name=str(target)))
    assert made is not None
    assert answer.stdout == (
        f"{target}: mixtral, 3 layers, top-2 of 4 experts of width 64, {made.params_total:,} "
        f"parameters ({made.params_active:,} per token)\n"
    )
    names = {file.name for file in target.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    told = _told(target)
    assert told["arguments"] == {"kind": "inter", "ratio": 0.5, "criterion": "norm"}
    assert told["source"] == str(readable)
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in told["source_sha256"].values())
    assert told["params_before"] - told["params_total"] == 3 * 4 * (3 * 64 * 128 + 128)


def test_layers_of_another_prediction_are_left_out(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    source = _edited(folders["deepseek_v3"], tmp_path / "in", num_nextn_predict_layers=1)
    weights = _weights(source)
    extra = {name.replace(".2.", ".3.", 1): t for name, t in weights.items() if "layers.2." in name}
    save_file(weights | {n: t.clone() for n, t in extra.items()}, source / "model.safetensors")
    prune(source, tmp_path / "out", _cut("inter"))
    assert not any("layers.3." in name for name in _weights(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert sorted(_told(tmp_path / "out")["dropped"]) == sorted(extra)


SHARDS = """
import sys
from pathlib import Path
from workers.contract.model import Prune
from workers.moe.pruning.checkpoint import Cut, prune
import safetensors, numpy
def peak():
    # not ru_maxrss, which begins with that of the process that this one was forked from
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
before = peak()
prune(Path(sys.argv[1]), Path(sys.argv[2]), Cut(prune=Prune(kind=sys.argv[3], criterion="norm")))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of weights in files of at most 64 MB."""
    config = AutoConfig.for_model(
        "mixtral",
        **TINY | FAMILIES["mixtral"] | {
            "hidden_size": 1024, "intermediate_size": 2048, "dtype": "bfloat16",
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("split") / "moe"
    model.save_pretrained(folder, max_shard_size="64MB")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_below_twice_the_largest_file(kind: str, split: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in split.glob("*.safetensors")]
    assert len(sizes) > 4 and sum(sizes) > 4 * max(sizes)
    done = subprocess.run(
        [sys.executable, "-c", SHARDS, str(split), str(tmp_path / "out"), kind],
        capture_output=True, text=True, timeout=120, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert 2**20 < grown < 2 * max(sizes), (grown, max(sizes))
    written = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(written) > 1 and max(written) <= max(sizes) + 2**16
    assert _weights(tmp_path / "out").keys() == set(
        json.loads((tmp_path / "out" / shards.INDEX).read_text())["weight_map"]
    )


def _engine(model: Model, scratch: Path) -> VllmEngine:
    args: dict[str, Any] = {"max_logprobs": -1}
    if "kv_lora_rank" in (configuration(model.name) or {}):
        args["attention_backend"] = "CPU_MLA"  # where there is AMX another one, for bfloat16 alone
    settings = EngineSettings(eager=True, args=args)
    workload = Workload(batch_size=3, input_tokens=24, output_tokens=1)
    trial = Trial(model=model, workload=workload, engine=settings)
    return VllmEngine(trial, [workload], Site(scratch=scratch, device="cpu"))


def _in_vllm(
    folder: Path, scratch: Path, change: Callable[[torch.nn.Module], None] | None = None
) -> torch.Tensor:
    """Logarithms of probabilities of every token of the vocabulary, at every place but the
    first: logits but for a constant."""
    from vllm import SamplingParams

    engine = _engine(Model(name=str(folder), dtype="float32"), scratch)
    try:
        if change is not None:
            engine._vllm.llm.apply_model(change)
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in IDS.tolist()]
        answers = engine._vllm.llm.generate(prompts, asked, use_tqdm=False)
        return torch.tensor(
            [
                [[at[token].logprob for token in range(256)] for at in one.prompt_logprobs[1:]]
                for one in answers
            ]
        )
    finally:
        engine.close()


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[:, :-1]


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_computes_the_same(
    kind: PruneKind, folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = folders["mixtral"], tmp_path / "pruned"
    prune(source, target, _cut(kind))
    found = _in_vllm(target, tmp_path / "scratch")
    expected = _log_probabilities(_masked(source, target, monkeypatch))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_vllm_computes_with_what_a_trial_asks_for(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")
    checkpoint = Model(
        name=str(folders["olmoe"]), dtype="float32", top_k=1, prune=Prune(criterion="norm")
    )
    skeleton = Model(
        name="olmoe-1b-7b", weights="dummy", scale=0.125, num_layers=1, num_experts=8, top_k=2,
        prune=Prune(kind="intra"),
    )  # fmt: skip
    for model, experts, width, top_k in ((checkpoint, 4, 64, 1), (skeleton, 8, 64, 2)):
        engine = _engine(model, tmp_path / "scratch")
        try:
            runs, asked = engine.loaded.architecture, resolve(model)
            assert (runs.num_experts, runs.ffn_dim, runs.top_k) == (experts, width, top_k)
            assert asked is not None and asked.params_total == runs.params_total
            assert engine.loaded.args["model"] == model.name
            engine.generate(IDS.tolist(), 1, kind="timed", repeat=0)
            assert engine.memory().weights == pytest.approx(
                runs.params_total * (4 if model is checkpoint else 2), rel=0.1
            )
        finally:
            engine.close()
    (made,) = (tmp_path / "cache").glob("*/pruning.json")
    assert json.loads(made.read_text())["source"] == str(folders["olmoe"])


def test_vllm_refuses_a_checkpoint_that_cannot_be_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")
    folder = _moe(tmp_path / "moe", "mixtral")
    (folder / "model.safetensors").write_bytes(b"torn")
    asked = Model(name=str(folder), dtype="float32", prune=Prune(criterion="norm"))
    with pytest.raises(Unsupported, match=r"model\.prune: .*model\.safetensors cannot be read"):
        _engine(asked, tmp_path / "scratch")


def _mask_gates(kept: Mapping[str, list[int]]) -> Callable[[torch.nn.Module], None]:
    """Masks the experts that are gone in a model of vLLM."""

    def change(model: torch.nn.Module) -> None:
        for layer, experts in kept.items():
            path = f"model.layers.{layer}."
            gates = [
                module
                for name, module in model.named_modules()
                if name.startswith(path) and name.endswith((".mlp.gate", "_moe.gate"))
            ]
            mask = torch.ones(8, dtype=torch.bool)
            mask[experts] = False

            def hook(_: Any, __: Any, answer: Any, mask: torch.Tensor = mask) -> Any:
                return (answer[0].masked_fill(mask, -math.inf), *answer[1:])

            (gate,) = {id(one): one for one in gates}.values()
            gate.register_forward_hook(hook)
            if (bias := getattr(gate, "e_score_correction_bias", None)) is not None:
                bias.data[mask] = -math.inf

    return change


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_agrees_with_itself_and_with_transformers(
    family: str,
    kind: PruneKind,
    folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = folders[family], tmp_path / "pruned"
    prune(source, target, _cut(kind))
    found, told = _in_vllm(target, tmp_path / "a"), _told(target)
    if kind == "inter":
        masked = _in_vllm(source, tmp_path / "b", _mask_gates(told["kept_experts"]))
    else:
        given = open_checkpoint(source)
        weights = _weights(source)
        for layer, flags in _channels(told, 64).items():
            for expert, kept in enumerate(flags):
                names = [name for name, _ in given.places.layers[layer].expert[expert]]
                gate, up, down = (weights[name.replace("*", str(expert))] for name in names)
                gate[~kept] = 0
                up[~kept] = 0
                down[:, ~kept] = 0
        zeroed = _edited(source, tmp_path / "zeroed")
        save_file(weights, zeroed / "model.safetensors", metadata={"format": "pt"})
        masked = _in_vllm(zeroed, tmp_path / "b")
    expected = _log_probabilities(_masked(source, target, monkeypatch))
    assert (found - masked).abs().max() <= 1e-4 * masked.abs().max()
    # Its attention with latents on CPUs does not give what transformers' does, whatever the
    # experts are (also unpruned); at the first place there is nothing to attend to.
    places = slice(0, 1) if "kv_lora_rank" in FAMILIES[family] else slice(None)
    assert (found - expected)[:, places].abs().max() <= 1e-4 * expected.abs().max()
    whole = _log_probabilities(_logits(_load(source)))
    assert (found - whole).abs().max() > 0.01 * whole.abs().max(), "something is gone"
