"""A process on a node that runs one group of trials after another.

It asks Ray for no devices: the driver reserves them for a lane and names them with each
group, so a host serves lanes of any size on its node and imports an engine once. Engines run
in forks of a process that has the imports done (`workers.forks`). A message is streamed for
every stage and a record for every trial. What an engine and its ranks print goes to a file per
group: the driver's table stays clean, and a cause that only a rank has told, or a process that
died, can be read there. Where the driver cannot see the file, it is sent the end of it.

Ray puts each worker in a process group of its own and kills the group with it, so engines
never outlive their host. `max_restarts` is 0: whether a retry can mend a death is the
driver's decision.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from workers import caches, given, memory, runner
from workers.contract.engine import EngineKind
from workers.contract.errors import Crashed, TrialError
from workers.contract.job import Job
from workers.contract.message import Died, Message, Released
from workers.contract.trial import Trial
from workers.folders import Folder, within
from workers.forks import (
    BEGINS,
    EXIT_S,
    PRELOAD,
    EngineDied,
    Forks,
    family,
    log_to,
    members,
    tail,
)
from workers.hardware.host import Host, describe
from workers.hardware.occupancy import CLEAN_BYTES, Occupancy, leftovers, occupancies
from workers.moe.fields import UnknownModel
from workers.packing import Packing, compare

WATCH_S = 1.0
"""Time between two looks at whether the node lives, seconds."""
NODE_GRACE_S = 30.0
"""Time in which a cluster notices that a node is gone, seconds (Ray: five times three, and ten)."""
HOME = "moe-host-"
"""How folders of hosts begin, on nodes of clusters that were there before the driver."""
SOCKET = len("/g-12345678/e-12345678/00000000-0000-0000-0000-000000000000")
"""Length of the longest path of a socket in them: vLLM's between ranks, in an engine's folder."""
EMPTY: Mapping[str, Occupancy] = {}
"""Of a node whose GPUs were all free."""
GPU_WAIT_S = 60.0
"""Wait for memory of an earlier process to leave a GPU, seconds."""


@ray.remote(max_restarts=0, max_task_retries=0)
class EngineHost:
    """Owner of engines, one at a time.

    Args:
        kinds: engines that it will be asked for.
        nursery: see `Forks`.
        lodger: on a node that outlives the driver. All temporary files then go into a folder of
            the host's own, and those of hosts that were killed are removed.
    """

    def __init__(
        self, kinds: Sequence[EngineKind], nursery: str | None = None, lodger: bool = False
    ) -> None:
        self._home: Folder | None = None
        if lodger:
            self._home = Folder.begin(HOME, SOCKET)
            tempfile.tempdir = os.environ["TMPDIR"] = str(self._home.path)
        if lodger and (moved := caches.ensure()) is not None:  # elsewhere the driver has done it
            print(moved)
        self._forks = Forks(kinds, nursery)
        self._folder: str | None = None
        place = self._home.path if self._home is not None else Path(tempfile.gettempdir())
        self._log = place / f"engine-{os.getpid()}.log"
        self._given: tuple[Mapping[str, str], str | None] = {}, None
        threading.Thread(target=_end_with_the_node, args=(os.getppid(),), daemon=True).start()

    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return os.getpid()

    def log(self) -> tuple[str, str]:
        """Node id, and the file there that has the output of a job without a file."""
        return ray.get_runtime_context().get_node_id(), str(self._log)

    def take(self, paths: Mapping[str, str], token: str | None) -> None:
        """Takes what the driver gives of its environment; see `workers.given`. Before anything
        else, since libraries read theirs once.

        Args:
            paths: variable → file or folder.
            token: of the hub.
        """
        self._given = paths, token
        _take(*self._given)

    def prepare(self) -> None:
        """Imports the engines ahead of the first group, which then starts with its load.

        Imports take all of a core for seconds: not beside a measurement on the same cores.
        """
        self._forks.prepare()

    def leave(self) -> None:
        """Removes what it would leave on its node. It can do nothing after that but be killed."""
        if self._home is not None:
            self._home.end()
            self._home = None

    def run(
        self,
        job: Job,
        devices: str | None,
        over_nodes: bool,
        before: Mapping[str, Occupancy] = EMPTY,
    ) -> Iterator[Message]:
        """Measures a group; see `workers.runner.run`.

        Args:
            job: the group.
            devices: GPUs that Ray granted to the lane, as `CUDA_VISIBLE_DEVICES` lists them.
            over_nodes: the engine places ranks through Ray, so it runs in this process.
            before: what was in use on GPUs of this node before the first group.

        Yields:
            Its messages, then `Released`, or `Died` if the engine's process ended too soon. A
            `Released` that is not clean may come before all tickets have ended: no other engine
            is built on devices that the last one has left in use.
        """
        sent = job.log is None
        job = self._logged(job)
        for message in self._run(job, devices, over_nodes, before):
            if sent and isinstance(message, Released | Died):
                message = replace(message, log=tail(job.log))
            yield message

    def _run(
        self, job: Job, devices: str | None, over_nodes: bool, before: Mapping[str, Occupancy]
    ) -> Iterator[Message]:
        self._wait_for_gpus(devices, before)
        if over_nodes and (lacking := self._lacking(job)) is not None:
            yield Died(error=lacking, trial_id=None, clean=True)
            return
        here = over_nodes or job.tickets[0].trial.engine.kind not in PRELOAD
        if here and job.log is not None:
            log_to(job.log)
        problems: list[str] = []

        def engine(job: Job) -> Iterator[Message]:
            if problems:
                raise _Unfit
            try:
                yield from self._here(job) if here else self._in_a_fork(job, devices)
            finally:
                problems.extend((*self._survivors(), *_held_here()))
                problems.extend(
                    _wait_over_nodes(before) if over_nodes else self._wait_for_gpus(devices, before)
                )

        died: EngineDied | None = None
        try:
            with suppress(_Unfit):
                yield from runner.run(job, engine)
        except EngineDied as error:
            died = error
        if died is None:
            yield _released(problems)
        else:
            detail = "; ".join(problems)
            yield Died(error=died.error, trial_id=died.trial_id, clean=not problems, detail=detail)

    def _here(self, job: Job) -> Iterator[Message]:
        """Measures on one engine in this process."""
        print(BEGINS, flush=True)
        return runner.one_engine(job)

    def _in_a_fork(self, job: Job, devices: str | None) -> Iterator[Message]:
        with _scratch(self._root(job)) as folder:
            yield from self._forks.run(replace(job, scratch=str(folder)), devices)

    def _logged(self, job: Job) -> Job:
        """`job` with a file for its output: its own, or this host's, emptied."""
        if job.log is not None:
            return job
        self._log.write_bytes(b"")
        return replace(job, log=str(self._log))

    def _lacking(self, job: Job) -> TrialError | None:
        """Why an engine over several nodes cannot be built, because its ranks would not find the
        model's files; null where each node has them in the same place. They are fetched, pruned or
        made on every node."""
        trial = job.tickets[0].trial
        if trial.engine.kind not in PRELOAD:
            return None
        group = ray.util.placement_group_table(ray.util.get_current_placement_group())
        nodes = sorted(set(group["bundles_to_node_id"].values()))
        return _in_one_place(nodes, trial, *self._given)

    def _root(self, job: Job) -> str | None:
        """Where a group's folder is made."""
        return job.scratch or (str(self._home.path) if self._home is not None else None)

    def _wait_for_gpus(self, devices: str | None, before: Mapping[str, Occupancy]) -> list[str]:
        return _wait_for_gpus(devices, before, {os.getpid(), *family()})

    def _survivors(self) -> list[str]:
        survivors = self._forks.survivors()
        return [f"{survivors} processes are still alive"] if survivors else []

    def rehearse(self, job: Job, devices: str | None, patience_s: float) -> None:
        """Builds an engine that waits to be asked for passes; see `workers.packing`."""
        self._folder = str(within(self._root(job), "group"))
        job = replace(self._logged(job), scratch=self._folder)
        self._forks.rehearse(job, devices, patience_s)

    def passes(self, patience_s: float) -> list[float]:
        """Times of its passes, in seconds."""
        return self._forks.passes(patience_s)

    def end_rehearsal(self) -> int:
        """Ends it.

        Returns:
            Processes that are still alive.
        """
        self._forks.end_rehearsal()
        if self._folder is not None:
            memory.sweep_shared(Path(self._folder))
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._forks.survivors()


@ray.remote(num_cpus=0, max_retries=0)
def check_packing(
    hosts: Sequence[Any], devices: Sequence[Any], job: Job, patience_s: float
) -> Packing:
    """Compares engines side by side with each alone; see `workers.packing`.

    Args:
        hosts: actors, on one node.
        devices: GPUs of each, or references to them.
        job: its first trial is what every engine runs.
        patience_s: longest silence of an engine that is waited for, seconds.
    """
    trial_id = job.tickets[0].trial_id
    try:
        given = [ray.get(one) if isinstance(one, ray.ObjectRef) else one for one in devices]
        pairs = zip(hosts, given, strict=True)
        ray.get([host.rehearse.remote(job, one, patience_s) for host, one in pairs])
        return compare(
            len(hosts),
            lambda number: ray.get(hosts[number].passes.remote(patience_s)),
            lambda: ray.get([host.passes.remote(patience_s) for host in hosts]),
            trial_id,
        )
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        return Packing(unchanged=False, engines=len(hosts), trial_id=trial_id, reason=reason[:300])
    finally:
        ray.wait([host.end_rehearsal.remote() for host in hosts], num_returns=len(hosts))


@ray.remote(num_cpus=0, max_retries=0)
def inspect_devices(
    pid: int | None,
    devices: str | None,
    before: Mapping[str, Occupancy],
    host: Any,
    job: Job | None,
    patience_s: float,
) -> list[str]:
    """Looks at what the last host of some devices left behind, on its node.

    Args:
        pid: of that host, which has been killed; null if it never said.
        devices: its GPUs.
        before: what was in use on GPUs of this node before the first group.
        host: another one, to try the job with.
        job: its first trial has run elsewhere; null where the devices are not in doubt.
        patience_s: longest silence of an engine that is waited for, seconds.

    Returns:
        What speaks against using the devices.
    """
    found = [*_group_left(pid), *_wait_for_gpus(devices, before, members(pid) if pid else ())]
    if found or job is None:
        return found
    trial_id = job.tickets[0].trial_id
    try:
        ray.get(host.rehearse.remote(job, devices, patience_s))
        ray.get(host.passes.remote(patience_s))
    except ray.exceptions.RayError as error:
        reason = next(iter(str(getattr(error, "cause", None) or error).splitlines()), "")
        return [f"trial {trial_id} ran elsewhere and fails here too: {reason[:300]}"]
    finally:
        ray.wait([host.end_rehearsal.remote()])
    return []


@ray.remote(num_cpus=0, max_retries=0)
def have_files(
    trial: Trial, paths: Mapping[str, str], token: str | None
) -> tuple[str, tuple[str, ...]]:
    """Has the files of a trial's models on this node.

    Args:
        paths, token: as `EngineHost.take` takes them.

    Returns:
        Name of the node, and where they lie.

    Raises:
        TrialError: they cannot be had.
    """
    from workers.engines.vllm_engine import VllmEngine

    _take(paths, token)
    caches.ensure()
    node = socket.gethostname()
    try:
        return node, VllmEngine.files(trial)
    except UnknownModel as error:
        raise Crashed(
            f"{node} does not have {trial.model.name}: a model that is spread over nodes has to "
            "lie in the same place on each of them"
        ) from error


def _in_one_place(
    nodes: Sequence[str], trial: Trial, paths: Mapping[str, str], token: str | None
) -> TrialError | None:
    """What speaks against a model over these nodes; see `EngineHost._lacking`."""
    try:
        told = ray.get(
            [
                have_files.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=one, soft=False)
                ).remote(trial, paths, token)
                for one in nodes
            ]
        )
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, TrialError) else Crashed(str(cause))
    if len({found for _, found in told}) == 1:
        return None
    places = "; ".join(f"{node}: {', '.join(found)}" for node, found in told)
    return Crashed(
        f"the nodes would look for the model's files in different places ({places}): give HF_HOME "
        "and XDG_CACHE_HOME one value on all of them"
    )


def _take(paths: Mapping[str, str], token: str | None) -> None:
    for line in given.take_paths(paths):
        print(line, flush=True)
    if token is not None:
        given.take_token(token)


def _group_left(pid: int | None) -> list[str]:
    """What is left of the process group of a dead host, after a while."""
    deadline = time.monotonic() + EXIT_S
    while pid is not None:
        left = members(pid)
        if not left:
            break
        if time.monotonic() > deadline:
            return [f"processes of a dead host are still alive: {', '.join(map(str, left))}"]
        time.sleep(0.1)
    return []


@ray.remote(num_cpus=0, max_retries=0)
def describe_node() -> tuple[Host, dict[str, Occupancy]]:
    """The machine that Ray runs this on, and what is in use on its GPUs."""
    return describe(), occupancies()


@ray.remote(num_cpus=0, max_retries=0)
def read_log(path: str) -> str:
    """The end of a log on the node that Ray runs this on."""
    return tail(path)


@ray.remote(num_cpus=0, max_retries=0)
def granted_devices() -> str | None:
    """The GPUs that Ray gives to whoever asks where this runs, as `CUDA_VISIBLE_DEVICES` lists
    them; null without one.

    Ray is asked, not the environment: where its nodes are told not to set that variable
    (`RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES`), it names every GPU of the node or none. Ray's
    answer has no order of its own.
    """
    granted = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return (
        ",".join(sorted(granted, key=lambda name: (not name.isdecimal(), len(name), name))) or None
    )


def _end_with_the_node(raylet: int) -> None:
    """Ends this process and all that it started when its raylet is gone: nobody is left who
    would, and who starts the node again would find its devices in use.

    Not at once: by then the driver should know that the node is lost, and blame no trial.
    """
    while os.getppid() == raylet:
        time.sleep(WATCH_S)
    time.sleep(NODE_GRACE_S)
    for pid in family():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class _Unfit(Exception):
    """Something of an engine is still there: the next one would be measured beside it."""


def _released(problems: Sequence[str]) -> Released:
    return Released(clean=not problems, detail="; ".join(problems))


@contextmanager
def _scratch(root: str | None) -> Iterator[Path]:
    """A folder for temporary files of one fork, which may not live to remove its own."""
    folder = within(root, "group")
    try:
        yield folder
    finally:
        memory.sweep_shared(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_gpus(
    devices: str | None, before: Mapping[str, Occupancy], own: Collection[int]
) -> list[str]:
    """Waits until an engine's memory has left the GPUs, and says where some stays.

    Ray grants a device again when its last process is dead, which can be before the driver
    has taken the memory back. Memory that stays is left to the engine to refuse, in its own
    words.

    Args:
        own: processes of the engine's host.
    """
    deadline = time.monotonic() + GPU_WAIT_S
    while found := leftovers(devices, before, own):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for text in found:
        print(f"after {GPU_WAIT_S:.0f} s {text}")
    return found


@ray.remote(num_cpus=0, num_gpus=1, max_retries=0)
def free_device(before: Mapping[str, Occupancy]) -> list[str]:
    """Waits for memory of the GPU on which Ray runs this, and says what stays."""
    granted = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return _wait_for_gpus(",".join(granted) or None, before, ())


def _wait_over_nodes(before: Mapping[str, Occupancy]) -> list[str]:
    """What stays of an engine over several nodes.

    Its ranks are actors, each on a bundle of the placement group of this process: where one has
    died, and no sooner, `free_device` gets the same GPU.
    """
    group = ray.util.get_current_placement_group()
    assert group is not None, "a layout over several nodes has one"
    asked = [
        free_device.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle
            )
        ).remote(before)
        for bundle in range(group.bundle_count)
    ]
    try:
        return [problem for found in ray.get(asked, timeout=2 * GPU_WAIT_S) for problem in found]
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return [f"the GPUs of the last engine could not be looked at: {reason[:200]}"]


def _held_here() -> list[str]:
    """What this process still holds on its GPUs beyond an empty CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    return [f"{held / 2**20:.0f} MiB still reserved on the GPU"] if held > CLEAN_BYTES else []
