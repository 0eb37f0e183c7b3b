"""Imports vLLM on being imported: what a fork server loads before it forks engines.

multiprocessing's fork server can only be told modules, so this one exists to be named. A
failure is kept quiet here: the engine that is built in a fork meets it again and records it.

No garbage is looked for meanwhile, which takes a quarter of the time, and what is imported is
put out of the collector's sight for good: forks share its pages and pass over it.
"""

import contextlib
import gc

from workers.engines.vllm_engine import VllmEngine

gc.disable()
with contextlib.suppress(Exception):
    VllmEngine.prepare()
gc.freeze()
gc.enable()
