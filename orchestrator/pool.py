"""The processes behind the lanes: what the schedule commands, Ray does.

Each lane is an actor whose `run` streams messages. The pool multiplexes the streams,
watches the deadline of every lane (a process that says nothing for as long as its trial
allows is killed), and turns Ray's many ways of reporting a death into one `Lost` with a
typed cause. It decides nothing: what a death means for the trials is the schedule's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster import Cluster
from orchestrator.events import Lane, Node
from orchestrator.placement import Placement
from orchestrator.plan import Group
from workers.actor import EngineHost
from workers.contract.errors import Crashed, OutOfMemory, TimedOut, TrialError
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished, Message, Progress
from workers.contract.outcome import OomStage
from workers.failures import from_log
from workers.memory import shared_segments

GRACE_S = 30.0
"""Silence allowed beyond a trial's own deadline, for imports and for slow disks, seconds."""
LOG_TAIL = 256 * 1024
"""Bytes at the end of a log in which a cause is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A lane's process is gone."""

    error: TrialError
    trial_id: str | None
    """Trial in hand; null while the engine was built or closed."""
    retry: bool
    """The cause lies outside the trial."""


Happening = Message | Lost


class _Process:
    """One lane's actor and the group it works on."""

    def __init__(self, lane: Lane, placement: Placement) -> None:
        self.lane = lane
        self.placement = placement
        host: Any = EngineHost
        self.actor: Any = host.options(**placement.options).remote()
        self.pid: Any = self.actor.pid.remote()  # answered before the first group
        self.stream: Any = None
        self.shared: set[Path] = set()
        self.log: Path | None = None
        self.stage: str = "load"
        self.trial_id: str | None = None
        self.heard_at = time.monotonic()
        self.patience_s = 0.0

    def hear(self, message: Message) -> None:
        self.heard_at = time.monotonic()
        if isinstance(message, Progress):
            self.stage, self.trial_id = message.stage, message.trial_id
        elif isinstance(message, Finished):
            self.trial_id = None
        else:
            self.stream = None

    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at


class Pool:
    """Every lane's process."""

    def __init__(self, cluster: Cluster, *, sweep: str, run_id: str, profile: str, logs: Path):
        self._cluster = cluster
        self._names = {"sweep": sweep, "run_id": run_id, "profile": profile}
        self._logs = logs
        self._processes: dict[int, _Process] = {}

    def open(self, lane: Lane) -> None:
        """Starts a process with the lane's devices; its first messages wait for it."""
        nodes: dict[str, Node] = {node.node_id: node for node in self._cluster.nodes}
        self._processes[lane.lane_id] = _Process(lane, Placement(lane, nodes))

    def assign(self, lane_id: int, group: Group, attempts: dict[str, int]) -> None:
        """Gives a group to an idle lane."""
        process = self._processes[lane_id]
        job = self.job(group, attempts, local=process.lane.node_id == self._cluster.driver_node)
        process.log = Path(job.log) if job.log else None
        process.stage, process.trial_id = "load", None
        process.heard_at = time.monotonic()
        timeouts = [one.trial.measure.timeout_s for one in group.trials]
        process.patience_s = max(timeouts) + GRACE_S
        process.stream = process.actor.run.options(num_returns="streaming").remote(job)

    def job(self, group: Group, attempts: dict[str, int], *, local: bool) -> Job:
        """What a host is told of a group. Logs lie in the dataset where it can see it."""
        attempt = max(attempts.values())
        name = f"{group.group_id}.log" if attempt == 1 else f"{group.group_id}-{attempt}.log"
        run_id = self._names["run_id"]
        return Job(
            **self._names,
            group_id=group.group_id,
            tickets=tuple(
                Ticket(
                    trial=one.trial,
                    trial_id=one.trial_id,
                    attempt=attempts[one.trial_id],
                    axes=one.axes,
                    predicted=one.prediction.columns() if one.prediction else {},
                )
                for one in group.trials
            ),
            log=str(self._logs / run_id / name) if local else None,
            log_name=f"{self._logs.name}/{run_id}/{name}" if local else None,
            scratch=str(self._cluster.session) if local and self._cluster.session else None,
        )

    def poll(self, timeout_s: float) -> Iterator[tuple[int, Happening]]:
        """What happened, as (lane, happening); waits for the first at most `timeout_s`."""
        streams = {id(one.stream): one for one in self._processes.values() if one.stream}
        if not streams:
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(
            [one.stream for one in streams.values()],
            num_returns=len(streams),
            timeout=0,
            fetch_local=False,
        )
        if not ready:
            ready, _ = ray.wait(
                [one.stream for one in streams.values()], timeout=timeout_s, fetch_local=False
            )
        for stream in ready:
            process = streams[id(stream)]
            happening = self._next(process)
            yield process.lane.lane_id, happening
        for process in streams.values():
            if process.stream is not None and process.silent_s() > process.patience_s:
                yield process.lane.lane_id, self._overdue(process)

    def in_hand(self, node_id: str) -> tuple[str, ...]:
        """Trials that the processes on a node have begun and not ended."""
        return tuple(
            process.trial_id
            for process in self._processes.values()
            if process.trial_id is not None
            and (
                process.lane.node_id == node_id
                or any(name == node_id for name, _ in process.lane.parts)
            )
        )

    def close(self, lane_id: int) -> None:
        """Ends a lane's process and everything it started.

        A killed rank cannot remove its shared memory; where that is on this machine, it is
        removed here.
        """
        process = self._processes.pop(lane_id, None)
        if process is None:
            return
        self._note_shared(process)
        ray.kill(process.actor)
        process.placement.release()
        for segment in process.shared:
            segment.unlink(missing_ok=True)

    def close_all(self) -> None:
        """Ends every lane."""
        for lane_id in list(self._processes):
            self.close(lane_id)

    def _next(self, process: _Process) -> Happening:
        try:
            message: Message = ray.get(next(process.stream))
        except StopIteration:
            process.stream = None
            return self._lost(process, Crashed("the host ended before its group"))
        except ray.exceptions.RayError as error:
            process.stream = None
            return self._died(process, error)
        process.hear(message)
        if isinstance(message, Progress):
            self._note_shared(process)
        return message

    def _note_shared(self, process: _Process) -> None:
        """Remembers the shared memory of a lane on this machine, for when it is killed."""
        if process.lane.node_id != self._cluster.driver_node:
            return
        try:
            process.shared |= shared_segments(ray.get(process.pid, timeout=0))
        except ray.exceptions.RayError:
            return  # not started yet, or gone

    def _overdue(self, process: _Process) -> Lost:
        process.stream = None
        what = "building the engine" if process.trial_id is None else "the trial"
        return self._lost(process, TimedOut(f"{what} said nothing for {process.silent_s():.0f} s"))

    def _died(self, process: _Process, error: ray.exceptions.RayError) -> Lost:
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            cause: TrialError = OutOfMemory(
                _short(error), stage=_oom_stage(process.stage), scope="host"
            )
            return self._lost(process, cause)
        if isinstance(error, ray.exceptions.RayTaskError):
            return self._lost(process, Crashed(_short(error.cause or error)))
        node_id = process.lane.node_id
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        outside = bool(getattr(error, "preempted", False)) or (
            node_id is not None and node_id not in alive
        )
        if outside:
            return self._lost(process, Crashed(f"the node was lost: {_short(error)}"), retry=True)
        told = from_log(
            _tail(process.log), stage=_oom_stage(process.stage), device_is_cpu=self._cpu_only()
        )
        return self._lost(process, told or Crashed(f"the engine's process died: {_short(error)}"))

    def _lost(self, process: _Process, error: TrialError, *, retry: bool = False) -> Lost:
        return Lost(error=error, trial_id=process.trial_id, retry=retry)

    def _cpu_only(self) -> bool:
        return all(node.cpu_only for node in self._cluster.nodes)


def _oom_stage(stage: str) -> OomStage:
    return "load" if stage == "load" else "warmup" if stage == "warmup" else "run"


def _tail(log: Path | None) -> str:
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:500] or type(error).__name__
