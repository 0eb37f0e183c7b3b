"""A first failure is the one that is told, though a second try says something else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.contract.errors import Crashed, TrialError, Unsupported
from workers.engines import vllm_engine
from workers.engines.vllm_engine import ENVIRONMENT, VllmEngine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "to be put back afterwards")
    monkeypatch.setattr(VllmEngine, "_refused", None)


@pytest.mark.parametrize(
    ("first", "kind", "words"),
    [
        (OSError(30, "Read-only file system"), Crashed, "OSError: [Errno 30] Read-only"),
        (ImportError("libX.so: no such file"), Unsupported, "ImportError: libX.so"),
    ],
)
def test_an_import_that_failed_is_not_tried_again(
    first: Exception, kind: type[TrialError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter((first, RuntimeError("operator is registered twice")))

    def fail(_: str) -> None:
        raise next(tries)

    monkeypatch.setattr(vllm_engine, "import_module", fail)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            VllmEngine.prepare()
        assert str(caught.value).startswith("vLLM cannot be imported: ")
        assert words in str(caught.value)


def test_what_a_fork_server_could_not_import_is_printed_and_remembered(tmp_path: Path) -> None:
    """In a process of its own, with a vLLM that fails once and then in other words."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(
        "import builtins\n"
        "words = getattr(builtins, 'words', 'the first cause')\n"
        "builtins.words = 'the second'\n"
        "raise OSError(words)\n"
    )
    code = (
        "import workers.engines.preload_vllm\n"
        "from workers.engines.vllm_engine import VllmEngine\n"
        "try:\n    VllmEngine.prepare()\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "vLLM cannot be imported: OSError: the first cause\n"
    assert "OSError: the first cause" in done.stderr
