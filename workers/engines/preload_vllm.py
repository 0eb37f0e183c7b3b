"""Imports vLLM on being imported: what a fork server loads before it forks engines.

multiprocessing's fork server can only be told modules, so this one exists to be named. A failure
does not end the server: it is printed, `VllmEngine` remembers it, and every engine that is built in
a fork raises it again. An import that uses CUDA is such a failure: CUDA would fail in every fork,
in words that name no import.

No garbage is looked for meanwhile, which takes a quarter of the time, and what is imported is
put out of the collector's sight for good: forks share its pages and pass over it.
"""

import gc
import traceback

from workers.contract.errors import TrialError
from workers.engines.vllm_engine import VllmEngine

gc.disable()
try:
    VllmEngine.prepare()
    VllmEngine.check_forkable()
except TrialError:
    traceback.print_exc()
gc.freeze()
gc.enable()
