"""What the hub's cache lacks is fetched, or missed in one line that says what to do.

The hub here is a server of this test on this machine; whoever asks it is a process of its own,
since `huggingface_hub` reads the environment once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.hub import OTHER, TINY, add
from workers.contract.errors import Crashed
from workers.engines import hub_files

COMMIT = "3" * 40
FILES = {
    "config.json": json.dumps(dict(TINY)),
    "tokenizer.json": "{}",
    "model.safetensors": "weights",
    "consolidated.safetensors": "the same",
    "pytorch_model.bin": "again",
    "original/params.json": "{}",
}
ASK = """
import json, sys
from workers.contract.errors import Crashed
from workers.engines import hub_files
hub_files.ANSWER_S = 1.0
for name, revision, need in json.load(sys.stdin):
    try:
        found = hub_files.folder(name, revision, need)
        print(json.dumps(sorted(one.name for one in found.iterdir())))
    except Crashed as error:
        print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download takes."""

    silent = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/made/slow" in path:
            self.silent.wait(20)
        elif "/made/gated" in path:
            self._answer(403, "", {"X-Error-Code": "GatedRepo"})
        elif "/made/none" in path:
            self._answer(401, "", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/v9" in path:
            self._answer(404, "", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            listed = [
                {"type": "file", "path": name, "size": len(text), "oid": name}
                for name, text in FILES.items()
            ]
            self._answer(200, json.dumps(listed))
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            told = {"id": "made/tiny", "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(told))
        else:
            text = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
            self._answer(200, text, {"ETag": f'"{path}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Hub.silent.set()
    server.shutdown()
    server.server_close()


def ask(endpoint: str, cache: Path, *asked: tuple[str, str | None, str]) -> list[str | list[str]]:
    """What a process that may ask that hub gets: names of files, or the reason."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.lengthy
def test_the_hub_is_asked_once_and_for_a_while(endpoint: str, tmp_path: Path) -> None:
    config, whole, kept, gated, none, revision, slow = ask(
        endpoint,
        tmp_path,
        ("made/tiny", None, "config"),
        ("made/tiny", None, "weights"),
        ("made/tiny", COMMIT, "weights"),
        ("made/gated", None, "weights"),
        ("made/none", None, "config"),
        ("made/tiny", "v9", "config"),
        ("made/slow", None, "config"),
    )
    assert config == ["config.json", "tokenizer.json"]
    assert whole == kept == ["config.json", "model.safetensors", "tokenizer.json"]
    assert gated == "made/gated is gated: accept its terms on the hub, and set HF_TOKEN"
    assert str(none).startswith("the hub has no made/none, or it is private: correct model.name")
    assert revision == "the hub has no revision v9 of made/tiny: correct model.revision"
    assert "could not be asked (ReadTimeout" in slow and "'hf download made/slow'" in slow
    assert str(tmp_path) in slow and not any("\n" in one for one in (gated, none, revision, slow))


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    """What the cache has whole needs none."""
    add(tmp_path, "made/tiny", COMMIT, {"config.json": TINY, "model.safetensors": "weights"})
    whole, torn = ask(
        "http://127.0.0.1:9",
        tmp_path,
        ("made/tiny", None, "weights"),
        ("made/tiny", None, "tokenizer"),
    )
    assert whole == ["config.json", "model.safetensors"]
    assert "could not be asked (ConnectError" in torn
    assert "does not hold all of its tokenizer: fetch the rest with 'hf download made/tiny'" in torn


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        ({}, False),
        ({"model.safetensors": "w"}, True),
        ({"model-00001-of-00002.safetensors": "w"}, False),
        ({f"model-0000{i}-of-00002.safetensors": "w" for i in (1, 2)}, True),
        (
            {
                "a.safetensors": "w",
                "model.safetensors.index.json": {"weight_map": {"x": "a.safetensors"}},
            },
            True,
        ),
        (
            {
                "a.safetensors": "w",
                "model.safetensors.index.json": {"weight_map": {"x": "b.safetensors"}},
            },
            False,
        ),
        ({"a.safetensors": "w", "model.safetensors.index.json": "no JSON"}, False),
        ({"pytorch_model.bin": "w"}, True),
    ],
)
def test_offline_a_torn_download_is_no_checkpoint(
    files: dict[str, str], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = add(tmp_path, "made/tiny", COMMIT, {"config.json": OTHER, **files}, refs=("v2",))
    assert hub_files.folder("made/tiny", "v2", "config") == found
    if whole:
        assert hub_files.folder("made/tiny", "v2") == found
    else:
        with pytest.raises(Crashed, match=r"all of its weights: .*--revision v2'.*HF_HUB_OFFLINE"):
            hub_files.folder("made/tiny", "v2")
    with pytest.raises(Crashed, match="which has of it v2"):
        hub_files.folder("made/tiny")


def test_code_of_its_own_is_needed_where_it_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = TINY | {"auto_map": {"AutoConfig": "theirs.C", "AutoModel": "who/else--other.M"}}
    found = add(tmp_path, "made/coded", COMMIT, {"config.json": config})
    assert hub_files.folder("made/coded", None, "config") == found
    with pytest.raises(Crashed):
        hub_files.folder("made/coded", None, "config", code=True)
    add(tmp_path, "made/coded", COMMIT, {"theirs.py": ""})
    assert hub_files.folder("made/coded", None, "config", code=True) == found
