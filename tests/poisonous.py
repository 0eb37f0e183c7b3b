"""An engine whose failures outlive it in its process, as those of a CUDA context do."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from workers.contract.errors import Crashed, TrialError
from workers.contract.measurement import Pass
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.roofline_engine import RooflineEngine

ABORT, ILLEGAL, EXHAUSTED, UNBUILDABLE = 1009, 1013, 1019, 1021
"""Prompt lengths: of one whose engine ends the process while it is built, of a pass that breaks the
process, of one whose engine prints that memory ran out, and from which on no engine can be
built."""


class Poisonous(RooflineEngine):
    """Predicts, and breaks where it is told to."""

    broken: TrialError | None = None

    def __init__(self, trial: Trial, workloads: Sequence[Workload], site: Site) -> None:
        self._check()
        print(f"engine of process {os.getpid()}", flush=True)
        longest = max(one.input_tokens for one in workloads)
        if longest >= UNBUILDABLE:
            raise Crashed(f"invalid device function at 0x{id(self):x} in process {os.getpid()}")
        if longest == EXHAUSTED:
            print("Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory.")
            raise Crashed("which somebody has handled")
        if longest == ABORT:
            os.kill(os.getpid(), signal.SIGABRT)
        super().__init__(trial, workloads, site)

    def generate(self, prompts: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Pass:
        self._check()
        if len(prompts[0]) == ILLEGAL:
            type(self).broken = Crashed("CUDA error: an illegal memory access was encountered")
        self._check()
        return super().generate(prompts, *args, **kwargs)

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken
