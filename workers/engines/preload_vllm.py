"""Imports vLLM on being imported: what a fork server loads before it forks engines.

multiprocessing's fork server can only be told modules, so this one exists to be named. A
failure is kept quiet here: the engine that is built in a fork meets it again and records it.
"""

import contextlib

from workers.engines.vllm_engine import VllmEngine

with contextlib.suppress(Exception):
    VllmEngine.prepare()
