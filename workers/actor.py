"""A process that owns one engine at a time and stays warm between them.

Ray gives the process exactly the devices of a layout. It pays the engine's imports once,
then builds engine after engine as groups come, and streams a message for every stage and
a record for every trial. What the engine prints goes to a file per group (on other nodes,
to Ray's log of this process): the driver's table stays clean, and the cause of a death can
be read after it.

Ray puts each worker in a process group of its own and kills the group with it, so engine
ranks never outlive their actor. `max_restarts` is 0: whether a retry can mend a death is
the driver's decision.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from workers import memory, runner
from workers.contract.engine import EngineKind
from workers.contract.errors import TrialError
from workers.contract.job import Job
from workers.contract.message import Message, Released
from workers.engines.base import engine_class
from workers.hardware.host import Host, cores, describe, gpu_memory_used

CLEAN_BYTES = 256 * 2**20
"""Growth of the idle process, over its first idle state, that still counts as clean: the
code, thread pools and allocator arenas that the first engine leaves behind."""
GPU_WAIT_S = 60.0
"""Wait for memory of an earlier process to leave a GPU, seconds."""


@ray.remote(max_restarts=0, max_task_retries=0)
class EngineHost:
    """Owner of engines on the devices that Ray gave to this process."""

    def __init__(self) -> None:
        cores()  # remembers the cores before an engine binds threads to some of them
        self._idle_bytes: int | None = None

    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return os.getpid()

    def devices(self) -> str:
        """Devices that Ray gave to this process, as `CUDA_VISIBLE_DEVICES` lists them."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def prepare(self, kind: EngineKind) -> None:
        """Imports an engine ahead of the first group, which then starts with its load.

        Imports take all of a core for seconds: not beside a measurement on the same cores.
        """
        if self._idle_bytes is None:
            with contextlib.suppress(TrialError):  # the runner meets it again and records it
                engine_class(kind).prepare()
            memory.trim()
            self._idle_bytes = memory.status("VmRSS")

    def run(self, job: Job) -> Iterator[Message]:
        """Measures a group; see `workers.runner.run`. Ends with `Released`."""
        if job.log is not None:
            _log_to(job.log)
        _wait_for_gpus()
        self.prepare(job.tickets[0].trial.engine.kind)
        yield from runner.run(job)
        yield self._released()

    def _released(self) -> Released:
        assert self._idle_bytes is not None
        grown = memory.status("VmRSS") - self._idle_bytes
        left = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
        problems = []
        if left:
            problems.append(f"{len(left)} processes are still alive")
        if grown > CLEAN_BYTES:
            problems.append(f"{grown / 2**20:.0f} MiB more than when idle")
        problems += _held_on_gpu()
        return Released(clean=not problems, detail="; ".join(problems))


@ray.remote(num_cpus=0, max_retries=0)
def describe_node() -> Host:
    """The machine that Ray runs this on."""
    return describe()


def _wait_for_gpus() -> None:
    """Waits until nobody else's memory is on this process's GPUs.

    Ray grants a device again when its last process is dead, which can be before the driver
    has taken the memory back. Memory that stays is left to the engine to refuse, in its own
    words.
    """
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    torch = sys.modules.get("torch")
    if not visible or (torch is not None and torch.cuda.is_initialized()):
        return
    deadline = time.monotonic() + GPU_WAIT_S
    while any(gpu_memory_used(one) > CLEAN_BYTES for one in visible):
        if time.monotonic() > deadline:
            print(f"after {GPU_WAIT_S:.0f} s memory is still in use on GPU {visible}")
            return
        time.sleep(0.5)


def _held_on_gpu() -> list[str]:
    """What this process still holds on its GPUs beyond an empty CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    return [f"{held / 2**20:.0f} MiB still reserved on the GPU"] if held > CLEAN_BYTES else []


def _log_to(path: str) -> None:
    """Sends file descriptors 1 and 2, and with them every library's output, to a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
