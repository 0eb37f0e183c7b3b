"""An engine gets the cores of its process, not the one that the last engine bound a thread to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

CODE = """
import os
from workers.contract.layout import Layout
from workers.engines.vllm_engine import _bind_threads

def told(tensor):
    _bind_threads(Layout(tensor=tensor))
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND"), os.environ["OMP_NUM_THREADS"]

cores = sorted(os.sched_getaffinity(0))
first = told(1), told(len(cores))
os.sched_setaffinity(0, cores[-1:])  # as vLLM leaves the thread that built an engine
assert (told(1), told(len(cores))) == first
assert sorted(os.sched_getaffinity(0)) == cores
assert first[0] == (",".join(map(str, cores)), str(len(cores)))
assert first[1] == ("|".join(map(str, cores)), "1")
"""


def test_a_second_engine_of_a_process_gets_all_its_cores() -> None:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
