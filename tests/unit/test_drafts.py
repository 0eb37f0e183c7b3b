"""Drafts of speculative decoding before anything is loaded: their names, words and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import plan
from orchestrator.errors import SweepError
from orchestrator.fields import structured
from orchestrator.grid import expand
from orchestrator.sweep import load
from workers import recorder
from workers.contract.engine import EngineSettings, Speculative
from workers.contract.errors import Crashed, Infeasible
from workers.contract.fingerprint import fingerprint
from workers.contract.job import Job, Ticket
from workers.contract.measurement import Drafted, Measurement, Pass
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.engines.vllm_engine import VllmEngine, cuda_economy
from workers.failures import explain
from workers.hardware.device import device
from workers.hardware.roofline import predict, roofline
from workers.metrics import figures
from workers.moe import drafts
from workers.moe.architecture import catalogue, resolve

WORDS = {"a": 0, "b": 1, "c": 2}


def _folder(
    folder: Path, words: dict[str, int], *, added: tuple[str, ...] = (), size: int = 64
) -> str:
    """A checkpoint without weights: what is read before any are."""
    folder.mkdir()
    config = {**catalogue()["qwen3-0.6b"]["config"], "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "model": {"type": "BPE", "vocab": words},
        "added_tokens": [{"id": len(words) + i, "content": one} for i, one in enumerate(added)],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def _trial(target: str, draft: str, weights: str = "checkpoint", **speculative: Any) -> Trial:
    return Trial(
        model=Model(name=target, weights=weights),  # type: ignore[arg-type]
        engine=EngineSettings(speculative=Speculative(model=draft, **speculative)),
    )


def test_equal_vocabularies_pass_and_every_difference_is_named(tmp_path: Path) -> None:
    target = _folder(tmp_path / "target", WORDS, added=("<end>",))

    def difference(name: str, words: dict[str, int], **changes: Any) -> str:
        trial = _trial(target, _folder(tmp_path / name, words, **changes))
        with pytest.raises(Infeasible) as caught:
            drafts.check(trial)
        with pytest.raises(Infeasible):  # the engine's own machine says so as well
            VllmEngine.refuses(trial)
        words_of = f"the draft {tmp_path / name} does not share the vocabulary of {target}: "
        assert str(caught.value).startswith(words_of)
        return str(caught.value).removeprefix(words_of)

    same = _trial(target, _folder(tmp_path / "same", WORDS, added=("<end>",)))
    drafts.check(same)
    assert VllmEngine.refuses(same) is None
    assert (
        difference("more", WORDS, added=("<end>",), size=96)
        == "96 tokens in its configuration, not 64"
    )
    swapped = {"a": 0, "c": 1, "b": 2}
    assert difference("swapped", swapped, added=("<end>",)) == "its token 1 is 'c', not 'b'"
    assert difference("short", WORDS) == "it lacks token 3, '<end>' (3 tokens, not 4)"
    assert difference("long", WORDS, added=("<end>", "<x>")) == (
        "its token 4, '<x>', is unknown to the target (5 tokens, not 4)"
    )


def test_what_need_not_share_a_vocabulary(tmp_path: Path) -> None:
    target = _folder(tmp_path / "target", WORDS)
    other = _folder(tmp_path / "other", {"x": 0}, size=32)
    drafts.check(_trial(target, "ngram"))
    drafts.check(_trial(target, other, method="eagle3"))
    drafts.check(_trial(target, other, args={drafts.MIXED: True}))
    drafts.check(Trial(model=Model(name=target)))


def test_unigrams_are_read_and_a_tokenizer_that_is_none_is_told(tmp_path: Path) -> None:
    target, draft = (_folder(tmp_path / name, WORDS) for name in ("target", "draft"))
    unigram = {"model": {"vocab": [["a", 0.0], ["b", -1.0], ["d", -2.0]]}, "added_tokens": []}
    (tmp_path / "draft" / "tokenizer.json").write_text(json.dumps(unigram))
    with pytest.raises(Infeasible, match="its token 2 is 'd', not 'c'"):
        drafts.check(_trial(target, draft))
    (tmp_path / "draft" / "tokenizer.json").write_text("{}")
    assert "cannot be read" in (VllmEngine.refuses(_trial(target, draft)) or "")
    (tmp_path / "draft" / "tokenizer.json").unlink()
    drafts.check(_trial(target, draft))  # the sizes agree, and no more is known


def test_files_of_a_hub_are_asked_of_whoever_can_get_them(tmp_path: Path) -> None:
    _folder(tmp_path / "target", WORDS)
    _folder(tmp_path / "draft", {**WORDS, "d": 3})
    trial = _trial("a-lab/target", "a-lab/draft")
    drafts.check(trial)
    with pytest.raises(Infeasible, match="its token 3, 'd', is unknown"):
        drafts.check(trial, lambda model, file: tmp_path / model.name.split("/")[1] / file)
    assert drafts.hub_id(trial.model) == "a-lab/target"
    assert drafts.hub_id(Model(name="qwen3-0.6b")) == "Qwen/Qwen3-0.6B"
    assert drafts.hub_id(Model(name=str(tmp_path))) is None


def test_the_paper_s_drafts_share_the_target_s_vocabulary_and_mixtral_does_not() -> None:
    for draft in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"):
        drafts.check(_trial("qwen3-30b-a3b", draft))
    with pytest.raises(Infeasible, match="151,936 tokens in its configuration, not 32,000"):
        drafts.check(_trial("mixtral-8x7b", "qwen3-0.6b"))


def test_the_draft_of_a_skeleton_is_a_skeleton_of_the_same_scale() -> None:
    trial = _trial("qwen3-30b-a3b", "qwen3-0.6b", weights="dummy")
    small = replace(trial, model=replace(trial.model, scale=0.125))
    drafts.check(small)
    structure = drafts.structure(small)
    assert structure is not None and structure.vocab_size == 19_008  # an eighth, in steps of 32
    with pytest.raises(Infeasible, match="19,008 tokens in its configuration, not 4,000"):
        drafts.check(replace(small, model=replace(small.model, name="mixtral-8x7b")))


def _build(path: Path, draft: str) -> plan.Plan:
    path.write_text(
        "name: s\nbase:\n  model: {name: mixtral-8x7b}\n  engine:\n    speculative:\n"
        f"      model: {draft}\n      args: {{prompt_lookup_max: 3}}\n"
    )
    sweep = load(path)
    return plan.build(sweep, expand(sweep), device("h100"))


def test_the_plan_says_so_before_any_machine_is_asked(tmp_path: Path) -> None:
    (one,) = _build(tmp_path / "s.yaml", "qwen3-0.6b").infeasible
    assert "does not share the vocabulary of mixtral-8x7b" in str(one.infeasible)
    assert one.trial.engine.speculative is not None
    assert one.trial.engine.speculative.args == {"prompt_lookup_max": 3}
    assert len(_build(tmp_path / "t.yaml", "ngram").groups) == 1
    with pytest.raises(
        SweepError, match=r"s\.yaml:6: base\.engine\.speculative\.model: unknown model"
    ):
        _build(tmp_path / "s.yaml", "qwen4")


def test_a_draft_takes_its_memory_and_changes_no_predicted_time() -> None:
    trial = _trial("qwen3-30b-a3b", "qwen3-0.6b")
    alone = replace(trial, engine=EngineSettings())
    h100 = device("h100")
    target, draft = resolve(trial.model), drafts.structure(trial)
    assert target is not None and draft is not None
    without = predict(target, alone, h100)
    engine = roofline(target, trial, h100, draft)
    assert without is not None and engine is not None
    beside = engine.predict(trial.workload)
    assert draft.params_total is not None
    assert beside.weights_gib - without.weights_gib == pytest.approx(
        draft.params_total * 2 / 2**30, rel=1e-3
    )
    assert beside.kv_cache_gib / without.kv_cache_gib == pytest.approx(
        1 + draft.kv_values_per_token / target.kv_values_per_token
    )
    assert beside.e2e_s == without.e2e_s


def test_identities_of_trials_that_had_a_draft_before_have_not_changed() -> None:
    assert fingerprint(Speculative(model="ngram", tokens=2)) == fingerprint(
        {"model": "ngram", "tokens": 2}
    )
    assert fingerprint(Speculative(model="ngram", method="ngram_gpu")) == fingerprint(
        {"model": "ngram", "method": "ngram_gpu"}
    )


def test_settings_of_a_draft_are_axes_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\nbase:\n  model: {name: mixtral-8x7b}\n"
        "  engine.speculative: {model: ngram, args: {prompt_lookup_min: 1}}\n"
        "grid:\n  engine.speculative.args.prompt_lookup_max: [2, 3]\n"
        "  engine.speculative.tokens: [2, 4]\n"
    )
    asked = [point.trial.engine.speculative for point in expand(load(path)).points]
    assert [(one.tokens, one.args) for one in asked if one] == [
        (tokens, {"prompt_lookup_min": 1, "prompt_lookup_max": most})
        for most in (2, 3)
        for tokens in (2, 4)
    ]
    settings = {"speculative": {"model": "ngram", "args": {"schedule": "1e3"}}}
    trial = structured({"model": {"name": "x"}, "engine": settings})
    assert trial.engine.speculative == Speculative(model="ngram", args={"schedule": "1e3"})
    assert settings["speculative"]["args"] == {"schedule": "1e3"}, "what was given is untouched"


def _timed(rows: tuple[tuple[float, ...], ...], drafted: Drafted | None) -> Pass:
    return Pass(
        kind="timed", repeat=0, started_at=0.0, e2e_s=rows[0][-1], input_tokens=8,
        token_s=rows, step_s=rows[0], drafted=drafted,
    )  # fmt: skip


def test_tokens_of_one_step_share_a_stamp_and_no_gap_lies_between_them() -> None:
    """1 token of the prompt's pass, then 3, 1 and 2."""
    one = _timed(((1.0, 1.5, 1.5, 1.5, 2.5, 4.5, 4.5),), Drafted(steps=3, proposed=6, accepted=3))
    got = figures(Measurement(passes=(one,)), output_tokens=7)
    assert (got["itl_s"], got["itl_p99_s"]) == (1.0, 2.0)
    assert got["tpot_s"] == pytest.approx(3.5 / 6)
    assert (got["acceptance_rate"], got["accepted_length"]) == (0.5, 2.0)
    rows = ((1.0, 2.0),)
    nothing = figures(Measurement(passes=(_timed(rows, None),)), output_tokens=2)
    assert "acceptance_rate" not in nothing
    none = Drafted(steps=0, proposed=0, accepted=0)  # no n-gram came twice
    assert "acceptance_rate" not in figures(
        Measurement(passes=(_timed(rows, none),)), output_tokens=2
    )


def test_ratios_are_those_of_sums_over_timed_passes() -> None:
    passes = [
        _timed(((1.0, 2.0),), Drafted(steps=1, proposed=4, accepted=4)),
        _timed(((1.0, 2.0),), Drafted(steps=4, proposed=16, accepted=0)),
    ]
    warm = replace(passes[0], kind="warmup")
    got = figures(Measurement(passes=(warm, *passes)), output_tokens=2)
    assert (got["acceptance_rate"], got["accepted_length"]) == (4 / 20, 1 + 4 / 5)


def test_records_and_samples_tell_of_the_draft() -> None:
    trial = _trial("mixtral-8x7b", "ngram", weights="dummy", tokens=3)
    ticket = Ticket(trial=trial, trial_id="t")
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=(ticket,))
    (row,) = recorder.failed(job, ticket, Crashed("x")).to_pylist()
    assert (row["speculative"], row["draft_tokens"], row["acceptance_rate"]) == ("ngram", 3, None)
    drafted = Drafted(steps=2, proposed=6, accepted=5)
    passes = (_timed(((1.0, 2.0),), drafted), _timed(((1.0, 2.0),), None))
    one, other = recorder.samples(job, ticket, Measurement(passes=passes)).to_pylist()
    assert (one["draft_steps"], one["draft_tokens"], one["draft_accepted"]) == (2, 6, 5)
    assert other["draft_steps"] is None


def test_a_draft_model_keeps_a_slot_of_the_token_budget() -> None:
    workload = replace(Trial(model=Model(name="x")).workload, batch_size=16, input_tokens=128)

    def budget(**speculative: Any) -> object:
        trial = _trial("qwen3-30b-a3b", **speculative)
        return cuda_economy(trial, [workload])["max_num_batched_tokens"]

    assert budget(draft="qwen3-0.6b") == 4096  # 16 x 129 tokens
    assert budget(draft="ngram") == 2048


VOCABULARY = (
    "1 validation error for SpeculativeConfig\n  Value error, Target and draft model should have "
    "the same vocabulary size. Target model vocab_size=49152. Draft model vocab_size=32000. Using "
    "models with different tokenizers can cause out-of-bounds errors during speculative decoding."
)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_vocabularies_that_only_the_engine_could_compare(
    kind: Callable[[str], Exception],
) -> None:
    found = explain(kind(VOCABULARY), stage="load", device_is_cpu=True)
    assert isinstance(found, Infeasible) and "vocab_size=32000" in str(found)
