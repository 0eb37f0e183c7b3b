"""One run of the command line under a fault, resumed until it ends, and what is then on disk.

Everything that a run starts carries a word in its environment and has a folder of its own for
temporary files, so that what it leaves behind can be told from what others do on the machine.
Shared memory has no owner that outlives its process: there the names before and after are
compared, and only one scene should run at a time.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pyarrow as pa
import yaml

from orchestrator.cluster import SESSION
from orchestrator.manifest import Manifest, read
from orchestrator.request import Request, prepare
from orchestrator.store import RESUME, Guard, settled
from tests.integration.harness import command, forks_of, hear_ctrl_c, until
from workers.folders import FRESH_S

ROOT = Path(__file__).resolve().parents[2]
TAG = "MOE_FAULT"
"""Environment variable that a scene's processes carry."""
SHARED = Path("/dev/shm")
GRACE_S = 20.0
"""Time that hosts and engines have to end after their driver did, seconds."""
AGENTS_S = 90.0
"""Time that two idle processes of Ray have to end after their node was killed, seconds: they
report it to a head that is gone, which they wait for."""
ENGINES = ("EngineHost", "forkserver", "nursery", "VLLM")
"""Words in the names and command lines of hosts and engines."""
LONGEST_S = 280.0
"""A driver that runs for longer hangs, seconds."""
MOST_RESUMES = 3
COLUMNS = (
    *RESUME,
    "outcome_reason",
    "oom_stage",
    "oom_scope",
    "axes",
    "schema_version",
    "engine_load_s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What records of trials must say that a fault keeps from being `ok`."""

    outcome: str
    reason: str = ""
    """A pattern that is found in `outcome_reason`."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """Trials at this point of the sweep, and no others."""
    stage: str | None = None
    scope: str | None = None
    least: int = 1
    most: int = 1

    def fits(self, row: Mapping[str, Any]) -> bool:
        told = (row["outcome"], row["oom_stage"], row["oom_scope"])
        if told != (self.outcome, self.stage, self.scope) or not self.about(row):
            return False
        return re.search(self.reason, row["outcome_reason"] or "") is not None

    def about(self, row: Mapping[str, Any]) -> bool:
        axes = json.loads(row["axes"] or "{}")
        return all(axes.get(key) == value for key, value in self.axes.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault, and what must come of it."""

    name: str
    what: str
    sweep: Mapping[str, Any]
    inject: Callable[[Scene], None]
    """Called when the driver has been started; returns when the fault is in."""
    expected: Sequence[Expected] = ()
    """Trials that match none of these must be `ok`."""
    status: Sequence[int] = (0,)
    """Exit statuses that the run with the fault may have; negative for a signal."""
    says: str = ""
    """A pattern that is found in what the driver printed, if it was not killed."""
    prepare: Callable[[Scene], AbstractContextManager[Any]] = field(
        default=lambda scene: nullcontext()
    )
    """What stands around both runs: a cluster, a mounted disk."""
    mend: Callable[[Scene], None] = field(default=lambda scene: None)
    """Called between the fault and the resume."""
    verify: Callable[[Scene, pl.DataFrame], Iterable[str]] = field(default=lambda scene, frame: ())
    """What else is wrong, given every record."""
    arguments: Sequence[object] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = GRACE_S
    """Time that hosts and engines have to end after the driver did, seconds."""
    vanish: bool = False
    """The fault destroys records that were there; their trials run again."""
    times: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What came of one injection."""

    fault: str
    seed: int
    at: str
    planned: int
    before: int
    """Trials with a record when the run was resumed."""
    lost: int
    """Trials without a record in the end, or whose record went away."""
    doubled: int
    """Trials with more than one record in one run."""
    again: int
    """Trials that had a record and were run once more."""
    unreadable: int
    """Files of the dataset that do not open."""
    right: int
    """Trials whose deciding record says what it must."""
    wrong: list[str]
    """Everything that is not as it must be, typing included."""
    left_first: list[str]
    """Left behind before the resume."""
    left: list[str]
    """Left behind after it."""
    gone_s: float | None
    """From the driver's end to that of the last host and engine; null if one stayed."""
    status: list[int | None]
    seconds: float
    notes: list[str]

    @property
    def typed(self) -> bool:
        return self.right == self.planned and not self.wrong


class Scene:
    """A sweep in a folder of its own, its driver, and what can be done to it."""

    def __init__(self, fault: Fault, seed: int, length_s: float | None = None) -> None:
        self.fault, self.seed, self.length_s = fault, seed, length_s
        self.rng = random.Random(f"{fault.name} {seed}")
        self.word = secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="moe-fault-"))
        self.temporary = Path(tempfile.mkdtemp(prefix="f"))  # short: Ray's sockets lie in it
        self.out = self.folder / "out"
        self.out.mkdir()
        self.path = self.folder / f"{fault.sweep['name']}.yaml"
        self.path.write_text(yaml.safe_dump(dict(fault.sweep), sort_keys=False))
        self.cwd = ROOT
        self.arguments: list[object] = list(fault.arguments)
        self.environment = {
            **os.environ,
            TAG: self.word,
            "TMPDIR": str(self.temporary),
            "SPT_NOENV": "1",  # Ray's titles would be written over the environment
            "PYTHONPATH": "",
            **fault.environment,
        }
        self.shared_cluster = False
        """Ray is not the driver's own: it stays when the driver ends."""
        self.nodes: Any = None
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.driver: subprocess.Popen[bytes]
        self._drivers = 0
        self._earlier: set[int] = set()
        """Processes of a cluster that was there before the driver."""

    @property
    def dataset(self) -> Path:
        return self.out / str(self.fault.sweep["name"])

    # --- the driver

    def command(self) -> list[str]:
        return command(self.path, "--out", self.out, "--plain", *self.arguments)

    def start(self) -> None:
        """Starts a driver, which prints into files."""
        self._drivers += 1
        with self.printed("out").open("wb") as out, self.printed("err").open("wb") as err:
            self.driver = subprocess.Popen(
                self.command(),
                cwd=self.cwd,
                env=self.environment,
                stdout=out,
                stderr=err,
                process_group=0,
                preexec_fn=hear_ctrl_c,
            )

    def printed(self, stream: str) -> Path:
        return self.folder / f"driver-{self._drivers}.{stream}"

    def said(self) -> str:
        return self.printed("out").read_text() + self.printed("err").read_text()

    def end(self, longest_s: float = LONGEST_S) -> int | None:
        """The driver's exit status; null if it had to be killed because it hangs."""
        try:
            return self.driver.wait(longest_s)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"the driver hangs: not ended after {longest_s:.0f} s")
            self.driver.kill()
            self.driver.wait()
            return None

    # --- moments

    def sleep(self, low: float, high: float) -> None:
        """Waits a while, by chance."""
        pause = self.rng.uniform(low, high)
        self.notes.append(f"after {pause:.2f} s")
        time.sleep(pause)

    def until(self, what: Callable[[], Any], timeout: float = 120) -> Any:
        """Waits until something is true while the driver lives."""

        def or_over() -> Any:
            assert self.driver.poll() is None, f"the driver ended: {self.said()[-500:]}"
            return what()

        return until(or_over, timeout)

    def logged(self, words: str) -> bool:
        """Whether an engine has printed this."""
        logs = [one for one in self.dataset.rglob("logs/*/*.log") if one.name != "driver.log"]
        return any(words in one.read_text(errors="replace") for one in logs)

    def loading(self) -> None:
        """Waits until the first engine is being built."""
        self.until(lambda: any(self.dataset.glob("logs/*/*.log")))

    def measuring(self) -> None:
        """Waits until the first engine is built."""
        self.until(lambda: self.logged("init engine"))

    def committed(self, least: int = 1) -> None:
        """Waits for records."""
        self.until(lambda: self.records().height >= least)

    # --- processes

    def tree(self) -> list[psutil.Process]:
        """Every living process that carries the scene's word, the driver included."""
        return [one for one in psutil.process_iter() if self._ours(one)]

    def _ours(self, one: psutil.Process) -> bool:
        try:
            if one.pid == os.getpid() or one.status() == psutil.STATUS_ZOMBIE:
                return False
            tagged = f"{TAG}={self.word}".encode() in Path(f"/proc/{one.pid}/environ").read_bytes()
            return tagged or str(self.temporary) in " ".join(one.cmdline())
        except (psutil.Error, OSError):
            return False

    def named(self, word: str) -> list[psutil.Process]:
        """Processes of the scene with a word in their name or command line."""
        found = []
        for one in self.tree():
            with suppress(psutil.Error):
                if word in one.name() or word in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def host(self) -> psutil.Process:
        """The one host that works."""
        found: list[psutil.Process] = self.until(lambda: self.named("EngineHost"))
        return found[0]

    def forks(self) -> list[psutil.Process]:
        """The host's fork server and its forks, eldest first."""
        return forks_of(self.host())

    def engine(self) -> psutil.Process:
        """The fork in which the engine runs."""
        return self.until(lambda: self.forks()[1:] or None)[0]

    # --- what is on disk

    def records(self) -> pl.DataFrame:
        """Every record that can be read now, files one by one."""
        return self._read()[0]

    def _read(self) -> tuple[pl.DataFrame, int]:
        tables, bad = [], 0
        for path in sorted(self.dataset.glob("records/*.arrow")):
            try:
                with pa.OSFile(str(path), "rb") as file:
                    tables.append(pa.ipc.open_file(file).read_all().select(COLUMNS))
            except FileNotFoundError:
                continue  # merged meanwhile
            except (pa.ArrowException, OSError, KeyError):
                bad += 1
        if not tables:
            return pl.DataFrame({name: [] for name in COLUMNS}), bad
        frame = pl.DataFrame(pa.concat_tables(tables))
        return frame, bad

    def engines_gone(self) -> float | None:
        """Seconds until no host and no engine lives any more; null if one stays for long."""
        began = time.monotonic()
        while any(one.pid not in self._earlier for word in ENGINES for one in self.named(word)):
            if time.monotonic() > began + self.fault.grace_s:
                return None
            time.sleep(0.05)
        return round(time.monotonic() - began, 2)

    def left(self, before: set[str], grace_s: float) -> list[str]:
        """What is there beyond `before`, after a grace for dying processes."""
        deadline = time.monotonic() + grace_s
        while (found := self._traces() - before) and time.monotonic() < deadline:
            if not any(one.startswith("process ") for one in found):
                break
            time.sleep(0.1)
        return sorted(found)

    def _traces(self) -> set[str]:
        processes = set()
        for one in self.tree():
            with suppress(psutil.Error):
                line = " ".join(one.cmdline()) or one.name()
                if self.shared_cluster and not any(word in line for word in ENGINES):
                    continue
                processes.add(f"process {one.pid} {line[:70]}")
        shared = {str(path) for path in SHARED.iterdir()}
        return processes | shared | {str(path) for path in self.temporary.iterdir()}

    def clear(self) -> None:
        """Takes down whatever is left; only what the scene itself started."""
        for one in self.tree():
            with suppress(psutil.Error):
                one.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def play(fault: Fault, seed: int, length_s: float | None = None, keep: bool = False) -> Row:
    """One injection: a run with the fault, resumes until the sweep ends, a look at everything."""
    scene = Scene(fault, seed, length_s)
    began = time.monotonic()
    try:
        with ExitStack() as around:
            around.enter_context(fault.prepare(scene))
            return _play(scene, began)
    finally:
        if keep:
            print(f"kept {scene.folder} and {scene.temporary}")
        else:
            scene.clear()


def _play(scene: Scene, began: float) -> Row:
    fault, status = scene.fault, list[int | None]()
    traces = scene._traces()
    scene._earlier = {one.pid for one in scene.tree()}
    scene.start()
    try:
        fault.inject(scene)
    except AssertionError as error:
        scene.wrong.append(f"the fault was not injected: {error}")
    status.append(scene.end())
    ended = time.monotonic()
    gone_s = scene.engines_gone()
    left_first = scene.left(traces, 0.0)
    if status[0] is not None and status[0] not in fault.status:
        scene.wrong.append(f"status {status[0]}: {_tail(scene.said())}")
    if status[0] is not None and status[0] >= 0:
        scene.wrong += _words(scene, fault.says)
    first, bad = scene._read()
    if bad and not fault.vanish:
        scene.wrong.append(f"{bad} files do not open after the fault")
    fault.mend(scene)
    if any(SESSION in one for one in left_first):
        time.sleep(FRESH_S)
    for _ in range(MOST_RESUMES):
        scene.start()
        status.append(scene.end())
        missing = plan(scene) - set(scene._read()[0]["trial_id"])
        if status[-1] in (0, 1) and not missing:
            break
        if status[-1] in (0, 1):
            words = _tail(scene.said())
            scene.wrong.append(f"status {status[-1]}, {len(missing)} without a record: {words}")
    if status[-1] not in (0, 1):
        scene.wrong.append(f"resumed with status {status[-1]}: {_tail(scene.said())}")
    left = [one for one in scene.left(traces, 3.0) if not _agent(one, left_first, ended)]
    frame, unreadable = scene._read()
    planned = plan(scene)
    deciding = decided(frame, read(scene.dataset / "manifest.json", scene.fault.sweep["name"]))
    right, wrong = judge(fault, planned, deciding)
    wrong += fault.verify(scene, frame)
    return Row(
        fault=fault.name,
        seed=scene.seed,
        at=time.strftime("%Y-%m-%d %H:%M"),
        planned=len(planned),
        before=first["trial_id"].n_unique(),
        lost=_lost(planned, first, frame, fault.vanish),
        doubled=_doubled(frame),
        again=0 if fault.vanish else _again(first, frame),
        unreadable=unreadable,
        right=right,
        wrong=[*scene.wrong, *wrong],
        left_first=left_first,
        left=left,
        gone_s=gone_s,
        status=status,
        seconds=round(time.monotonic() - began, 1),
        notes=scene.notes,
    )


def _agent(trace: str, left_first: Sequence[str], ended: float) -> bool:
    """Whether this is one of Ray's agents, in the time that it has to find out."""
    return (
        trace in left_first
        and re.search("ray::(DashboardAgent|RuntimeEnvAgent)", trace) is not None
        and time.monotonic() < ended + AGENTS_S
    )


def plan(scene: Scene) -> set[str]:
    """Identities of the trials that are owed a record."""
    given = [str(one) for one in scene.arguments]
    profile = given[given.index("--profile") + 1] if "--profile" in given else "cpu"
    _, planned = prepare(Request(sweep=scene.path), profile)
    trials = [one for group in planned.groups for one in group.trials]
    return {one.trial_id for one in (*trials, *planned.infeasible)}


def decided(frame: pl.DataFrame, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The record of each trial that the store lets decide."""
    runs = manifest["runs"]
    outcomes = settled(frame, guard=Guard(engine_version=None, device=None), runs=runs)
    known = [run["run_id"] for run in runs]
    rows = [row for run_id in known for row in frame.filter(run_id=run_id).to_dicts()]
    rows = frame.filter(~pl.col("run_id").is_in(known)).to_dicts() + rows
    newest = {row["trial_id"]: row for row in rows}
    assert all(newest[name]["outcome"] == outcome for name, outcome in outcomes.items())
    return {name: newest[name] for name in outcomes}


def judge(
    fault: Fault, planned: set[str], deciding: Mapping[str, Mapping[str, Any]]
) -> tuple[int, list[str]]:
    """Trials whose record says what it must, and what is wrong with the others."""
    wrong, right = [], 0
    hits: Counter[int] = Counter()
    for name in sorted(planned & deciding.keys()):
        row = deciding[name]
        number = next((i for i, one in enumerate(fault.expected) if one.fits(row)), None)
        if number is not None:
            hits[number] += 1
            right += 1
        elif row["outcome"] == "ok" and not any(
            one.axes and one.least and one.about(row) for one in fault.expected
        ):
            right += 1
        else:
            told = {k: row[k] for k in ("outcome", "outcome_reason", "oom_stage", "oom_scope")}
            wrong.append(f"trial {name}: {told} at {row['axes']}")
    for number, one in enumerate(fault.expected):
        if not one.least <= hits[number] <= one.most:
            wrong.append(f"{hits[number]} trials are {one.outcome} ({one.reason})")
    if strangers := deciding.keys() - planned:
        wrong.append(f"{len(strangers)} records of trials that nobody planned")
    return right, wrong


def _lost(planned: set[str], first: pl.DataFrame, frame: pl.DataFrame, vanish: bool) -> int:
    missing = planned - set(frame["trial_id"])
    kept = set(frame.select("run_id", "trial_id", "attempt").iter_rows())
    gone = set(first.select("run_id", "trial_id", "attempt").iter_rows()) - kept
    return len(missing) + (0 if vanish else len(gone))


def _doubled(frame: pl.DataFrame) -> int:
    counts = Counter(frame.select("run_id", "trial_id").iter_rows())
    return sum(count > 1 for count in counts.values())


def _again(first: pl.DataFrame, frame: pl.DataFrame) -> int:
    runs = set(first["run_id"])
    later = {trial for run, trial in frame.select("run_id", "trial_id").iter_rows()
             if run not in runs}  # fmt: skip
    return len(later & set(first["trial_id"]))


def _words(scene: Scene, pattern: str) -> Iterator[str]:
    said = scene.said()
    if "Traceback" in said:
        yield f"a traceback: {_tail(said)}"
    if pattern and not re.search(pattern, said):
        yield f"does not say {pattern!r}: {_tail(said)}"


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-4:])[-600:]


def kill(process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to a process of the scene, which must have been there to receive it."""
    process.send_signal(number)
