"""Descriptors 1 and 2 lead to a file during a run, and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys
from pathlib import Path
from orchestrator.streams import diverted
print("before")
with diverted(Path(sys.argv[1])) as terminal:
    os.system("echo from a child; echo and its error >&2")
    print("python's own")
    os.write(2, b"C library\\n")
    terminal.write("table\\n")
print("after")
"""


def test_only_the_terminal_reaches_standard_output(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "driver.log"
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(log)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "before\ntable\nafter\n"
    assert done.stderr == ""
    logged = log.read_text()
    for line in ("from a child", "and its error", "python's own", "C library"):
        assert line in logged
