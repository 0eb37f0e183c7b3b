"""Many engines in one process, without a walk through all imports for each of them.

vLLM looks for garbage about ten times while it builds and closes an engine, takes what is left from
the collector's sight when the engine is ready, and puts it back when the engine ends. In a process
of its own that is little. Here the modules of torch, transformers and vLLM are a million objects
that every engine would look through again: 4 s of the 4.5 s that a tiny one takes. They are put out
of sight for good, and engines stay in sight.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

_freeze = gc.freeze


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_sight() -> Iterator[None]:
    from workers.engines.vllm_engine import VllmEngine

    VllmEngine.prepare()
    gc.collect()  # what the module before left of its engines
    _freeze()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        yield
