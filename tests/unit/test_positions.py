"""How long a request may be, by hand; equality with vLLM is in the contract tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workers.contract.engine import EngineSettings, Speculative
from workers.contract.errors import Infeasible
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.roofline_engine import RooflineEngine
from workers.engines.vllm_engine import VllmEngine
from workers.moe import generators
from workers.moe.architecture import catalogue
from workers.moe.positions import ALLOW_LONG, drafted, limit, positions

OLMOE = "olmoe-1b-7b"
"""4,096 positions."""


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_LONG, raising=False)


def _trial(tokens: int, name: str = OLMOE, **engine: Any) -> Trial:
    return Trial(
        model=Model(name=name, weights="dummy"),
        workload=Workload(input_tokens=tokens - 16, output_tokens=16),
        engine=EngineSettings(**engine),
    )


def _check(trial: Trial) -> None:
    limit(trial).check(trial.workload)


def test_a_request_may_fill_all_positions_and_not_one_more() -> None:
    _check(_trial(4096))
    with pytest.raises(Infeasible) as refused:
        _check(_trial(4097))
    assert str(refused.value) == (
        "4,081 input + 16 output = 4,097 tokens of a request, but olmoe-1b-7b has 4,096 positions "
        "(max_position_embeddings 4,096)"
    )


@pytest.mark.parametrize("engine", [RooflineEngine, VllmEngine])
def test_every_engine_refuses_it(engine: Any) -> None:
    assert engine.refuses(_trial(4096)) is None
    with pytest.raises(Infeasible, match="but olmoe-1b-7b has 4,096 positions"):
        engine.refuses(_trial(5000))


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 1000),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, 2500),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, 4000),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, 1000),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, 1000),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}}}, 2000),
        ({"seq_length": 500}, 500),
        ({"model_max_length": 3000}, 3000),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_positions(changes: dict[str, Any], most: float | None) -> None:
    config = {"model_type": "somebody", "max_position_embeddings": 1000} | changes
    found = positions(config)
    assert (found.most if found is not None else None) == most


def test_scaling_is_part_of_the_arithmetic() -> None:
    found = positions(
        {
            "model_type": "mixtral",
            "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        }
    )
    assert found is not None
    assert found.why == "max_position_embeddings 4,096 x rope factor 2 = 8,192"


def test_a_known_family_that_is_silent_has_its_class_s_default_and_no_other() -> None:
    known = positions({"model_type": "olmoe"})
    assert known is not None and known.most == 4096
    assert known.why == "max_position_embeddings, by default of olmoe, 4,096"
    assert positions({"model_type": "nobody's"}) is None


def test_the_window_is_the_limit_where_nothing_else_is_attended_to() -> None:
    config = {"model_type": "mixtral", "max_position_embeddings": 4096, "sliding_window": 512}
    assert positions(config, window_only=True).most == 512  # type: ignore[union-attr]
    assert positions(config).most == 4096  # type: ignore[union-attr]


def test_a_model_length_of_the_sweep_bounds_requests_and_is_bounded_itself() -> None:
    _check(_trial(1024, args={"max_model_len": 1024}))
    with pytest.raises(Infeasible, match=r"1,025 tokens .* engine\.args\.max_model_len is 1024"):
        _check(_trial(1025, args={"max_model_len": 1024}))
    with pytest.raises(Infeasible, match=r"max_model_len: a model length of 4,097 is beyond"):
        _check(_trial(100, args={"max_model_len": 4097}))
    with pytest.raises(Infeasible, match="is null, so olmoe-1b-7b is served with 4,096 positions"):
        _check(_trial(4097, args={"max_model_len": None}))


def test_the_environment_lifts_the_limit_as_vllm_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_LONG, "1")
    _check(_trial(5000))
    _check(_trial(5000, args={"max_model_len": 6000}))
    monkeypatch.setenv(ALLOW_LONG, "yes")
    with pytest.raises(Infeasible):
        _check(_trial(5000))


def test_overrides_of_the_configuration_count() -> None:
    _check(_trial(8192, args={"hf_overrides": {"max_position_embeddings": 8192}}))
    with pytest.raises(Infeasible, match="has 64 positions"):
        _check(_trial(65, args={"hf_overrides": {"max_position_embeddings": 64}}))


def test_a_model_whose_configuration_is_not_here_has_no_limit() -> None:
    assert limit(_trial(10**9, name="somebody/something")).tokens == float("inf")


def test_a_shorter_draft_is_no_reason_to_refuse_but_a_length_asked_for_it_is() -> None:
    draft = Speculative(model=OLMOE)
    long = _trial(8192, name="mixtral-8x7b", speculative=draft)
    _check(long)
    assert drafted(long) == 4096
    asked = Speculative(model=OLMOE, args={"max_model_len": 5000})
    with pytest.raises(Infeasible, match=r"beyond max_position_embeddings 4,096 of the draft olm"):
        _check(_trial(100, name="mixtral-8x7b", speculative=asked))


def test_every_catalogue_entry_has_positions_but_the_one_that_tells_of_none() -> None:
    without = {name for name, one in catalogue().items() if positions(one["config"]) is None}
    assert without == {"switch-c"}, "its positions are relative"
    assert positions(catalogue()["molmoe-1b"]["config"]).most == 4096  # type: ignore[union-attr]
    assert positions(catalogue()["deepseek-vl2"]["config"]).most == 4096  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (None, "names no architectures, so the engine would load an embedding model"),
        ([], "names no architectures"),
        (["MixtralModel"], "names MixtralModel as architectures, which generates no text"),
        (["LlamaForSequenceClassification"], "generates no text"),
        (["MixtralForCausalLM"], None),
        (["ChatGLMModel"], None),
        (["SomethingElse"], None),
    ],
)
def test_what_generates(names: list[str] | None, said: str | None) -> None:
    found = generators.refusal({"model_type": "mixtral", "architectures": names})
    assert (found is None) is (said is None)
    assert said is None or said in str(found)


def test_a_checkpoint_that_is_no_generator_is_refused_by_the_engine_that_loads_it(
    tmp_path: Path,
) -> None:
    config = dict(catalogue()["mixtral-8x7b"]["config"])
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    trial = _trial(64, name=str(tmp_path))
    with pytest.raises(Infeasible, match="names no architectures"):
        VllmEngine.refuses(trial)
    assert RooflineEngine.refuses(trial) is None
    named = {"hf_overrides": {"architectures": ["MixtralForCausalLM"]}}
    assert VllmEngine.refuses(_trial(64, name=str(tmp_path), args=named)) is None


def test_a_folder_of_sentence_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(catalogue()[OLMOE]["config"]))
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(Infeasible, match="lists a pooling module"):
        generators.check(Trial(model=Model(name=str(tmp_path))))
