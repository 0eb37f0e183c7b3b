"""A checkpoint replaced under its name, through the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.tiny import checkpoint
from tests.integration.harness import TINY, orchestrate, records, summary, sweep_file

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=pytest.mark.slow), "roofline"])
def test_other_weights_under_one_name_are_measured_anew(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a result stands for does not depend on the engine; the slow one is a real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    checkpoint(tmp_path / "model", "mixtral")
    base = TINY["base"] | {"model": {"name": "model", "dtype": "float32"}, "engine": {"kind": kind}}
    path = sweep_file(tmp_path, base=base)
    first = summary(orchestrate(path, "--out", "out", "--json"))
    assert (first["resumed"], first["outcomes"]) == (0, {"ok": 1})

    (tmp_path / "model").rename(tmp_path / "moved")
    moved = f"base.model.name={tmp_path / 'moved'}"
    assert summary(orchestrate(path, moved, "--out", "out", "--json"))["resumed"] == 1

    checkpoint(tmp_path / "model", "mixtral", num_hidden_layers=3)
    second = summary(orchestrate(path, "--out", "out", "--json"))
    assert (second["resumed"], second["outcomes"]) == (0, {"ok": 1})
    frame = records(tmp_path / "out" / "tiny").sort("finished_at")
    assert frame["num_layers"].to_list() == [2, 3], "the first stays beside it"
    assert frame["model_digest"].n_unique() == frame["trial_id"].n_unique() == 2
    assert frame["model_digest"].null_count() == 0

    replayed = subprocess.run(
        [sys.executable, "-m", "analysis", "replay", frame["trial_id"][0], "out/tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert replayed.returncode == 2 and "num_layers 3 instead of 2" in replayed.stderr
    assert not (tmp_path / "replays").exists()
