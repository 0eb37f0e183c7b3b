"""Caches that cannot be written where they should be."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from workers import caches

NOWHERE = "/proc/nobody"
"""No folder can be made in /proc, whoever asks."""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*caches.NAMED, *caches.AT_HOME, "HF_HOME", caches.CACHES):
        monkeypatch.setenv(name, "to be put back afterwards")
        monkeypatch.delenv(name)


def test_a_home_that_can_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caches.ensure() is None
    assert caches.CACHES not in os.environ
    assert caches.own() == tmp_path / ".cache" / "moe-sweep"


def test_a_home_that_cannot_gives_way_to_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", NOWHERE)
    spare = tmp_path / f"moe-cache-{os.getuid()}"
    said = caches.ensure()
    assert said is not None
    assert said.startswith(f"caches go to {spare}, since {NOWHERE}/.cache cannot be written (")
    assert os.environ[caches.CACHES] == os.environ["TRITON_HOME"] == str(spare)
    assert spare.stat().st_mode & 0o777 == 0o700
    assert caches.ensure() is None, "the second time all is well"


def test_a_folder_that_others_can_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", NOWHERE)
    spare = tmp_path / f"moe-cache-{os.getuid()}"
    spare.mkdir()
    spare.chmod(0o777)
    assert caches.ensure() is not None
    used = Path(os.environ[caches.CACHES])
    assert used != spare
    assert used.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_one_library_is_moved_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_CACHE_ROOT", NOWHERE)
    said = caches.ensure()
    assert said is not None and f"{NOWHERE} (VLLM_CACHE_ROOT) cannot be written" in said
    assert os.environ["VLLM_CACHE_ROOT"].startswith(str(tmp_path / "moe-cache-"))
    assert caches.home() == tmp_path / ".cache"


def test_models_of_a_home_that_can_only_be_read_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "home" / ".cache" / "huggingface"
    hub.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    written = caches._unwritable
    monkeypatch.setattr(
        caches,
        "_unwritable",
        lambda folder: "is read-only" if folder.is_relative_to(hub.parent) else written(folder),
    )
    assert caches.ensure() is not None
    assert os.environ["HF_HOME"] == str(hub)


def test_a_user_whom_nobody_knows_has_caches_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    spare = tmp_path / f"moe-cache-{os.getuid()}"
    assert caches.own() == spare / "moe-sweep"
    with monkeypatch.context() as context:
        context.setattr(caches, "_unwritable", lambda folder: None)
        said = caches.ensure()
    assert said == f"caches go to {spare}, since ~/.cache is that of nobody: HOME is not set"
    assert os.environ[caches.CACHES] == str(spare)
