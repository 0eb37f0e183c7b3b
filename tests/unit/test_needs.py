"""What a sweep names and the machine must have: found before anything starts, with its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import SweepError
from orchestrator.grid import expand
from orchestrator.needs import Absent, absent, notes, refuse
from orchestrator.plan import own_dimensions
from orchestrator.request import local_profile
from orchestrator.sweep import load
from workers.moe.small import RESERVED, SMALL

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """\
name: s
base:
  model: {name: mixtral-8x7b, weights: dummy}
  workload: {dataset: builtin}
cases:
  - {}
  - engine.speculative: {model: ngram}
"""
MISSING = {
    "a folder": ("name: mixtral-8x7b", "name: models/x", "s.yaml:3: base.model.name: there is no"),
    "a small model": ("mixtral-8x7b", "models/smollm2-4x", "make small-models makes it"),
    "a draft": (
        "model: ngram",
        "model: models/smollm2",
        "s.yaml:7: cases[1].engine.speculative.model: there is no folder models/smollm2",
    ),
    "a text": ("builtin", "my.jsonl", "s.yaml:4: base.workload.dataset: there is no file my.jsonl"),
    "a kind of text": ("builtin", "my.doc", "base.workload.dataset: text my.doc: neither"),
    "a part of a text": ("builtin", '"builtin:poems"', "no register or language 'poems'"),
    "a tokenizer": (
        "cases:",
        "  engine.args: {tokenizer: ./tok}\ncases:",
        "there is no ./tok on this machine",
    ),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def _absent(text: str) -> tuple[Absent, ...]:
    path = Path("s.yaml")
    path.write_text(text)
    sweep = load(path)
    return absent(sweep, expand(sweep, own_dimensions).points)


@pytest.mark.parametrize("case", MISSING)
def test_what_is_certainly_missing_is_refused_at_its_place(case: str) -> None:
    before, after, words = MISSING[case]
    assert before in SWEEP
    found = _absent(SWEEP.replace(before, after))
    with pytest.raises(SweepError) as refused:
        refuse(found)
    assert words in str(refused.value)
    assert notes(found, here=True) == []
    assert words in notes(found, here=False)[0]


def test_nothing_is_missing_of_what_is_there() -> None:
    assert _absent(SWEEP) == ()
    Path("models/x").mkdir(parents=True)
    Path("my.txt").write_text("a text")
    assert _absent(SWEEP.replace("mixtral-8x7b", "models/x").replace("builtin", "my.txt")) == ()


def test_a_name_with_one_slash_may_be_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SWEEP.replace("mixtral-8x7b", "owner/model")
    found = _absent(text)
    refuse(found)
    (note,) = notes(found, here=True)
    assert "no folder here and not in the hub cache" in note and "if a folder is meant" in note
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SweepError, match=r"s.yaml:3: base.model.name: owner/model is not in the"):
        refuse(_absent(text))
    Path("hub/models--owner--model/snapshots/c0ffee").mkdir(parents=True)
    refs = Path("hub/models--owner--model/refs")
    refs.mkdir()
    (refs / "main").write_text("c0ffee")
    assert _absent(text) == ()


def test_checkpoints_of_the_catalogue_are_missed_offline_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = SWEEP.replace("weights: dummy", "weights: checkpoint")
    assert _absent(text) == ()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SweepError, match=r"mixtral-8x7b: mistralai/Mixtral-8x7B"):
        refuse(_absent(text))
    assert _absent(text.replace("cases:", "  engine.kind: roofline\ncases:")) == ()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_small_models_of_every_sweep_can_be_made(path: Path) -> None:
    """And no study of this project starts without what it needs."""
    named = {word.strip("{}[],") for word in path.read_text().split() if word.startswith(RESERVED)}
    assert named <= SMALL.keys()
    sweep = load(path)
    found = absent(sweep, expand(sweep, own_dimensions).points)
    assert all("make small-models" in one.reason for one in found)
    assert {one for one in SMALL for told in found if f" {one} " in told.reason} == named


@pytest.mark.lengthy
@pytest.mark.skipif(local_profile() != "cpu", reason="the small models are the CPU profile's")
@pytest.mark.parametrize("arguments", [["--dry-run"], ["--json"]])
def test_the_command_line_ends_with_status_2_before_anything_starts(arguments: list[str]) -> None:
    path = str(ROOT / "sweeps" / "activation.yaml")
    done = _orchestrator(path, "--address", "local", *arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert "activation.yaml:22: profiles.cpu.base.model.name: there is no folder" in line
    assert line.endswith("make small-models makes it")
    assert not Path("results").exists()


@pytest.mark.lengthy
def test_a_dry_run_plans_what_a_first_run_would_do() -> None:
    path = str(ROOT / "sweeps" / "hparam.yaml")
    done = _orchestrator(path, "--dry-run", "--profile", "cpu", "--limit", "8")
    assert done.returncode == 0, done.stderr
    assert b"64 points, 8 trials, 2 engines" in done.stdout


def _orchestrator(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )
