"""`engine.args` beside the fields of a trial: merged, dropped or refused, never silently both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import SweepError
from orchestrator.grid import expand
from orchestrator.plan import Plan, build, own_dimensions
from orchestrator.sweep import load
from workers.contract import arguments
from workers.contract.engine import EngineSettings, Speculative
from workers.contract.errors import Contradiction, Infeasible
from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.engines.vllm_engine import VllmEngine, _overrides, _source, cuda_economy
from workers.hardware.coverage import ignored
from workers.hardware.device import device
from workers.moe.architecture import catalogue, structure
from workers.moe.overrides import applied

MIXTRAL = Model(name="mixtral-8x7b", weights="dummy")


def _trial(args: dict[str, Any], model: Model = MIXTRAL, **parts: Any) -> Trial:
    settings = parts.pop("settings", {})
    return Trial(model=model, engine=EngineSettings(args=args, **settings), **parts)


def _plan(folder: Path, base: dict[str, Any], grid: dict[str, Any], profile: str = "h100") -> Plan:
    path = folder / "s.yaml"
    base = {"model": {"name": "mixtral-8x7b", "weights": "dummy"}} | base
    path.write_text(yaml.safe_dump({"name": "s", "base": base, "grid": grid}, sort_keys=False))
    sweep = load(path, (), profile)
    return build(sweep, expand(sweep, own_dimensions), device(profile))


def test_structure_is_that_of_the_overridden_configuration() -> None:
    a = structure(_trial({"hf_overrides": {"sliding_window": 32, "num_key_value_heads": 4}}))
    assert a is not None
    assert a.layers[0].attention.window == 32 and a.num_kv_heads == 4
    axis = Model(name="mixtral-8x7b", weights="dummy", top_k=1)
    both = structure(_trial({"hf_overrides": {"sliding_window": 32}}, axis))
    assert both is not None and both.top_k == 1 and both.layers[0].attention.window == 32


def test_a_name_that_the_class_maps_sets_what_it_stands_for() -> None:
    a = structure(_trial({"hf_overrides": {"num_experts": 4}}))
    assert a is not None and a.num_experts == 4
    qwen = catalogue()["qwen3-30b-a3b"]["config"]
    assert applied(qwen, {"num_local_experts": 16})["num_experts"] == 16


def test_blocks_of_configurations_are_changed_and_others_replaced() -> None:
    config = {"text_config": {"a": 1, "rope": {"x": 1, "y": 2}}, "rope_scaling": {"x": 1, "y": 2}}
    over = {"text_config": {"rope": {"x": 3}}, "rope_scaling": {"x": 3}}
    assert applied(config, over) == {
        "text_config": {"a": 1, "rope": {"x": 3, "y": 2}},
        "rope_scaling": {"x": 3},
    }


def test_both_sides_reach_the_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(catalogue()["mixtral-8x7b"]["config"]))
    trial = _trial({"hf_overrides": {"sliding_window": 32}}, Model(name=str(tmp_path), top_k=1))
    assert _overrides(trial, _source(trial.model)) == {
        "num_experts_per_tok": 1,
        "sliding_window": 32,
    }
    nested = dict(catalogue()["llama-4-scout"]["config"])
    (tmp_path / "config.json").write_text(json.dumps(nested))
    inner = {"text_config": {"attention_chunk_size": 64}}
    trial = _trial({"hf_overrides": inner}, Model(name=str(tmp_path), num_layers=4))
    found = _overrides(trial, _source(trial.model))["text_config"]
    assert (found["attention_chunk_size"], found["num_hidden_layers"]) == (64, 4)


@pytest.mark.parametrize("name", ["num_experts_per_tok", "num_local_experts", "num_experts"])
def test_one_entry_set_twice_and_differently_is_refused(name: str) -> None:
    model = Model(name="mixtral-8x7b", weights="dummy", top_k=1, num_experts=4)
    with pytest.raises(Contradiction, match=rf"hf_overrides\.{name} is 2, but model\."):
        structure(_trial({"hf_overrides": {name: 2}}, model))
    same = {"num_experts_per_tok": 1, "num_local_experts": 4, "num_experts": 4}[name]
    assert structure(_trial({"hf_overrides": {name: same}}, model)) is not None


def test_a_plan_says_where_the_contradiction_is_written(tmp_path: Path) -> None:
    base = {"engine": {"args": {"hf_overrides": {"sliding_window": 8, "num_experts_per_tok": 2}}}}
    assert len(_plan(tmp_path, base, {"model.top_k": [2]}).groups) == 1
    with pytest.raises(SweepError) as refused:
        _plan(tmp_path, base, {"model.top_k": [2, 1]})
    line = (tmp_path / "s.yaml").read_text().splitlines().index(
        "        num_experts_per_tok: 2"
    ) + 1
    key = "engine.args.hf_overrides.num_experts_per_tok"
    assert str(refused.value).startswith(f"{tmp_path / 's.yaml'}:{line}: ")
    assert f"{key} is 2, but model.top_k sets num_experts_per_tok to 1" in str(refused.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, but layout.tensor is 1"),
        ({"dtype": "float16"}, "dtype is 'float16', but model.dtype is 'bfloat16'"),
        ({"quantization": "fp8"}, "quantization is 'fp8', but model.quantization is null"),
        ({"enforce_eager": True}, "enforce_eager is true, but engine.eager is false"),
        ({"enable_expert_parallel": True}, "but layout.expert is false: write layout.expert"),
        ({"model": "another"}, "but model.name is 'mixtral-8x7b'"),
        ({"revision": "main"}, "but model.revision is null"),
        ({"moe_backend": "triton"}, "but engine.moe_backend is null"),
        ({"load_format": "auto"}, "but model.weights is dummy"),
        ({"runner": "pooling"}, "a sweep measures generation"),
        ({"speculative_config": {}}, "engine.args.speculative_config: not here; write engine.spec"),
        ({"tokenizer": "x"}, "engine.args.tokenizer: not here"),
        ({"worker_cls": "x"}, "engine.args.worker_cls: not here"),
        ({"hf_overrides": "x"}, "hf_overrides is 'x', but it is a block of keys"),
    ],
)
def test_an_argument_that_contradicts_a_field(args: dict[str, Any], said: str) -> None:
    with pytest.raises(Contradiction) as refused:
        arguments.check(_trial(args))
    assert said in str(refused.value)
    assert refused.value.key == f"engine.args.{next(iter(args))}"
    again = copy.copy(refused.value)  # as a pickle does it
    assert (str(again), again.key) == (str(refused.value), refused.value.key)
    with pytest.raises(Infeasible):
        VllmEngine.refuses(_trial(args))


def test_an_argument_that_repeats_a_field_is_dropped() -> None:
    args = {"tensor_parallel_size": 4, "dtype": "bfloat16", "model": "mixtral-8x7b", "seed": 7}
    trial = _trial(args, layout=Layout(tensor=4))
    arguments.check(trial)
    assert arguments.given(trial) == {"seed": 7}
    arguments.check(_trial({"load_format": "dummy"}))
    arguments.check(_trial({"load_format": "safetensors"}, Model(name="mixtral-8x7b")))


def test_two_bounds_of_one_memory() -> None:
    for args in ({"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 2**31}):
        with pytest.raises(Contradiction, match=r"engine\.memory_limit_gib"):
            arguments.check(_trial(args, settings={"memory_limit_gib": 1.0}))
        arguments.check(_trial(args))


def test_a_draft_s_further_settings_contradict_none_of_its_own() -> None:
    for args in ({"num_speculative_tokens": 2}, {"method": "eagle"}, {"model": "another"}):
        asked = Speculative(model="ngram", tokens=4, args=args)
        with pytest.raises(Contradiction, match=r"engine\.speculative\.args\..* but engine\.spec"):
            arguments.check(_trial({}, settings={"speculative": asked}))
    same = {"num_speculative_tokens": 4, "method": "ngram"}
    asked = Speculative(model="ngram", tokens=4, args=same)
    arguments.check(_trial({}, settings={"speculative": asked}))


def test_blocks_of_both_sides_are_merged_entry_by_entry() -> None:
    ours = {"additional_config": {"memory_limit_bytes": 5}, "hf_overrides": {}, "seed": 0}
    theirs = {"additional_config": {"x": 1}, "hf_overrides": {"y": 2}, "seed": 3}
    assert arguments.joined(ours, theirs) == {
        "additional_config": {"memory_limit_bytes": 5, "x": 1},
        "hf_overrides": {"y": 2},
        "seed": 3,
    }
    with pytest.raises(Contradiction, match="memory_limit_bytes is 6, but the trial's own"):
        arguments.joined(ours, {"additional_config": {"memory_limit_bytes": 6}})


def test_experts_one_by_one_keep_their_graphs_off_beside_the_sweep_s_own_settings() -> None:
    args = {"compilation_config": {"mode": 2}}
    trial = _trial(args, settings={"moe_backend": "unfused"})
    arguments.check(trial)
    ours = cuda_economy(trial, [trial.workload])
    merged = arguments.joined(ours, arguments.given(trial))["compilation_config"]
    assert merged == {"cudagraph_mode": "NONE", "mode": 2}
    wrong = {"compilation_config": {"cudagraph_mode": "FULL"}}
    with pytest.raises(Contradiction, match="cudagraph_mode is 'FULL'"):
        arguments.check(_trial(wrong, settings={"moe_backend": "unfused"}))


def test_what_a_prediction_leaves_out_is_named() -> None:
    settings = EngineSettings(
        args={
            "max_num_seqs": 8,
            "seed": 1,
            "enable_dbo": True,
            "enable_eplb": False,
            "cpu_offload_gb": 4,
            "kv_offloading_size": None,
            "what_is_this": 1,
        },
        moe_backend="unfused",
    )
    assert ignored(settings) == (
        "engine.args.cpu_offload_gb",
        "engine.args.enable_dbo",
        "engine.args.what_is_this",
        "engine.moe_backend",
    )
    assert ignored(EngineSettings(routing="uniform", args={"block_size": 32})) == ()


def test_the_plan_and_the_record_name_it(tmp_path: Path) -> None:
    base = {"engine": {"kind": "roofline", "args": {"enable_dbo": True}}}
    plan = _plan(tmp_path, base, {"workload.batch_size": [1, 2]})
    assert plan.notes == ("predictions do not cover engine.args.enable_dbo (2 trials)",)
    known = plan.groups[0].trials[0].prediction
    assert known is not None
    assert known.columns()["prediction_ignores"] == "engine.args.enable_dbo"
    plain = _plan(tmp_path, {}, {"workload.batch_size": [1]})
    assert plain.notes == ()


def test_only_the_points_that_are_too_long_are_refused(tmp_path: Path) -> None:
    base = {
        "model": {"name": "olmoe-1b-7b", "weights": "dummy"},
        "workload": {"output_tokens": 16},
        "engine": {"kind": "roofline"},
    }
    plan = _plan(tmp_path, base, {"workload.input_tokens": [2048, 8192, 100_000]})
    assert [one.trial.workload.input_tokens for one in plan.infeasible] == [8192, 100_000]
    assert "8,192 input + 16 output = 8,208 tokens" in str(plan.infeasible[0].infeasible)
    assert all(one.prediction is None for one in plan.infeasible)
    ((left,),) = (group.trials for group in plan.groups)
    assert left.trial.workload.input_tokens == 2048


def test_a_roofline_reads_what_no_engine_would_load_and_says_so(tmp_path: Path) -> None:
    config = dict(catalogue()["olmoe-1b-7b"]["config"])
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = {"name": str(tmp_path), "weights": "dummy"}
    plan = _plan(
        tmp_path, {"model": model, "engine": {"kind": "roofline"}}, {"model.top_k": [1, 2]}
    )
    assert len(plan.groups) == 2 and len(plan.notes) == 1
    assert "vLLM would not run this" in plan.notes[0] and "names no architectures" in plan.notes[0]
    refused = _plan(tmp_path, {"model": model}, {"model.top_k": [1, 2]})
    assert not refused.groups and len(refused.infeasible) == 2
