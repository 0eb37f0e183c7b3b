"""Folders for sockets, whose paths the system bounds."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from orchestrator.cluster import RAY_SOCKET, SESSION
from workers import folders
from workers.folders import SHORT, SOCKET_BYTES, Folder, clear

LONGEST = SOCKET_BYTES - len(f"/{SESSION}12345678") - RAY_SOCKET
"""Of a place for temporary files that Ray's sockets fit into."""


def _place(length: int) -> Path:
    """A folder whose path has `length` characters; the usual ones of tests are longer."""
    root = Path(tempfile.mkdtemp(dir=SHORT, prefix="t"))
    place = root / ("d" * (length - len(str(root)) - 1))
    place.mkdir()
    return place


def test_the_place_for_temporary_files_is_used_while_sockets_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = _place(LONGEST)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    held = Folder.begin(SESSION, RAY_SOCKET)
    try:
        assert held.path.parent == place
        path = f"{held.path}/{'s' * (RAY_SOCKET - 1)}"
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path)
        assert len(path) == SOCKET_BYTES
    finally:
        held.end()
        place.rmdir()
        place.parent.rmdir()


def test_where_they_do_not_fit_a_short_folder_is_taken_and_cleared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = _place(LONGEST + 1)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(folders, "FRESH_S", -1.0)
    prefix = f"{SESSION[:-1]}x"  # as long, and of no run that goes on beside this test
    held = Folder.begin(prefix, RAY_SOCKET)
    try:
        assert held.path.parent == SHORT
        clear(prefix)
        assert held.path.is_dir(), "it is held"
    finally:
        held.end()
        place.rmdir()
        place.parent.rmdir()
    assert not held.path.exists()


def test_without_a_short_folder_the_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "d" * LONGEST)
    monkeypatch.setattr(folders, "SHORT", tmp_path / "none")
    with pytest.raises(OSError, match=rf"TMPDIR name a folder of at most {LONGEST} bytes"):
        Folder.begin(SESSION, RAY_SOCKET)
