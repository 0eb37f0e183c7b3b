"""The processes behind the lanes: what the schedule commands, Ray does.

A lane is a reservation of devices and a host: an actor whose `run` streams messages. Hosts
belong to a node, not to a lane: one that is no longer needed waits, its imports done, for the
next lane of any size there, and where narrower lanes are to come, hosts for them are started
ahead (`stand_by`). The pool multiplexes the streams, watches the deadline of every host, and
turns the many ways of dying into one `Lost` with a typed cause. It decides nothing: what a
death means for the trials is the schedule's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from orchestrator.carried import Carried
from orchestrator.cluster import Cluster
from orchestrator.events import Check, Inspect, Lane, nodes_of
from orchestrator.placement import Placement, on_node
from orchestrator.plan import Group
from workers.actor import EngineHost, check_packing, inspect_devices, read_log
from workers.contract.engine import EngineKind
from workers.contract.errors import Crashed, OutOfMemory, TrialError
from workers.contract.job import Job, Ticket
from workers.contract.message import Died, Finished, Message, Progress, Released, Stage
from workers.failures import from_log
from workers.forks import PRELOAD, of_last_engine, oom_stage, silent, tail
from workers.hardware.device import CPU, device
from workers.hardware.occupancy import Occupancy
from workers.memory import shared_segments
from workers.packing import Packing
from workers.patience import GRACE_S, patience_s

GATHER_S = 0.02
"""What is heard within so many seconds is heard together: a hundred records cost the disk as
much as one."""
LEAVE_S = 5.0
"""Wait for idle hosts to remove their temporary files, seconds."""
MEMORY_WAIT_S = 60.0
"""Time that a node short of memory is given before it counts as unfit, seconds."""
LOG_S = 10.0
"""Wait for a node to send what a dead host had printed, seconds."""
CHECK_POLL_S = 0.1
"""Wait between two looks at the checks of nodes, seconds."""
HOST_GRACE_S = 150.0
"""Silence allowed to a host beyond its engine's: for imports, devices that Ray grants late, and
a GPU that is slow to be free, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A lane's engine is gone, and its host too unless it `lives`."""

    error: TrialError
    trial_id: str | None
    """Trial in hand; null while the engine was built or closed."""
    retry: bool = False
    """The cause lies outside the trial."""
    lives: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The devices of a lane were inspected."""

    problems: tuple[str, ...]
    """What speaks against using them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Engines were run side by side on a node, and alone."""

    node_id: str
    packing: Packing


Happening = Progress | Finished | Released | Lost | Compared | Found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inspection:
    """Of a lane's devices."""

    ask: Callable[[], list[Any]]
    answers: list[Any]
    """To come, one for each node."""
    until: float
    """So long it is made again where Ray kills it for want of memory."""


class _Host:
    """An actor on a node, with the imports of its engines under way or done."""

    def __init__(
        self,
        kinds: Sequence[EngineKind],
        placed: Any,
        nursery: str | None,
        lodger: bool,
        carried: Carried | None,
    ) -> None:
        actor: Any = EngineHost
        self.actor: Any = actor.options(num_cpus=0, num_gpus=0, scheduling_strategy=placed).remote(
            kinds, nursery, lodger
        )
        if carried is not None:
            self.actor.take.remote(carried.paths, carried.token)
        self.pid: Any = self.actor.pid.remote()
        self.log: Any = self.actor.log.remote()
        """Node and file of what it prints where the driver sees no file."""
        self.ready: Any = self.actor.prepare.remote()


class _Process:
    """One lane's devices, its host, and the group it works on."""

    def __init__(self, lane: Lane, placement: Placement, host: _Host) -> None:
        self.lane = lane
        self.placement = placement
        self.host = host
        self.usable = True
        """The host can serve another lane."""
        self.stream: Any = None
        self.shared: set[Path] = set()
        self.job: Job | None = None
        self.stage: Stage = "load"
        self.trial_id: str | None = None
        self.heard_at = time.monotonic()

    def hear(self, message: Message) -> None:
        self.heard_at = time.monotonic()
        if isinstance(message, Progress):
            self.stage, self.trial_id = message.stage, message.trial_id
        elif isinstance(message, Finished):
            self.trial_id = None
        else:
            self.stream = None
            self.usable = message.clean

    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at

    def overdue(self) -> bool:
        """Nothing was heard for longer than its host would be silent."""
        if self.stream is None or self.job is None:
            return False
        return self.silent_s() > patience_s(self.job, self.stage, self.trial_id) + HOST_GRACE_S


class Pool:
    """Every lane's process.

    Args:
        cluster: where they run.
        sweep, run_id, profile: as records name them.
        logs: folder of logs in the dataset.
        kinds: engines of the sweep.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        sweep: str,
        run_id: str,
        profile: str,
        logs: Path,
        kinds: Sequence[EngineKind],
    ):
        self._cluster = cluster
        self._names: dict[str, Any] = {"sweep": sweep, "run_id": run_id, "profile": profile}
        self._logs = logs
        self._kinds = tuple(kinds)
        self._lodgers = cluster.session is None
        """Hosts have to clean up behind themselves: no session of ours goes with them."""
        self._processes: dict[int, _Process] = {}
        self._waiting: dict[str, list[_Host]] = {}
        """Node → hosts without a lane."""
        self._checks: dict[str, tuple[Any, list[_Process]]] = {}
        """Node → answer to come of a check, and what takes part."""
        self._inspections: dict[int, _Inspection] = {}
        """By lane."""
        self._compared: dict[str, Packing | None] = {}
        """Node on which engines may run side by side → what was found, if it was checked."""

    def open(self, lane: Lane) -> None:
        """Reserves a lane's devices, and gives it a host."""
        self._processes[lane.lane_id] = self._opened(lane)

    def share(self, node_id: str, packing: Packing | None = None) -> None:
        """Notes that engines may run side by side on a node, and what shows it."""
        self._compared[node_id] = packing

    def check(self, check: Check) -> None:
        """Has engines run side by side and alone; `poll` tells what came of it."""
        taking_part = [self._opened(lane) for lane in check.lanes]
        (one,) = check.group.trials
        local = check.node_id == self._cluster.driver_node
        job = self.job(check.group, {one.trial_id: 1}, local=local)
        if job.log is not None:
            job = replace(job, log=str(Path(job.log).with_name("side-by-side.log")))
        answer = check_packing.remote(
            [process.host.actor for process in taking_part],
            [process.placement.devices for process in taking_part],
            job,
            one.trial.measure.timeout_s + GRACE_S,
        )
        self._checks[check.node_id] = (answer, taking_part)

    def inspect(self, asked: Inspect) -> None:
        """Has the devices of a lane looked at, after its host was ended; `poll` tells what was
        found."""
        process = self._processes[asked.lane_id]
        self._note_shared(process)
        pid = _at_once(process.host.pid)
        ray.kill(process.host.actor)
        process.usable, process.stream = False, None
        _unlink(process.shared)
        job, wait_s = None, 0.0
        if asked.group is not None:
            (one,) = asked.group.trials
            local = process.lane.node_id == self._cluster.driver_node
            job = replace(self.job(asked.group, {one.trial_id: 1}, local=local), log_name=None)
            job = replace(job, log=job.log and str(Path(job.log).with_name("inspection.log")))
            wait_s = one.trial.measure.timeout_s + GRACE_S
            process.host = self._host(process.lane, process.placement)

        def ask() -> list[Any]:
            return [
                inspect_devices.options(scheduling_strategy=on_node(node_id)).remote(
                    pid,
                    process.placement.devices,
                    self._cluster.occupied.get(node_id, {}),
                    process.host.actor,
                    job,
                    wait_s,
                )
                for node_id in nodes_of(process.lane)
            ]

        self._inspections[asked.lane_id] = _Inspection(
            ask=ask, answers=ask(), until=time.monotonic() + MEMORY_WAIT_S
        )

    def _host(self, lane: Lane, placement: Placement) -> _Host:
        """A new host for a lane."""
        if lane.node_id is None:
            return self._new_host(placement.within(captures=True), None)
        return self._host_on(lane.node_id)

    def _host_on(self, node_id: str) -> _Host:
        """A new host on a node."""
        local = node_id == self._cluster.driver_node
        nursery = self._cluster.nursery if local else None
        return self._new_host(on_node(node_id), nursery)

    def _occupied(self, lane: Lane) -> dict[str, Occupancy]:
        """What was in use before the first group on the GPUs of a lane's nodes."""
        nodes = [node_id for node_id, _ in lane.parts] or [lane.node_id or ""]
        return {
            gpu: occupancy
            for node_id in nodes
            for gpu, occupancy in self._cluster.occupied.get(node_id, {}).items()
        }

    def _new_host(self, placed: Any, nursery: str | None) -> _Host:
        return _Host(self._kinds, placed, nursery, self._lodgers, self._cluster.carried)

    def withhold(self, lane_id: int) -> None:
        """Keeps a lane's devices until the run ends."""
        self._inspections.pop(lane_id, None)

    def devices_of(self, lane_id: int) -> tuple[str, ...]:
        """Names of a lane's devices on its node; none where the node is the device, or where
        they are not known."""
        granted = _at_once(self._processes[lane_id].placement.devices)
        return tuple(granted.split(",")) if granted else ()

    def _opened(self, lane: Lane) -> _Process:
        placement = Placement(lane, {node.node_id: node for node in self._cluster.nodes})
        waiting = self._waiting.get(lane.node_id) if lane.node_id is not None else None
        host = waiting.pop(0) if waiting else self._host(lane, placement)
        return _Process(lane, placement, host)

    def stand_by(self, lanes: Mapping[str, int]) -> None:
        """Starts hosts ahead of the lanes that will need them, one at a time on each node.

        Args:
            lanes: node → lanes that will be open there at once.
        """
        for node_id, number in lanes.items() if PRELOAD.keys() & set(self._kinds) else ():
            there = list(self._waiting.get(node_id, ()))
            there += [one.host for one in self._processes.values() if one.lane.node_id == node_id]
            if len(there) >= number:
                continue
            if ray.wait([one.ready for one in there], num_returns=len(there), timeout=0)[1]:
                continue  # imports are under way
            self._waiting.setdefault(node_id, []).append(self._host_on(node_id))

    def assign(
        self,
        lane_id: int,
        group: Group,
        attempts: dict[str, int],
        slowness: float = 1.0,
        sheets: pa.RecordBatch | None = None,
    ) -> None:
        """Gives a group to an idle lane.

        Args:
            slowness: seconds that trials have taken so far over those predicted.
            sheets: activation sheets that may fit.
        """
        process = self._processes[lane_id]
        job = self.job(group, attempts, local=process.lane.node_id == self._cluster.driver_node)
        if not group.predicts:
            job = replace(job, **self._neighbours(process.lane))
        if self._predicted_for(group, process.lane):
            job = replace(job, slowness=slowness)
        job = replace(job, sheets=sheets)
        process.job = job
        process.stage, process.trial_id = "load", None
        process.heard_at = time.monotonic()
        process.stream = process.host.actor.run.options(num_returns="streaming").remote(
            job,
            process.placement.devices,
            process.lane.node_id is None,
            self._occupied(process.lane),
        )

    def _predicted_for(self, group: Group, lane: Lane) -> bool:
        """Whether the predictions are of the devices on which the group runs."""
        asked = group.trials[0].trial.layout.device or self._names["profile"]
        name = asked if asked == CPU else device(asked).name
        held = set(nodes_of(lane))
        return {one.device_class for one in self._cluster.nodes if one.node_id in held} == {name}

    def job(self, group: Group, attempts: dict[str, int], *, local: bool) -> Job:
        """What a host is told of a group. Logs lie in the dataset where it can see it, else come
        there when the group has ended."""
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
                    predicted=one.predicted,
                    digests=one.digests,
                )
                for one in group.trials
            ),
            log=str(self._logs / run_id / name) if local else None,
            log_name=f"{self._logs.name}/{run_id}/{name}",
            scratch=str(self._cluster.session) if local and self._cluster.session else None,
        )

    def poll(self, timeout_s: float) -> Iterator[tuple[int, Happening]]:
        """What happened, as (lane, happening); waits for the first at most `timeout_s`, and
        takes with it what comes within `GATHER_S`."""
        streams = {id(one.stream): one for one in self._processes.values() if one.stream}
        if self._checks or self._inspections:
            yield from self._checked()
            yield from self._inspected()
            timeout_s = min(timeout_s, CHECK_POLL_S)
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
        until = time.monotonic() + GATHER_S
        while ready:
            for stream in ready:
                process = streams[id(stream)]
                yield process.lane.lane_id, self._next(process)
            left_s = until - time.monotonic()
            speaking = [stream for stream in ready if streams[id(stream)].stream is stream]
            if left_s <= 0 or not speaking:
                break
            ready, _ = ray.wait(
                speaking, num_returns=len(speaking), timeout=left_s, fetch_local=False
            )
        for process in streams.values():
            if process.overdue():
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
        """Gives a lane's devices back. Its host waits for another lane if it can serve one,
        else it ends with everything it started.

        A killed host cannot remove the shared memory of its engine; where that is on this
        machine, it is removed here.
        """
        self._inspections.pop(lane_id, None)
        process = self._processes.pop(lane_id, None)
        if process is not None:
            self._end(process)

    def _end(self, process: _Process) -> None:
        node_id = process.lane.node_id
        if node_id is not None and process.usable and process.stream is None:
            self._waiting.setdefault(node_id, []).append(process.host)
        else:
            self._note_shared(process)
            ray.kill(process.host.actor)
        process.placement.release()
        _unlink(process.shared)

    def forget(self, node_id: str) -> None:
        """The hosts without a lane of a node that is gone."""
        self._waiting.pop(node_id, None)
        if node_id in self._checks:
            self._end_check(node_id, usable=False)

    def close_all(self) -> None:
        """Ends every lane and every host."""
        for lane_id in list(self._processes):
            self.close(lane_id)
        for node_id in list(self._checks):
            self._end_check(node_id, usable=False)
        idle = [host for hosts in self._waiting.values() for host in hosts]
        self._waiting.clear()
        if idle and self._lodgers:
            ray.wait([host.actor.leave.remote() for host in idle], num_returns=len(idle),
                     timeout=LEAVE_S)  # fmt: skip
        for host in idle:
            ray.kill(host.actor)

    def _checked(self) -> Iterator[tuple[int, Happening]]:
        """Checks that ended."""
        for node_id, (answer, taking_part) in list(self._checks.items()):
            if not ray.wait([answer], timeout=0)[0]:
                continue
            try:
                packing: Packing = ray.get(answer)
            except ray.exceptions.RayError as error:
                packing = Packing(
                    unchanged=False, engines=len(taking_part), trial_id="", reason=_short(error)
                )
            self._end_check(node_id, usable=packing.ratio is not None)
            if packing.unchanged:
                self.share(node_id, packing)
            yield taking_part[0].lane.lane_id, Compared(node_id=node_id, packing=packing)

    def _inspected(self) -> Iterator[tuple[int, Happening]]:
        """Inspections that ended. One that could not be made speaks against the devices."""
        for lane_id, one in list(self._inspections.items()):
            due = len(one.answers)
            if len(ray.wait(one.answers, num_returns=due, timeout=0)[0]) < due:
                continue
            del self._inspections[lane_id]
            try:
                problems = [problem for found in ray.get(one.answers) for problem in found]
            except ray.exceptions.RayError as error:
                starved = isinstance(error, ray.exceptions.OutOfMemoryError)
                if starved and time.monotonic() < one.until:
                    self._inspections[lane_id] = replace(one, answers=one.ask())
                    continue
                problems = [f"it could not be inspected: {_short(error)}"]
            yield lane_id, Found(problems=tuple(problems))

    def _end_check(self, node_id: str, *, usable: bool) -> None:
        _, taking_part = self._checks.pop(node_id)
        for process in taking_part:
            process.usable = usable
            self._end(process)

    def _neighbours(self, lane: Lane) -> dict[str, Any]:
        """What a record says of other engines on its machine."""
        if lane.node_id is None or lane.node_id not in self._compared:
            return {"side_by_side": False}
        packing = self._compared[lane.node_id]
        return {"side_by_side": True, "side_by_side_ratio": packing.ratio if packing else None}

    def _next(self, process: _Process) -> Happening:
        try:
            message: Message = ray.get(next(process.stream))
        except StopIteration:
            return self._lost(process, Crashed("the host ended before its group"))
        except ray.exceptions.RayError as error:
            return self._died(process, error)
        stage, trial_id = process.stage, process.trial_id
        process.hear(message)
        if isinstance(message, Died | Released):
            self._keep_log(process, message.log)
        if isinstance(message, Died):
            return Lost(error=message.error, trial_id=trial_id, lives=message.clean)
        if isinstance(message, Progress) and stage == "load" != message.stage:
            self._note_shared(process)  # the engine is built
        return message

    def _last_words(self, process: _Process) -> str:
        """The end of what the group of a dead host printed."""
        if process.job is None or process.job.log is not None:
            return tail(process.job.log if process.job else None)
        if (told := _at_once(process.host.log)) is None:
            return ""
        node_id, path = told
        try:
            reading = read_log.options(scheduling_strategy=on_node(node_id)).remote(path)
            found: str = ray.get(reading, timeout=LOG_S)
        except ray.exceptions.RayError:  # the node is gone too
            return ""
        self._keep_log(process, found)
        return found

    def _keep_log(self, process: _Process, text: str | None) -> None:
        """Puts what a node sent of a group's log into the dataset."""
        if not text or process.job is None or process.job.log_name is None:
            return
        path = self._logs.parent / process.job.log_name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)

    def _note_shared(self, process: _Process) -> None:
        """Remembers the shared memory of a lane on this machine, for when it is killed."""
        if process.lane.node_id != self._cluster.driver_node:
            return
        pid = _at_once(process.host.pid)
        if pid is not None:
            process.shared |= shared_segments(pid)

    def _overdue(self, process: _Process) -> Lost:
        self._last_words(process)
        return self._lost(process, silent(process.stage, process.silent_s()))

    def _died(self, process: _Process, error: ray.exceptions.RayError) -> Lost:
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            cause: TrialError = OutOfMemory(
                _short(error), stage=oom_stage(process.stage), scope="host"
            )
            return self._lost(process, cause)
        if isinstance(error, ray.exceptions.RayTaskError):
            return self._lost(process, Crashed(_short(error.cause or error)))
        # A host's death is told by its node. Where nobody tells of one, the node has died too,
        # which the cluster takes longer to see, or is out of reach.
        untold = isinstance(error, ray.exceptions.ActorUnavailableError)
        if untold or getattr(error, "preempted", False) or _node_gone(process.lane.node_id):
            return self._lost(process, Crashed(f"the node was lost: {_short(error)}"), retry=True)
        told = from_log(
            of_last_engine(self._last_words(process)),
            stage=oom_stage(process.stage),
            device_is_cpu=self._cpu_only(),
        )
        return self._lost(process, told or Crashed(f"the engine's process died: {_short(error)}"))

    def _lost(self, process: _Process, error: TrialError, *, retry: bool = False) -> Lost:
        process.stream, process.usable = None, False
        return Lost(error=error, trial_id=process.trial_id, retry=retry)

    def _cpu_only(self) -> bool:
        return all(node.cpu_only for node in self._cluster.nodes)


def _node_gone(node_id: str | None) -> bool:
    """Whether the cluster has seen the death of a node."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return node_id is not None and node_id not in alive


def _at_once(reference: Any) -> Any:
    """A value if it has come; null if it has not, or never will."""
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.RayError:
        return None


def _unlink(segments: set[Path]) -> None:
    for segment in segments:
        segment.unlink(missing_ok=True)
    segments.clear()


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:500] or type(error).__name__
