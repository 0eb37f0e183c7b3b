"""A sweep from file to dataset.

    load → expand → plan → resume → connect → schedule ⇄ pool → commit → summary

The driver holds no result in memory longer than it takes to write it down: a record is on
disk before the schedule hears that its trial ended, so whatever kills the driver costs at
most the trials in flight.

Whatever the schedule hears is a line of `logs/<run>/events.jsonl`, with what it commanded:
the first line has the nodes and groups that it began with, and `schedule.replay` goes
through the others again.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import polars as pl
import pyarrow as pa
from rich.console import Console

from orchestrator import events, manifest, schedule, vouching
from orchestrator.display.base import Display, choose, span
from orchestrator.errors import ClusterError, HeadLost
from orchestrator.needs import notes, refuse
from orchestrator.plan import Group, Plan
from orchestrator.progress import Reason, Tracker
from orchestrator.request import Request, local_profile, prepare
from orchestrator.sheets import shelf
from orchestrator.signals import deaf, interruptible
from orchestrator.store import RESUME, Dataset, Guard, StoreError, settled
from orchestrator.streams import diverted
from orchestrator.sweep import Sweep
from workers import caches, recorder
from workers.contract.errors import Crashed, TimedOut, TrialError
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished, Progress, Released
from workers.contract.outcome import DISTURBED, FAULTS, Outcome, Rerun
from workers.hardware import roofline
from workers.hardware.device import CPU, device
from workers.hardware.fitness import remark, unfit
from workers.hardware.host import Host, describe, device_class
from workers.hardware.occupancy import CLEAN_BYTES
from workers.packing import Packing
from workers.secrecy import hide, hide_text, known_secrets, scrub

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster
    from orchestrator.pool import Compared, Found, Pool

POLL_S = 0.25
"""Wait for the next message before the display is refreshed, seconds."""

AT_ONCE = 1_000
"""Records of infeasible points that are written together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What became of a sweep."""

    sweep: str
    run_id: str
    dataset: Path
    trials: int
    """Points that are owed a terminal record."""
    resumed: int
    """Those that an earlier run had settled."""
    counts: Mapping[Outcome, int]
    """Terminal records by outcome, resumed ones included."""
    disturbed: int
    """Those of them that something else disturbed."""
    seconds: float
    busy_share: float | None
    interrupted: bool = False
    reasons: tuple[Reason, ...] = ()
    """Why trials did not end `ok`, faults first, then the most frequent."""

    @property
    def status(self) -> int:
        """Exit status of the process."""
        if self.interrupted:
            return 130
        return 1 if any(self.counts.get(outcome) for outcome in FAULTS) else 0


def execute(request: Request) -> Summary:
    """Runs a sweep to the end, or to Ctrl-C.

    Raises:
        SweepError, UnknownDevice: before anything is started.
        ClusterError: no cluster, or one that can never run a trial of this sweep (its drivers may
            be too old), or this one's own, when all of its devices are withheld; what was
            measured is on disk.
        HeadLost: the cluster's head died; what was measured is on disk.
        StoreError: the dataset cannot be opened or written.
    """
    from orchestrator.cluster import Cluster, chosen
    from workers.forks import preloads

    moved = caches.ensure()
    profile = request.profile or local_profile()
    sweep, planned = prepare(request, profile)
    engines = preloads(sorted({group.trials[0].trial.engine.kind for group in planned.groups}))
    if chosen(request.address) is None:  # engines will run here
        refuse(planned.absent)
        if engines and (why := unfit(describe())) is not None:
            raise ClusterError(why)
    _refuse_lost(request.out)
    with (
        os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as errors,
        Dataset.open(request.out, sweep.name) as dataset,
        _scrubbed(dataset.logs, sweep),
        diverted(dataset.logs / "driver.log") as terminal,
        interruptible(),
        Cluster.connect(request.address, engines, engines=bool(engines)) as cluster,
    ):
        found = _cluster_profile(cluster) or profile
        if request.profile is None and found != profile:
            sweep, planned = prepare(request, found)
        if cluster.alone:
            refuse(planned.absent)
        display = choose(plain=request.plain, json=request.json, console=Console(file=terminal))
        with display:
            run = _Run(request, sweep, planned, dataset, cluster, display)
            if moved is not None:
                display.say(moved)
            cluster.or_else(lambda: _end_stuck(run, errors))
            return run.execute()


def _refuse_lost(out: Path) -> None:
    """Raises StoreError for a folder that Ray removes when this job is done: the copy of what
    was submitted with it."""
    if "working_dir_files" in out.resolve().parts and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise StoreError(
            f"--out {out} lies in Ray's copy of the working directory, which goes with the job: "
            "name a folder outside it by its whole path"
        )


class _Run:
    """One run: the loop between schedule, pool, dataset and display."""

    def __init__(
        self,
        request: Request,
        sweep: Sweep,
        planned: Plan,
        dataset: Dataset,
        cluster: Cluster,
        display: Display,
    ) -> None:
        from orchestrator.pool import Pool

        self._request, self._sweep, self._plan = request, sweep, planned
        self._dataset, self._cluster, self._display = dataset, cluster, display
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self._run_id = f"{stamp}-{secrets.token_hex(3)}"
        self._began = time.monotonic()
        self._known_secrets = known_secrets(sweep.resolved)
        self._shelf = shelf(request, self._say)
        self._settled = self._earlier(request.rerun)
        self._disturbed = self._settled.keys() - self._earlier(request.rerun | {DISTURBED}).keys()
        self._groups, self._infeasible = planned.due(self._settled, request.limit)
        known = list(self._exhausted())
        self._packings = self._known_packings()
        side_by_side = {node_id: one.unchanged for node_id, one in self._packings.items()}
        check = request.side_by_side != "always"
        if request.side_by_side == "never":
            side_by_side = {node.node_id: False for node in cluster.nodes}
        try:
            self._schedule = schedule.Schedule.of(
                self._groups,
                cluster.nodes,
                skip=not request.no_skip,
                known=known,
                autoscaling=cluster.autoscaling,
                check=check,
                side_by_side=side_by_side,
            )
        except schedule.Unplaceable as error:
            raise ClusterError(str(error)) from error
        wanted = {
            one.trial_id
            for one in (*planned.infeasible, *(t for g in planned.groups for t in g.trials))
        }
        resumed = {key: value for key, value in self._settled.items() if key in wanted}
        self._resumed = len(resumed)
        self._tracker = Tracker(
            planned,
            self._groups,
            self._schedule.nodes,
            device=_devices(cluster),
            resumed=resumed,
            disturbed=len(self._disturbed & resumed.keys()),
            hide=lambda text: hide_text(text, self._known_secrets),
        )
        self._recall(resumed)
        self._pool: Pool = Pool(
            cluster,
            sweep=sweep.name,
            run_id=self._run_id,
            profile=sweep.profile,
            logs=dataset.logs,
            kinds=sorted({group.trials[0].trial.engine.kind for group in self._groups}),
        )
        for node in cluster.nodes:
            if not node.cpu_only and (not check or side_by_side.get(node.node_id)):
                self._pool.share(node.node_id, self._packings.get(node.node_id))
        self._made: Counter[Outcome] = Counter()
        self._stranded_at: float | None = None
        self._events = _EventLog(dataset.logs / self._run_id / "events.jsonl")
        self._events.write(
            {
                "event": "start",
                "nodes": [asdict(node) for node in cluster.nodes],
                "groups": [
                    [group.group_id, [one.trial_id for one in group.trials]]
                    for group in self._groups
                ],
                "skip": not request.no_skip,
                "known": [
                    [one.one.trial_id, one.stage, [other.trial_id for other in one.together]]
                    for one in known
                ],
                "autoscaling": cluster.autoscaling,
                "check": check,
                "side_by_side": side_by_side,
            }
        )

    def execute(self) -> Summary:
        self._open_manifest()
        missing = notes(self._plan.absent, here=self._cluster.alone)
        for warning in (*self._dataset.warnings, *missing):
            self._say(warning)
        for line in (
            *self._plan.notes,
            self._plan.by_name,
            *self._of_earlier(),
            *self._of_devices(),
            self._shelf.missing(self._groups),
        ):
            if line is not None:
                self._say(line)
        interrupted = False
        try:
            self._write_infeasible()
            self._loop()
        except KeyboardInterrupt:
            interrupted = True
        except HeadLost as error:
            raise HeadLost(f"{error}; {self.safe()}") from error
        finally:
            with deaf():
                if not self._cluster.lost:
                    self._pool.close_all()
                    if self._cluster.autoscaling:
                        self._cluster.request(())
                self._events.close()
                self._close_manifest()
        self._display.update(self._tracker.snapshot())
        return Summary(
            sweep=self._sweep.name,
            run_id=self._run_id,
            dataset=self._dataset.folder,
            trials=self._plan.trials,
            resumed=self._resumed,
            counts=dict(self._tracker.counts),
            disturbed=self._tracker.disturbed,
            seconds=time.monotonic() - self._began,
            busy_share=self._tracker.busy_share(),
            interrupted=interrupted,
            reasons=tuple(self._tracker.reasons.all()),
        )

    def _loop(self) -> None:
        from orchestrator.pool import Compared, Found

        commands = self._schedule.start()
        self._events.write({"event": "started", "commands": list(map(events.brief, commands))})
        self._carry_out(commands)
        while not self._schedule.finished:
            self._look_at_nodes()
            heard = list(self._pool.poll(POLL_S))
            self._commit([one for _, one in heard if isinstance(one, Finished)])
            for lane_id, happening in heard:
                if isinstance(happening, Progress):
                    self._tracker.heard(lane_id, happening)
                elif isinstance(happening, Finished):
                    self._tracker.heard(lane_id, happening)
                    self._on(_ended(lane_id, happening, self._at()))
                elif isinstance(happening, Released):
                    if not happening.clean:
                        self._say(f"device not clean, process replaced: {happening.detail}")
                    self._tracker.heard(lane_id, happening)
                    ended = events.GroupEnded(
                        lane_id=lane_id,
                        clean=happening.clean,
                        devices=self._pool.devices_of(lane_id),
                        at=self._at(),
                    )
                    self._on(ended)
                elif isinstance(happening, Compared):
                    self._compared(happening)
                elif isinstance(happening, Found):
                    self._found(lane_id, happening)
                else:
                    self._say(f"process lost: {happening.error}")
                    lost = events.LaneLost(
                        lane_id=lane_id,
                        trial_id=happening.trial_id,
                        retry=happening.retry,
                        lives=happening.lives,
                        devices=self._pool.devices_of(lane_id),
                        at=self._at(),
                    )
                    if happening.retry:  # or the next try goes to a node that is gone
                        self._cluster.look_now()
                        self._look_at_nodes()
                    self._on(lost, happening.error)
            self._pool.stand_by(self._schedule.ahead())
            self._display.update(self._tracker.snapshot())

    def safe(self) -> str:
        """What a run has that cannot go on, in words."""
        made = sum(self._tracker.counts.values())
        again = ", once there is a cluster again" if self._cluster.session is None else ""
        return (
            f"the records of {made} of {self._plan.trials} trials are safe in "
            f"{self._dataset.folder}, and the same command goes on from there{again}"
        )

    def _say(self, line: str) -> None:
        """Shows a line, which may quote what an engine said."""
        self._display.say(hide_text(line, self._known_secrets))

    def _at(self) -> float:
        """Seconds since the start, to the millisecond."""
        return round(time.monotonic() - self._began, 3)

    def _on(self, event: events.Event, error: TrialError | None = None) -> None:
        """Tells the schedule and does what it says."""
        commands = self._schedule.on(event)
        self._events.write({**events.to_json(event), "commands": list(map(events.brief, commands))})
        self._carry_out(commands, error)

    def _look_at_nodes(self) -> None:
        """Nodes that came and went, and those that will not come any more."""
        changes = self._cluster.changes()
        for node_id in changes.lost:
            host = self._cluster.hosts[node_id].hostname
            self._say(f"node lost: {host}")
            self._pool.forget(node_id)
            in_hand = self._pool.in_hand(node_id)
            self._on(
                events.NodeLost(node_id=node_id, trials=in_hand, at=self._at()),
                Crashed(f"the node {host} was lost"),
            )
        for why in changes.refused:
            self._say(f"a node that joined is not used: {why}")
        for node in changes.joined:
            self._say(f"node joined: {node.hostname}")
            self._stranded_at = None
            self._note_node(node.node_id)
            self._on(events.NodeJoined(node=node, at=self._at()))
        if self._cluster.session is not None and self._schedule.stuck:
            raise ClusterError(f"no device is left that could go on; {self.safe()}")
        if not self._schedule.stranded or self._cluster.session is not None:
            self._stranded_at = None
        elif self._stranded_at is None:
            self._stranded_at = time.monotonic()
            needs = ", ".join(
                f"{need.groups} groups of {need.devices} {need.device_class or 'device(s)'}"
                for need in self._schedule.stranded
            )
            self._say(f"waiting up to {span(self._request.node_wait_s)} for nodes: {needs}")
        elif time.monotonic() > self._stranded_at + self._request.node_wait_s:
            self._on(events.Overdue(at=self._at()))

    def _carry_out(
        self, commands: Sequence[events.Command], error: TrialError | None = None
    ) -> None:
        for command in commands:
            match command:
                case events.Open(lane=lane):
                    self._pool.open(lane)
                    self._tracker.opened(lane)
                case events.Assign(lane_id=lane_id, group=group, attempts=attempts):
                    self._pool.assign(
                        lane_id,
                        group,
                        attempts,
                        self._schedule.slowness,
                        sheets=self._shelf.rows(group),
                    )
                    self._tracker.assigned(lane_id, group)
                case events.Close(lane_id=lane_id):
                    self._pool.close(lane_id)
                    self._tracker.closed(lane_id)
                case events.Blame():
                    assert error is not None, "trials are ended by the death of their lane"
                    self._blame(command, error)
                case events.Skip(witness=witness, group=group):
                    self._skip(group, witness)
                case events.Abandon():
                    self._abandon(command)
                case events.Check(node_id=node_id, lanes=lanes):
                    host = self._cluster.hosts[node_id].hostname
                    self._say(f"checking {host}: {len(lanes)} engines side by side and alone")
                    self._pool.check(command)
                case events.Inspect(group=group):
                    if group is not None:
                        self._say(f"{self._place(command.lane_id)} fails group after group: trying")
                    self._pool.inspect(command)
                case events.Withhold(lane=lane):
                    self._pool.withhold(lane.lane_id)
                    self._tracker.closed(lane.lane_id)
                case events.Request(needs=needs):
                    self._cluster.request(needs)

    def _found(self, lane_id: int, found: Found) -> None:
        """Tells what an inspection found, and goes on without the devices if they are unfit."""
        if found.problems:
            self._say(
                f"{self._place(lane_id)} is withheld until this run ends: "
                f"{'; '.join(found.problems)}. `--rerun crashed,timeout` repeats what failed there"
            )
        self._on(events.Inspected(lane_id=lane_id, sound=not found.problems, at=self._at()))

    def _place(self, lane_id: int) -> str:
        """A lane's devices in words."""
        lane = self._schedule.lanes[lane_id]
        hosts = ", ".join(self._cluster.hosts[name].hostname for name in events.nodes_of(lane))
        names = ", ".join(self._pool.devices_of(lane_id))
        return f"GPU {names} of {hosts}" if names else hosts

    def _compared(self, found: Compared) -> None:
        """Notes what a check of a node found, and goes on there."""
        node_id, packing = found.node_id, found.packing
        self._say(f"{self._cluster.hosts[node_id].hostname}: {packing.told()}")
        self._packings[node_id] = packing
        self._note_node(node_id)
        self._on(events.Checked(node_id=node_id, side_by_side=packing.unchanged, at=self._at()))

    def _known_packings(self) -> dict[str, Packing]:
        """What earlier runs of this dataset found out on the same machines with the same
        engine. A check that failed is made again."""
        if self._request.fresh:
            return {}
        found: dict[str, Packing] = {}
        runs = manifest.read(self._dataset.manifest, self._sweep.name)["runs"]
        for told in (node for run in runs for node in run["environment"]["nodes"].values()):
            for node_id, host in self._cluster.hosts.items():
                same = {name: told.get(name) for name in asdict(host)} == hide(asdict(host))
                packing = told.get("side_by_side")
                if same and packing is not None and packing["ratio"] is not None:
                    found[node_id] = Packing(**packing)
        return found

    def _commit(self, finished: Sequence[Finished]) -> None:
        """Rows of trials that ended, before anybody else hears of it. What probes found comes
        first: whoever kills the driver in between leaves a sheet too many, and none is lost."""
        if finished:
            self._shelf.keep(finished)
            self._dataset.commit(
                self._run_id,
                records=[one.record for one in finished],
                samples=[one.samples for one in finished if one.samples is not None],
                activations=[one.activations for one in finished if one.activations is not None],
            )
            self._made.update(one.outcome for one in finished)

    def _end(
        self, group_id: str | None, outcome: Outcome, records: Sequence[pa.RecordBatch]
    ) -> None:
        """Terminal records that no engine writes, of trials of one group."""
        self._dataset.commit(self._run_id, records=records)
        self._made[outcome] += len(records)
        for one in records:
            self._tracker.ended(group_id, one)

    def _blame(self, blame: events.Blame, error: TrialError) -> None:
        """Terminal records of trials whose host can no longer write them."""
        local = blame.node_id == self._cluster.driver_node
        job = self._pool.job(blame.group, blame.attempts, local=local)
        if job.log_name is None or not (self._dataset.folder / job.log_name).is_file():
            job = replace(job, log_name=None)  # it went with its node
        hosts = self._cluster.hosts
        host = hosts[blame.node_id] if blame.node_id else next(iter(hosts.values()))
        columns = recorder.where(host)
        records = [recorder.failed(job, ticket, error, **columns) for ticket in job.tickets]
        self._end(blame.group.group_id, error.outcome, records)

    def _skip(self, group: Group, witness: str) -> None:
        """Terminal records of trials that a witness makes pointless."""
        attempts = {one.trial_id: 1 for one in group.trials}
        job = replace(self._pool.job(group, attempts, local=False), log_name=None)
        columns = self._host_columns(group)
        records = [recorder.skipped(job, ticket, witness, **columns) for ticket in job.tickets]
        self._end(group.group_id, "skipped", records)

    def _host_columns(self, group: Group) -> dict[str, Any]:
        """The machine on which a group would have run."""
        asked = group.trials[0].trial.layout.device
        name = asked if asked in (None, CPU) else device(asked).name
        fitting = [node for node in self._cluster.nodes if name in (None, node.device_class)]
        return recorder.where(self._cluster.hosts[fitting[0].node_id]) if fitting else {}

    def _abandon(self, given_up: events.Abandon) -> None:
        """Terminal records of trials for which no node came. A deadline passed, and nothing
        was found out about the trial: `timeout`, which `--rerun timeout` takes up again."""
        wait = span(self._request.node_wait_s)
        error = TimedOut(f"{given_up.reason}, and no such node came within {wait}")
        self._say(str(error))
        attempts = {name: max(1, number) for name, number in given_up.attempts.items()}
        job = replace(self._pool.job(given_up.group, attempts, local=False), log_name=None)
        records = [recorder.failed(job, ticket, error) for ticket in job.tickets]
        self._end(given_up.group.group_id, "timeout", records)

    def _write_infeasible(self) -> None:
        job = Job(
            sweep=self._sweep.name,
            run_id=self._run_id,
            group_id=None,
            profile=self._sweep.profile,
            tickets=(),
        )
        for start in range(0, len(self._infeasible), AT_ONCE):
            records = []
            for one in self._infeasible[start : start + AT_ONCE]:
                assert one.infeasible is not None
                ticket = Ticket(
                    trial=one.trial, trial_id=one.trial_id, axes=one.axes, digests=one.digests
                )
                records.append(recorder.failed(job, ticket, one.infeasible))
            self._end(None, "infeasible", records)

    def _earlier(self, rerun: frozenset[Rerun]) -> dict[str, Outcome]:
        """Trials that an earlier run settled on machines like the ones in hand."""
        if self._request.fresh:
            return {}
        records = self._records()
        runs = manifest.read(self._dataset.manifest, self._sweep.name)["runs"]
        done: dict[str, Outcome] = {}
        for guard in self._guards():
            done |= settled(records, guard=guard, rerun=rerun, runs=runs)
        return done

    def _recall(self, resumed: Mapping[str, Outcome]) -> None:
        """Counts why earlier runs did not measure the trials that this one takes from them."""
        without = [trial_id for trial_id, outcome in resumed.items() if outcome != "ok"]
        if not without:
            return
        columns = ("trial_id", "outcome", "outcome_reason", "log", "finished_at")
        found = self._dataset.finished(columns).filter(pl.col("trial_id").is_in(without))
        newest = {
            row["trial_id"]: row
            for row in found.sort("finished_at").to_dicts()
            if row["outcome"] == resumed[row["trial_id"]]
        }
        for row in newest.values():
            self._tracker.reasons.add(None, row["outcome"], row["outcome_reason"], row["log"])

    def _records(self) -> pl.DataFrame:
        more = ("group_id", "oom_stage", "oom_scope", *vouching.COLUMNS)
        return self._dataset.finished((*RESUME, *more))

    def _of_earlier(self) -> Iterator[str | None]:
        """What there is to say of the models and machines behind earlier records."""
        if self._request.fresh:
            return
        yield vouching.models(self._records(), self._plan.named_ids())
        hosts = {host.device_digest: host.device_facts for host in self._cluster.hosts.values()}
        guards = {(one, hosts.get(one.device_digest)) for one in self._guards()}
        yield from vouching.machines(self._records(), self._settled.keys(), guards)

    def _of_devices(self) -> Iterator[str | None]:
        """What there is to say of the GPUs that this run begins with."""
        yield from dict.fromkeys(self._cluster.refused.values())
        for node in self._cluster.nodes:
            host = self._cluster.hosts[node.node_id]
            yield remark(host)
            for name, found in self._cluster.occupied[node.node_id].items():
                if found.used_bytes > CLEAN_BYTES:
                    yield f"{name} of {host.hostname}, before the first group: {found}"

    def _exhausted(self) -> Iterator[schedule.Exhausted]:
        """What an earlier run found out of device memory, with what its engine held besides.

        A group of which a trial is no longer in the sweep proves nothing: memory may have run
        out for that trial.
        """
        if "oom" not in self._settled.values():
            return
        planned = {one.trial_id: one for group in self._plan.groups for one in group.trials}
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self._records().filter(pl.col("group_id").is_not_null()).to_dicts():
            groups.setdefault((row["run_id"], row["group_id"]), []).append(row)
        for rows in groups.values():
            together = [planned.get(row["trial_id"]) for row in rows]
            for row in rows:
                trial_id = row["trial_id"]
                if (
                    row["oom_scope"] == "device"
                    and row["engine"] != "roofline"
                    and self._settled.get(trial_id) == "oom"
                    and all(together)
                ):
                    yield schedule.Exhausted(
                        one=planned[trial_id],
                        stage=row["oom_stage"],
                        together=tuple(one for one in together if one is not None),
                    )

    def _guards(self) -> Iterator[Guard]:
        """The environments in which a result would be made now."""
        trials = [group.trials[0].trial for group in self._plan.groups]
        trials += [one.trial for one in self._plan.infeasible]
        for kind, asked in {(one.engine.kind, one.layout.device) for one in trials}:
            if kind == "roofline":
                target = roofline.device_name(asked or self._sweep.profile)
                yield Guard(engine=kind, engine_version=roofline.VERSION, device=target)
                continue
            for host in self._cluster.hosts.values():
                yield Guard(
                    engine=kind,
                    engine_version=host.engine_version,
                    device=host.device,
                    device_digest=host.device_digest,
                )

    def _open_manifest(self) -> None:
        state = manifest.started(
            manifest.read(self._dataset.manifest, self._sweep.name),
            self._run_id,
            at=datetime.now(UTC),
            command=sys.argv,
            profile=self._sweep.profile,
            sweep=self._sweep.resolved,
            driver=manifest.environment(),
        )
        for node_id in self._cluster.hosts:
            state = manifest.with_node(state, self._run_id, node_id, self._told(node_id))
        manifest.write(self._dataset.manifest, state)

    def _note_node(self, node_id: str) -> None:
        state = manifest.read(self._dataset.manifest, self._sweep.name)
        told = self._told(node_id)
        manifest.write(
            self._dataset.manifest, manifest.with_node(state, self._run_id, node_id, told)
        )

    def _told(self, node_id: str) -> dict[str, Any]:
        """What the manifest says of a node."""
        packing = self._packings.get(node_id)
        host = asdict(self._cluster.hosts[node_id])
        return host | ({"side_by_side": asdict(packing)} if packing is not None else {})

    def _close_manifest(self) -> None:
        state = manifest.read(self._dataset.manifest, self._sweep.name)
        state = manifest.finished(state, self._run_id, at=datetime.now(UTC), counts=self._made)
        manifest.write(self._dataset.manifest, state)


def _end_stuck(run: _Run, errors: TextIO) -> NoReturn:
    """Ends a driver that waits within Ray for a head that is gone, before Ray does it."""
    print(f"error: the head of the Ray cluster is gone; {run.safe()}", file=errors, flush=True)
    os._exit(3)


class _EventLog:
    """One JSON line per event, each on disk when `write` returns, as far as the process goes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        json.dump(line, self._file, separators=(",", ":"))
        self._file.write("\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _ended(lane_id: int, finished: Finished, at: float) -> events.TrialEnded:
    """The event of a terminal record. Memory counts as exhausted where a device's was, and
    where that was measured."""
    row = finished.record.select(["oom_scope", "oom_stage", "engine"]).to_pylist()[0]
    exhausted = (
        finished.outcome == "oom" and row["oom_scope"] == "device" and row["engine"] != "roofline"
    )
    return events.TrialEnded(
        lane_id=lane_id,
        trial_id=finished.trial_id,
        exhausted=exhausted,
        stage=row["oom_stage"] if exhausted else None,
        failed=finished.outcome in FAULTS,
        at=at,
    )


def _cluster_profile(cluster: Cluster) -> str | None:
    """The class of device to plan for; null where no node is there yet."""
    classes = {
        node.device_class or device_class(cluster.hosts[node.node_id]) for node in cluster.nodes
    }
    return min(classes, default=None)


def _devices(cluster: Cluster) -> str:
    kinds = Counter(_kind(cluster.hosts[node.node_id]) for node in cluster.nodes)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _kind(host: Host) -> str:
    return f"{host.gpus} {host.device}" if host.gpus else host.device


@contextmanager
def _scrubbed(logs: Path, sweep: Sweep) -> Iterator[None]:
    """Takes secrets out of the logs, in the end and, where a driver died, in the beginning.

    Engines print their arguments, and nobody can keep them from it.
    """
    known = known_secrets(sweep.resolved)
    scrub(logs, known)
    try:
        yield
    finally:
        for path in scrub(logs, known):
            print(f"secrets may be left in {path}: it cannot be written to", file=sys.stderr)
