"""A model by hub id: which snapshot it is, as `huggingface_hub` itself would find it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import OTHER, TINY, add
from workers.moe import hub

FIRST, SECOND = "1" * 40, "2" * 40
ASKED: list[tuple[str, str | None]] = [
    ("made/tiny", None),
    ("made/tiny", "main"),
    ("made/tiny", "v2"),
    ("made/tiny", "refs/pr/7"),
    ("made/tiny", FIRST),
    ("made/tiny", SECOND),
    ("made/tiny", FIRST[:7]),
    ("made/tiny", "v3"),
    ("made/torn", None),
    ("made/none", None),
]
LIBRARY = """
import importlib, json, os, sys
from huggingface_hub import constants, try_to_load_from_cache
asked, environments = json.load(sys.stdin)
for variables in environments:
    os.environ.clear()
    os.environ.update(variables)
    importlib.reload(constants)
    found = [try_to_load_from_cache(one, "config.json", revision=of) for one, of in asked]
    files = [one if isinstance(one, str) else None for one in found]
    print(json.dumps([constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, *files]))
"""
PLACES: list[tuple[dict[str, str], str]] = [
    ({"HF_HUB_CACHE": "{}/a"}, "a"),
    ({"HUGGINGFACE_HUB_CACHE": "{}/b"}, "b"),
    ({"HF_HOME": "{}/c"}, "c/hub"),
    ({"XDG_CACHE_HOME": "{}/d", "HF_HUB_OFFLINE": "yes"}, "d/huggingface/hub"),
    ({"HOME": "{}", "TRANSFORMERS_OFFLINE": "1"}, ".cache/huggingface/hub"),
    ({"HF_HOME": "$ROOT/e", "ROOT": "{}", "HF_HUB_OFFLINE": "0"}, "e/hub"),
    ({"HF_HOME": "~/f", "HOME": "{}", "HF_HUB_CACHE": "~/g"}, "g"),
]
"""What the environment says, and where the cache then is; braces stand for the test's folder."""


def fill(cache: Path) -> None:
    add(cache, "made/tiny", FIRST, {"config.json": TINY})
    add(cache, "made/tiny", SECOND, {"config.json": OTHER}, refs=("v2", "refs/pr/7"))
    (add(cache, "made/torn", FIRST, {"config.json": TINY}) / "config.json").unlink()


def test_the_library_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = [{k: v.format(tmp_path) for k, v in one.items()} for one, _ in PLACES]
    ours = []
    for variables, (_, place) in zip(environments, PLACES, strict=True):
        fill(tmp_path / place)
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", variables)
            folders = [hub.snapshot(*one) for one in ASKED]
            files = [one / "config.json" if one is not None else None for one in folders]
            there = [str(one) if one is not None and one.is_file() else None for one in files]
            ours.append([str(hub.cache_folder()), hub.offline(), *there])
        assert sum(one is not None for one in there) == 6
    library = subprocess.run(
        [sys.executable, "-c", LIBRARY],
        input=json.dumps([ASKED, environments]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ours == [json.loads(line) for line in library.stdout.splitlines()]


def test_revisions_and_what_is_said_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fill(tmp_path)
    assert hub.commit("made/tiny", "v2") == SECOND
    assert hub.revisions("made/tiny") == ("main", "refs/pr/7", "v2", FIRST, SECOND)
    said = hub.absent("made/tiny", "v3")
    assert "\n" not in said and str(tmp_path) in said and "main, refs/pr/7, v2" in said
    assert "'hf download made/tiny --revision v3'" in said and "HF_HOME" in said
    assert "which has" not in hub.absent("made/none")


@pytest.mark.parametrize(
    "revision", ["../../x", "/etc", "", ".", "a//b", "..", "\0", "refs/../../main"]
)
def test_a_revision_leads_nowhere_else(
    revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fill(tmp_path)
    (tmp_path / "models--made--tiny" / "x").mkdir()
    assert hub.commit("made/tiny", revision) == (FIRST if revision == "" else None)


@pytest.mark.parametrize(
    ("name", "whether"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", True),
        ("a/b", True),
        ("_a/b_", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./b", False),
        ("a/b--c", False),
        ("a/b..c", False),
        ("a/-b", False),
        ("a/b.git", False),
        ("a/b:Q4_K_M", False),
        ("a/" + "b" * 95, False),
        ("a/é", False),
    ],
)
def test_ids(name: str, whether: bool) -> None:
    from huggingface_hub.utils._validators import validate_repo_id

    assert hub.is_id(name) is whether
    try:
        validate_repo_id(name)
    except ValueError:
        assert not whether
