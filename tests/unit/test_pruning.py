"""Pruning as an axis: arithmetic, identity, plan, cache and prediction, without an engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis import load as read
from analysis.figures.figure import RecordsFigure
from analysis.figures.registry import find
from orchestrator.grid import expand
from orchestrator.plan import build, own_dimensions
from orchestrator.sweep import load
from tests.unit.test_analysis_dataset import write
from workers import runner
from workers.contract.errors import Infeasible
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.hardware.device import device
from workers.hardware.roofline import predict
from workers.moe.architecture import bend, configuration, resolve
from workers.moe.pruning import cache
from workers.moe.pruning.errors import PruneError
from workers.moe.structure import Architecture

ROOT = Path(__file__).resolve().parents[2]


def _resolved(model: Model) -> Architecture:
    found = resolve(model)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "kind", "ratio", "experts", "width"),
    [
        ("olmoe-1b-7b", "inter", 0.125, 56, 1024),
        ("olmoe-1b-7b", "inter", 0.5, 32, 1024),
        ("olmoe-1b-7b", "intra", 0.125, 64, 896),
        ("mixtral-8x7b", "inter", 0.25, 6, 14336),
        ("mixtral-8x7b", "intra", 0.25, 8, 10752),
        ("qwen1.5-moe-a2.7b", "inter", 0.125, 53, 1408),  # 7.5 of 60 are 7
        ("qwen1.5-moe-a2.7b", "intra", 0.5, 60, 704),
        ("qwen3-30b-a3b", "intra", 0.25, 128, 576),
        ("deepseek-v2-lite", "inter", 0.5, 32, 1408),
        ("deepseek-v2-lite", "intra", 0.5, 64, 704),
    ],
)
def test_the_structure_is_what_is_left(
    name: str, kind: Any, ratio: float, experts: int, width: int
) -> None:
    whole = _resolved(Model(name=name))
    found = _resolved(Model(name=name, prune=Prune(kind=kind, ratio=ratio)))
    assert (found.num_experts, found.ffn_dim, found.top_k) == (experts, width, whole.top_k)
    assert whole.moe is not None and found.moe is not None
    layers = sum(layer.experts is not None for layer in whole.layers)
    gone = whole.num_experts * whole.ffn_dim - experts * width
    fewer = layers * 3 * whole.hidden_size * gone
    fewer += layers * whole.hidden_size * (whole.num_experts - experts)  # rows of the router
    assert whole.params_total - found.params_total == fewer
    assert [w.shape for w in found.moe.shared_weights] == [
        w.shape for w in whole.moe.shared_weights
    ]
    dummy = Model(name=name, prune=Prune(kind=kind, ratio=ratio), weights="dummy")
    assert _resolved(dummy).params_total == found.params_total


def test_shared_experts_keep_at_least_their_width() -> None:
    """2816 channels are no whole number of widths of 1056: three are the next."""
    found = _resolved(Model(name="deepseek-v2-lite", prune=Prune(kind="intra", ratio=0.25)))
    assert found.moe is not None
    assert (found.ffn_dim, found.shared_experts) == (1056, 3)
    assert found.moe.shared_weights[0].shape[0] == 3168


def test_a_scaled_skeleton_is_pruned_by_its_own_width() -> None:
    model = Model(name="olmoe-1b-7b", weights="dummy", scale=0.125, num_layers=2)
    assert _resolved(model).ffn_dim == 128
    for ratio, width in ((0.125, 112), (0.25, 96), (0.5, 64)):
        pruned = replace(model, prune=Prune(kind="intra", ratio=ratio))
        assert _resolved(pruned).ffn_dim == width


def test_groups_of_experts_stay_as_they_are() -> None:
    config = configuration("deepseek-r1")
    assert config is not None and (config["n_routed_experts"], config["n_group"]) == (256, 8)
    bent = bend(config, Model(name="deepseek-r1", prune=Prune(ratio=0.25)))
    assert (bent["n_routed_experts"], bent["n_group"], bent["topk_group"]) == (192, 8, 4)


@pytest.mark.parametrize(
    ("model", "prune", "reason"),
    [
        (
            {"name": "olmoe-1b-7b", "top_k": 8, "num_experts": 12},
            {"ratio": 0.5},
            "top_k 8 is above the 6 experts that pruning 50.0% of 12 leaves",
        ),
        ({"name": "mixtral-8x7b"}, {"ratio": 0.1}, "10.0% of 8 experts is 0.8: nothing to remove"),
        ({"name": "olmoe-1b-7b"}, {"kind": "intra", "criterion": "frequency"}, "ranks experts"),
        (
            {"name": "deepseek-r1"},
            {"ratio": 0.3},
            "180 experts, which pruning 30.0% of 256 leaves, are not divisible by the 8 groups",
        ),
        (
            {"name": "deepseek-r1"},
            {"ratio": 0.97},
            "8 experts that pruning 97.0% of 256 leaves are 1 in each of 8 groups",
        ),
        ({"name": "qwen3-8b"}, {}, "qwen3 has no experts to prune"),
        ({"name": "llama-4-scout"}, {"kind": "intra"}, "they would be cut too"),
    ],
)
def test_what_does_not_come_out_is_infeasible(
    model: dict[str, Any], prune: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Infeasible, match=reason):
        resolve(Model(**model, prune=Prune(**prune)))


def test_a_trial_without_pruning_is_who_it_was() -> None:
    trial = Trial(model=Model(name="mixtral-8x7b", weights="dummy"))
    assert trial.named_id == "0c6f7ba8e2c8fe90" and trial.engine_key == "49cc067ab1ee8ddc"
    pruned = replace(trial, model=replace(trial.model, prune=Prune()))
    assert pruned.named_id != trial.named_id and pruned.engine_key != trial.engine_key


def test_a_prediction_is_of_what_is_left() -> None:
    trial = Trial(model=Model(name="mixtral-8x7b", weights="dummy"))
    sizes = []
    for prune in (None, Prune(ratio=0.25), Prune(kind="intra", ratio=0.25), Prune(ratio=0.5)):
        asked = replace(trial, model=replace(trial.model, prune=prune))
        found = predict(_resolved(asked.model), asked, device("h100"))
        assert found is not None
        sizes.append(found.weights_gib)
    assert sizes[0] > sizes[1] > sizes[3]
    assert sizes[1] == pytest.approx(sizes[2], rel=1e-4), "but for the rows of the router"


def _orchestrated(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "name: cut\nbase:\n  model: {name: olmoe-1b-7b, weights: dummy, num_experts: 12}\n"
        "  engine: {kind: roofline}\n"
        "grid:\n  model.prune: [null, {ratio: 0.25}, {kind: intra, ratio: 0.5}, {ratio: 0.5}]\n"
        "  model.top_k: [2, 8]\n"
    )
    command = [sys.executable, "-m", "orchestrator", str(sweep), "--profile", "h100", *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.lengthy
def test_the_plan_tells_infeasible_points_with_their_arithmetic(tmp_path: Path) -> None:
    done = _orchestrated(tmp_path, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (refused,) = told["infeasible"]
    assert "top_k 8 is above the 6 experts that pruning 50.0% of 12 leaves" in json.dumps(refused)
    memory = [group["predicted_memory_gib"] for group in told["groups"]]
    assert len(memory) == 7 and memory[0] > 1.2 * memory[-1]


# The cache of pruned checkpoints.


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mixtral of one layer with two experts, and a cache of its own."""
    import numpy as np
    from safetensors.numpy import save_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    config = {
        "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 4, "vocab_size": 10,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 4, "num_experts_per_tok": 1, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng, layer = np.random.default_rng(0), "model.layers.0."
    shapes = {
        "model.embed_tokens": (10, 8), "model.norm": (8,), "lm_head": (10, 8),
        f"{layer}input_layernorm": (8,), f"{layer}post_attention_layernorm": (8,),
        f"{layer}self_attn.q_proj": (8, 8), f"{layer}self_attn.k_proj": (4, 8),
        f"{layer}self_attn.v_proj": (4, 8), f"{layer}self_attn.o_proj": (8, 8),
        f"{layer}block_sparse_moe.gate": (4, 8),
    }  # fmt: skip
    for i in range(4):
        path = f"{layer}block_sparse_moe.experts.{i}"
        shapes |= {f"{path}.w1": (4, 8), f"{path}.w3": (4, 8), f"{path}.w2": (8, 4)}
    weights = {f"{n}.weight": rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_it_is_made_once_and_anew_for_another_source_or_another_cut(source: Path) -> None:
    first = cache.cached(source, Prune(ratio=0.5))
    assert first.parent == cache.folder() and (first / "pruning.json").is_file()
    stamp = (first / "config.json").stat().st_mtime_ns
    assert cache.cached(source, Prune(ratio=0.5)) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    others = {
        cache.key(source, Prune(ratio=0.25)),
        cache.key(source, Prune(kind="intra")),
        cache.key(source, Prune(criterion="norm")),
    }
    (source / "extra.txt").write_text("x")
    moved = shutil.copytree(source, source.with_name("moved"))
    assert cache.key(moved, Prune(ratio=0.5)) == first.name, "of no weight, and elsewhere"
    (source / "tokenizer.json").write_text("{}")
    others.add(cache.key(source, Prune(ratio=0.5)))
    stamps = (source / "model.safetensors").stat()
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    os.utime(source / "model.safetensors", ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert len(others | {first.name, cache.key(source, Prune(ratio=0.5))}) == 6


def test_two_that_come_together_make_one(source: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: cache.cached(source, Prune()), range(2)))
    assert found[0] == found[1]
    left = {path.name for path in cache.folder().iterdir()}
    assert left == {found[0].name, f"{found[0].name}.lock"}


@pytest.mark.lengthy
def test_what_a_killed_process_left_is_cleared(source: Path) -> None:
    name = cache.key(source, Prune())
    rest = cache.folder() / f".{name}.12345678.partial"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_bytes(b"torn")
    assert cache.cached(source, Prune()).name == name
    assert not rest.exists()


def test_what_cannot_be_pruned_says_so_and_leaves_nothing(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(PruneError, match=r"model\.safetensors cannot be read"):
        cache.cached(source, Prune())
    assert [path.suffix for path in cache.folder().iterdir()] == [".lock"]


@pytest.mark.lengthy
def test_records_hold_what_is_left(tmp_path: Path) -> None:
    """The whole grid of the paper, predicted: every group through the runner."""
    args = ("base.engine.kind=roofline",)
    sweep = load(ROOT / "sweeps/pruning.yaml", args, "h100")
    plan = build(sweep, expand(sweep, own_dimensions), device("h100"))
    found: list[dict[str, Any]] = []
    for group in plan.groups:
        tickets = tuple(
            Ticket(trial=one.trial, trial_id=one.trial_id, axes=one.axes) for one in group.trials
        )
        job = Job(sweep="p", run_id="r", group_id=group.group_id, profile="h100", tickets=tickets)
        found += (
            row
            for one in runner.run(job)
            if isinstance(one, Finished)
            for row in one.record.to_pylist()
        )
    assert len(found) == 7 * (8 + 4)
    assert {row["outcome"] for row in found} == {"ok"}
    assert {row["prune_criterion"] for row in found} == {None}, "weights are random"
    shapes = {
        (row["model"], row["prune_kind"], row["prune_ratio"]): (row["num_experts"], row["ffn_dim"])
        for row in found
    }
    assert shapes == {
        ("olmoe-1b-7b", None, None): (64, 1024),
        ("olmoe-1b-7b", "inter", 0.125): (56, 1024),
        ("olmoe-1b-7b", "inter", 0.25): (48, 1024),
        ("olmoe-1b-7b", "inter", 0.5): (32, 1024),
        ("olmoe-1b-7b", "intra", 0.125): (64, 896),
        ("olmoe-1b-7b", "intra", 0.25): (64, 768),
        ("olmoe-1b-7b", "intra", 0.5): (64, 512),
        ("qwen1.5-moe-a2.7b", None, None): (60, 1408),
        ("qwen1.5-moe-a2.7b", "inter", 0.125): (53, 1408),
        ("qwen1.5-moe-a2.7b", "inter", 0.25): (45, 1408),
        ("qwen1.5-moe-a2.7b", "inter", 0.5): (30, 1408),
        ("qwen1.5-moe-a2.7b", "intra", 0.125): (60, 1232),
        ("qwen1.5-moe-a2.7b", "intra", 0.25): (60, 1056),
        ("qwen1.5-moe-a2.7b", "intra", 0.5): (60, 704),
    }
    write(tmp_path, found)
    figure = find("fig11")
    assert isinstance(figure, RecordsFigure)
    frame = figure.prepare(read(tmp_path))
    assert len(frame) == 2 * 4 * (8 + 4)
    said = figure.insight(frame)
    assert "olmoe-1b-7b, intra (narrower experts): at top-k 8" in said
    assert "qwen1.5-moe-a2.7b, inter (fewer experts): at top-k 4" in said
