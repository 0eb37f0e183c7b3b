"""Engines in processes that are forked from one that has their imports done.

Importing an engine takes a core for six seconds, and an engine that has run leaves threads,
allocator arenas and, after an abort, nothing at all. So a host imports once, into a process
that does nothing else, touches no device and sleeps until it is asked (multiprocessing's fork
server). Every engine gets a fork of it: ready in milliseconds, as clean as the first, and when
it ends the operating system takes everything back, a CUDA context that an illegal access has
broken too. The next engine's process is there while this one measures, and costs it nothing.

Devices are named to a fork when it is made, so one server serves groups of any layout. An
engine that Ray places over several nodes has to run in a process of Ray's own, not here.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil

from workers import memory, nursery, runner
from workers.contract.engine import EngineKind
from workers.contract.errors import Crashed, TimedOut, TrialError
from workers.contract.job import Job
from workers.contract.message import Finished, Message, Progress, Stage
from workers.contract.outcome import OomStage
from workers.engines.base import Site
from workers.failures import of_death
from workers.hardware import nvml
from workers.packing import Rehearsal
from workers.patience import patience_s

PRELOAD: dict[EngineKind, str] = {"vllm": "workers.engines.preload_vllm"}
"""What the fork server imports for an engine. One that is not here only computes: it holds no
device, leaves nothing behind, and needs no process of its own."""
EXIT_S = 20.0
"""Wait for a fork that has said its last to end, seconds."""
BEGINS = "--- an engine begins"
"""Line of a log: what stands before it was printed by others."""
LOG_TAIL = 256 * 1024
"""Bytes at the end of a log in which a cause is looked for."""


def preloads(kinds: Sequence[EngineKind]) -> list[str]:
    """The modules of engines that run in forks."""
    return [PRELOAD[one] for one in kinds if one in PRELOAD]


class Forks:
    """The forks of one host, one at a time.

    Args:
        kinds: engines to import.
        nursery: socket of a process on this machine that imports them (`workers.nursery`); null
            if there is none.
    """

    def __init__(self, kinds: Sequence[EngineKind], nursery: str | None = None) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._preload = preloads(kinds)
        self._context.set_forkserver_preload(self._preload)
        self._nursery = nursery
        self._shared: set[Path] = set()
        self._own: set[int] = set()
        self._rehearsal: tuple[Any, Connection] | None = None

    def prepare(self) -> None:
        """Returns when the imports are done and a fork can be had at once."""
        if self._preload:
            self._start()

    def _start(self) -> None:
        if self._own:
            return
        if self._nursery is not None:
            try:
                nursery.adopt(self._nursery)
            except OSError as error:
                print(f"imports are done here, for there is no nursery: {error}", flush=True)
        with _findable(), _without_main():
            forkserver.ensure_running()
            first = self._context.Process(target=_nothing)
            first.start()
        first.join()
        self._own = family()

    def run(self, job: Job, devices: str | None) -> Iterator[Message]:
        """Measures on one engine in a fork; see `workers.runner.one_engine`. The fork is gone at
        the end, and so are the engine's ranks.

        Args:
            job: the tickets.
            devices: what `CUDA_VISIBLE_DEVICES` says; null where there is no GPU.

        Raises:
            EngineDied: before the engine was done, or because it was silent for too long
                (`workers.patience`).
        """
        fork, receiver = self._fork(_measure, job, devices)
        kills = memory.kernel_kills()
        stage: Stage = "load"
        trial_id = None
        left = {ticket.trial_id for ticket in job.tickets}
        error: TrialError | None = None
        ended = False
        try:
            while True:
                wait_s = patience_s(job, stage, trial_id)
                if not receiver.poll(wait_s):
                    error = silent(stage, wait_s)
                    break
                try:
                    message: Message | None = receiver.recv()
                except (EOFError, OSError):  # killed, perhaps in the middle of a message
                    break
                if message is None:
                    ended = True
                    break
                if isinstance(message, Progress):
                    if stage == "load":  # it is built: what it shares is there
                        self._shared |= memory.shared_segments(fork.pid or 0)
                    stage, trial_id = message.stage, message.trial_id
                elif isinstance(message, Finished):
                    left.discard(message.trial_id)
                    trial_id = None
                yield message
            if error is None:
                fork.join(EXIT_S)
        finally:
            receiver.close()
            self.end(fork)
        if ended:
            return
        error = error or _cause(job, devices, stage, fork.exitcode, kills)
        if stage == "load" and isinstance(error, Crashed):
            rest = tuple(one for one in job.tickets if one.trial_id in left)
            yield from runner.unbuilt(replace(job, tickets=rest), error)
        elif stage == "load" or trial_id is not None:
            raise EngineDied(error, trial_id)
        else:
            print(f"an engine ended between two trials: {error}", flush=True)

    def rehearse(self, job: Job, devices: str | None, wait_s: float) -> None:
        """Builds an engine in a fork that waits to be asked for passes; see
        `workers.packing.Rehearsal`.

        Raises:
            TrialError: it could not be built.
        """
        self._rehearsal = self._fork(_rehearse, job, devices)
        self._answer(wait_s)

    def passes(self, wait_s: float) -> list[float]:
        """Times of passes of the engine that was built last, in seconds.

        Raises:
            TrialError: a pass failed.
        """
        assert self._rehearsal is not None, "no engine was built"
        self._rehearsal[1].send(None)
        found: list[float] = self._answer(wait_s)
        return found

    def end_rehearsal(self) -> None:
        """Ends that engine, if there is one."""
        if self._rehearsal is not None:
            fork, connection = self._rehearsal
            connection.close()
            fork.join(EXIT_S)
            self.end(fork)
            self._rehearsal = None

    def _answer(self, wait_s: float) -> Any:
        assert self._rehearsal is not None
        fork, connection = self._rehearsal
        self._shared |= memory.shared_segments(fork.pid or 0)
        if not connection.poll(wait_s):
            raise TimedOut(f"an engine said nothing for {wait_s:.0f} s")
        try:
            answer = connection.recv()
        except (EOFError, OSError):
            raise Crashed("the engine's process died") from None
        if isinstance(answer, TrialError):
            raise answer
        self._shared |= memory.shared_segments(fork.pid or 0)
        return answer

    def _fork(self, target: Any, job: Job, devices: str | None) -> tuple[Any, Connection]:
        """A fork that does `target`, and our end of its pipe."""
        self._start()
        ours, theirs = self._context.Pipe()
        fork: Any = self._context.Process(target=target, args=(theirs, job, devices))
        try:
            with _without_main():
                fork.start()
        except (OSError, EOFError):  # the server was killed: another one is as good
            self._own = set()
            self._start()
            fork = self._context.Process(target=target, args=(theirs, job, devices))
            with _without_main():
                fork.start()
        theirs.close()
        return fork, ours

    def end(self, fork: Any) -> None:
        """Kills a fork and all that it started, and removes the shared memory they held."""
        if fork.is_alive():
            fork.kill()
        fork.join()
        for pid in family() - self._own:
            with contextlib.suppress(psutil.Error):  # what does not go is a survivor
                one = psutil.Process(pid)
                one.kill()
                one.wait(EXIT_S)
        for segment in self._shared:
            segment.unlink(missing_ok=True)
        self._shared.clear()

    def survivors(self) -> int:
        """Processes that should be gone and are not."""
        return len(family() - self._own)


class EngineDied(Exception):
    """A fork ended before its group."""

    def __init__(self, error: TrialError, trial_id: str | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.trial_id = trial_id
        """Trial in hand; null while the engine was built or closed."""


def _measure(sender: Connection, job: Job, devices: str | None) -> None:
    """What the fork of an engine does: it says all messages, and then null."""
    _settle(job, devices)

    def tell(message: Message | None) -> None:
        try:
            sender.send(message)
        except ConnectionError:  # nobody hears it any more
            _end_with_host()

    alone = job.tickets[0].trial.layout.devices == 1
    for message in runner.one_engine(job):
        tell(message)
        if isinstance(message, Progress) and message.stage == "close" and alone:
            break  # there is nothing to take down that does not go with the process
    tell(None)
    sender.close()
    _leave()


def _rehearse(connection: Connection, job: Job, devices: str | None) -> None:
    """What a fork does that is asked for passes until its pipe is closed."""
    _settle(job, devices)
    rehearsal: Rehearsal | None = None
    try:
        scratch = Path(tempfile.gettempdir())
        rehearsal = Rehearsal(job, Site(scratch=scratch, device=job.profile))
        connection.send("built")
        while True:
            connection.recv()
            connection.send(rehearsal.passes())
    except TrialError as error:
        connection.send(error.with_traceback(None))
    except EOFError:
        pass  # nobody asks any more
    if rehearsal is not None:
        rehearsal.close()
    _leave()


def _leave() -> None:
    """Ends a fork. Semaphores of an engine that was not closed, or could not be built, would
    outlive it."""
    for segment in memory.shared_segments(os.getpid()):
        segment.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _settle(job: Job, devices: str | None) -> None:
    """Gives a fork its devices, its log, its place for temporary files, its tracker, and its
    host's end for its own."""
    threading.Thread(target=_end_with_host, daemon=True).start()
    if job.log is not None:
        log_to(job.log)
        print(BEGINS, flush=True)
    if devices is not None:
        os.environ.update(nvml.ORDER | {nvml.VISIBLE: devices})
    if job.scratch is not None:
        tempfile.tempdir = os.environ["TMPDIR"] = job.scratch
    _track_apart()


def _track_apart() -> None:
    """Starts multiprocessing's resource tracker for this fork alone, in a process group of its
    own. It is told of every semaphore and shared memory that the fork and its ranks make,
    waits until none of them lives, however they died, removes what they left, and ends."""
    tracker: Any = resource_tracker._resource_tracker
    os.close(tracker._fd)
    tracker._fd = tracker._pid = None
    group = os.getpgrp()
    os.setpgid(0, 0)
    try:
        resource_tracker.ensure_running()
    finally:
        os.setpgid(0, group)


def _end_with_host() -> NoReturn:
    """Ends this fork and its ranks as soon as the host is gone.

    Ray ends a host with all its processes. But who kills the driver of a Ray of its own kills the
    raylet with it; then the host ends by itself, and a fork would hear of it only when it next
    sends a message: after a pass that may last for an hour, or never.
    """
    host = multiprocessing.parent_process()
    assert host is not None, "this is a fork"
    host.join()
    segments = memory.shared_segments(os.getpid())
    for rank in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            rank.kill()
    for segment in segments:
        segment.unlink(missing_ok=True)
    os._exit(1)


def silent(stage: Stage, seconds: float) -> TimedOut:
    """The end of an engine that is taken to hang."""
    what = "the trial" if stage in ("warmup", "run") else "building the engine"
    return TimedOut(f"{what} said nothing for {seconds:.0f} s")


def oom_stage(stage: str) -> OomStage:
    """Where memory ran out, if it did so in a stage of a host."""
    return "load" if stage == "load" else "warmup" if stage == "warmup" else "run"


def _cause(job: Job, devices: str | None, stage: str, code: int | None, kills: int) -> TrialError:
    """Why a fork ended too soon."""
    return of_death(
        "the engine's process",
        code,
        of_last_engine(tail(job.log)),
        stage=oom_stage(stage),
        kernel_killed=memory.kernel_kills() > kills,
        limited=any(ticket.trial.engine.memory_limit_gib for ticket in job.tickets),
        device_is_cpu=devices is None,
    )


def tail(log: str | None) -> str:
    """The end of a log, in whole lines; empty where there is none."""
    if log is None:
        return ""
    try:
        with Path(log).open("rb") as file:
            if file.seek(max(0, file.seek(0, 2) - LOG_TAIL)):
                file.readline()  # half of a secret would not be known for one
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def of_last_engine(log: str) -> str:
    """What the last engine of a group has printed."""
    return log.rpartition(f"{BEGINS}\n")[2]


def _nothing() -> None:
    """The first fork: that it ends says that the server has imported everything."""


def family() -> set[int]:
    """Processes below this one, and those of its process group whose parents are gone.

    Ray makes every worker the leader of a group, and orphans stay in it.
    """
    found = {one.pid for one in psutil.Process().children(recursive=True)}
    if os.getpgrp() == os.getpid():
        found |= members(os.getpid())
    return found - {os.getpid()}


def members(group: int) -> set[int]:
    """Processes of a process group on this machine."""
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(pid) == group:
                found.add(pid)
    return found


@contextmanager
def _findable() -> Iterator[None]:
    """Lets a new interpreter find what this one can import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _without_main() -> Iterator[None]:
    """Forks, and ranks that they start, do not run this process's main file again: in a
    worker of Ray that is Ray's own."""
    main = vars(sys.modules["__main__"])
    name = main.pop("__file__", None)
    try:
        yield
    finally:
        if name is not None:
            main["__file__"] = name


def log_to(path: str) -> None:
    """Sends file descriptors 1 and 2, and with them every library's output, to a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):  # no line of a library's ends an engine by its letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
