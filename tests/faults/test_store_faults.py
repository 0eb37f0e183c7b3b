"""What must survive: drivers killed at any instant, full disks, locked and read-only folders.

Drivers die here by a real SIGKILL. They are forked from one prepared process, so that a
death costs milliseconds and many moments can be tried.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest

from orchestrator import store
from orchestrator.store import Dataset, StoreError
from workers.contract.record import RECORDS, SAMPLES, rows

pytestmark = pytest.mark.lengthy

ROOT = Path(__file__).resolve().parents[2]

NURSERY = '''
# Forks a driver per line of input (MODE, OUT, RUN, NUMBER between tabs), says pid and end.
import itertools, os, signal, sys
from pathlib import Path
from orchestrator.store import Dataset
sys.path.insert(0, "tests/faults")
from test_store_faults import batches

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def commits(out, run, number):
    dataset = Dataset.open(out, "s")
    for i in itertools.count():
        commit(dataset, run, f"{run}-{i}")
        if number and i % number == number - 1:
            dataset.compact()

def commit(dataset, run, trial):
    records, samples = batches(run, trial)
    dataset.commit(run, records=records, samples=samples)
    say("kept", trial)

def dies_in(work, number):
    """Runs `work`, and SIGKILLs itself just before it touches the disk for the nth time."""
    left = number
    def hook(event, arguments):
        nonlocal left
        if event == "open" or event.startswith("os."):
            left -= 1
            if not left:
                signal.raise_signal(signal.SIGKILL)
    sys.addaudithook(hook)
    work()
    left = 0

def driver(mode, out, run, number):
    if mode == "commits":
        commits(out, run, number)
    else:
        dataset = Dataset.open(out, "s")
        records, samples = batches(run, f"{run}-0")
        dies_in({
            "compact": dataset.compact,
            "commit": lambda: dataset.commit(run, records=records, samples=samples),
        }[mode], number)
        say("kept", f"{run}-0")

for line in sys.stdin:
    mode, out, run, number = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        driver(mode, Path(out), run, int(number))
        os._exit(0)
    say("pid", pid)
    say("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
'''


def batches(run_id: str, trial_id: str) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """One record and its two samples."""
    now = datetime.now(UTC)
    key = {"run_id": run_id, "trial_id": trial_id, "attempt": 1}
    record = {
        **key,
        "schema_version": 1,
        "sweep": "s",
        "outcome": "ok",
        "finished_at": now,
    }
    sample = {**key, "kind": "timed", "started_at": now, "token_s": [[0.5, 1.0]]}
    return rows(RECORDS, [record]), rows(SAMPLES, [{**sample, "repeat": i} for i in range(2)])


class Nursery:
    """The process that drivers are forked from."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def drive(
        self,
        mode: str,
        out: Path,
        run: str,
        number: int,
        *,
        before_its_death: Callable[[], None] | None = None,
    ) -> tuple[list[str], int]:
        """Trials whose commit returned, and the driver's exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{mode}\t{out}\t{run}\t{number}\n")
        kept: list[str] = []
        for line in self.process.stdout:
            word, value = line.split()
            if word == "pid" and before_its_death is not None:
                try:
                    before_its_death()
                finally:
                    os.kill(int(value), signal.SIGKILL)
            elif word == "kept":
                kept.append(value)
            elif word == "end":
                return kept, int(value)
        raise AssertionError("the nursery died")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    with nursery.process as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def seen(dataset: Path, table: str = "records") -> list[str]:
    """Trials that both promised readers find, and the same ones in both."""
    folder = dataset / table
    by_polars = pl.scan_ipc(folder).collect()["trial_id"].to_list()
    by_arrow = pyarrow.dataset.dataset(folder, format="ipc").to_table()["trial_id"].to_pylist()
    assert sorted(by_polars) == sorted(by_arrow)
    return sorted(by_polars)


def check(out: Path, kept: set[str]) -> None:
    """Nothing lost before the next driver opens the dataset, nothing doubled after."""
    for table in ("records", "samples"):
        folder = out / "s" / table
        if folder.exists() and any(folder.iterdir()):
            assert kept <= set(seen(out / "s", table))
        else:
            assert not kept
    with Dataset.open(out, "s") as dataset:
        records, samples = seen(out / "s"), seen(out / "s", "samples")
        assert len(records) == len(set(records))
        assert kept <= set(records)
        assert len(samples) == 2 * len(set(samples))
        assert set(records) <= set(samples)
        assert sorted(dataset.finished()["trial_id"]) == records
        assert dataset.warnings == []


@pytest.mark.parametrize("compact_every", [0, 3], ids=["commits", "compaction"])
def test_a_killed_driver_loses_nothing(
    nursery: Nursery, tmp_path: Path, compact_every: int
) -> None:
    """Twenty deaths, and more where a busy machine leaves the driver little done before them."""
    moment = random.Random(20250101 + compact_every)
    kept: set[str] = set()
    for death in count():
        if death >= 20 and len(kept) > 20:
            break
        more, status = nursery.drive(
            "commits",
            tmp_path,
            f"run{death}",
            compact_every,
            before_its_death=partial(time.sleep, moment.uniform(0.0, 0.2)),
        )
        kept |= set(more)
        assert status == -signal.SIGKILL
        check(tmp_path, kept)


def test_readers_beside_a_busy_driver_never_miss_a_row(nursery: Nursery, tmp_path: Path) -> None:
    """A merge may make them read again, or meet a row twice for a moment; no more than that."""
    Dataset.open(tmp_path, "s").close()
    folder = tmp_path / "s" / "records"
    trials: set[str] = set()
    reads = 0

    def read() -> None:
        nonlocal reads, trials
        end = time.monotonic() + 1.5
        readers = [
            lambda: pl.scan_ipc(folder).collect(),
            lambda: pl.DataFrame(pyarrow.dataset.dataset(folder, format="ipc").to_table()),
        ]
        while time.monotonic() < end or reads <= 10 or len(trials) <= 10:
            with suppress(FileNotFoundError):
                found = set(readers[reads % 2]()["trial_id"])
                assert trials <= found
                trials = found
                reads += 1

    kept, _ = nursery.drive("commits", tmp_path, "run", 3, before_its_death=read)
    assert trials <= {*kept, f"run-{len(kept)}"}
    check(tmp_path, set(kept))


def test_death_at_every_step_of_a_compaction_loses_nothing(
    nursery: Nursery, tmp_path: Path
) -> None:
    template = tmp_path / "template"
    dataset = Dataset.open(template, "s")
    trials = {f"old-{i}" for i in range(3)}
    for trial in sorted(trials):
        records, samples = batches("old", trial)
        dataset.commit("old", records=records, samples=samples)
    dataset._release()  # without the merge that close() makes
    deaths = die_at_every_step(nursery, "compact", template, tmp_path / "work", trials)
    assert deaths > 10


def test_death_at_every_step_of_a_commit_loses_nothing(nursery: Nursery, tmp_path: Path) -> None:
    template = tmp_path / "template"
    with Dataset.open(template, "s") as dataset:
        records, samples = batches("old", "old-0")
        dataset.commit("old", records=records, samples=samples)
    deaths = die_at_every_step(nursery, "commit", template, tmp_path / "work", {"old-0"})
    assert deaths > 4


def die_at_every_step(
    nursery: Nursery, mode: str, template: Path, work: Path, trials: set[str]
) -> int:
    """Kills drivers before step 1, 2, 3, … on disk of an operation until one gets through."""
    for step in range(1, 200):
        shutil.copytree(template, work)
        kept, status = nursery.drive(mode, work, "new", step)
        if status == 0:
            return step
        assert status == -signal.SIGKILL
        assert kept == []
        check(work, trials)
        shutil.rmtree(work)
    raise AssertionError(f"{mode} never ended")


@contextmanager
def file_size_limit(dataset: Path) -> Iterator[None]:
    """A disk that takes 16 KiB per file: the same refusal in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def filled(dataset: Path) -> Iterator[None]:
    """Whatever room is left on the dataset's (small) disk is taken."""
    ballast = dataset.parent / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 1 MiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_takes_no_more(tmp_path: Path, small_disk: Path | None) -> None:
    """On a really full disk too where one can be mounted, under a file size limit anywhere."""
    full = [(tmp_path, file_size_limit, "File too large")]
    if small_disk is not None:
        full.append((small_disk, filled, "No space left on device"))
    for out, trouble, words in full:
        dataset = Dataset.open(out, "s")
        first, second = batches("r", "first"), batches("r", "second")
        dataset.commit("r", records=first[0], samples=first[1])
        files = sorted(path for path in dataset.folder.rglob("*") if path.is_file())
        with trouble(dataset.folder):
            with pytest.raises(StoreError, match=words) as caught:
                dataset.commit("r", records=second[0], samples=second[1])
            assert str(dataset.folder) in str(caught.value)
            assert seen(dataset.folder) == ["first"]
            assert sorted(p for p in dataset.folder.rglob("*") if p.is_file()) == files
            with pytest.raises(StoreError, match=words):
                dataset.compact()
            assert seen(dataset.folder) == ["first"]
        dataset.commit("r", records=second[0], samples=second[1])
        dataset.close()
        check(out, {"first", "second"})


def test_a_merge_that_fails_does_not_fail_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SMALL_FILES", 3)
    dataset = Dataset.open(tmp_path, "s")
    staging = dataset.folder / ".staging"
    for i in range(2):
        dataset.commit("r", records=batches("r", f"t{i}")[0])
    # The merge meets a folder where it wants to move a stranger's file to.
    (dataset.records / "stranger.txt").write_text("x")
    dataset.quarantine.write_text("a file where a folder is needed")
    dataset.commit("r", records=batches("r", "t2")[0])
    assert len(dataset.warnings) == 1
    assert "left unmerged" in dataset.warnings[0]
    assert "quarantine" in dataset.warnings[0]
    assert list(staging.iterdir()) == []
    (dataset.records / "stranger.txt").unlink()
    dataset.close()
    assert seen(dataset.folder) == ["t0", "t1", "t2"]
    assert len(list(dataset.records.iterdir())) == 1


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    dataset = Dataset.open(tmp_path, "s")
    shutil.rmtree(dataset.samples)
    dataset.samples.write_text("")
    records, samples = batches("r", "t")
    with pytest.raises(StoreError, match="Not a directory"):
        dataset.commit("r", records=records, samples=samples)
    assert seen(dataset.folder) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open"):
        Dataset.open(tmp_path / "file", "s")


def test_a_folder_that_may_not_be_written(nursery: Nursery) -> None:
    """Root may write anywhere, so the writer becomes somebody else first."""
    program = """
import os, sys
from pathlib import Path
from orchestrator.store import Dataset, StoreError
sys.path.insert(0, "tests/faults")
from test_store_faults import batches
out = Path(sys.argv[1])
dataset = Dataset.open(out, "s")
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
for folder in (dataset.folder / ".staging", out):
    try:
        if folder == out:
            Dataset.open(out, "another")
        else:
            dataset.commit("r", records=batches("r", "t")[0])
    except StoreError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        Dataset.open(out, "s").close()
        for folder in (out, out / "s", out / "s" / ".staging"):
            folder.chmod(0o555)
        told = subprocess.run(
            [sys.executable, "-c", program, name],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        for folder in (out, out / "s", out / "s" / ".staging"):
            folder.chmod(0o755)
        lines = told.stdout.splitlines()
        assert len(lines) == 2, told.stderr
        assert lines[0].startswith(f"cannot write to {out / 's'}: Permission denied")
        assert lines[1].startswith(f"cannot open {out / 'another'}: Permission denied")
        assert seen(out / "s") == []


def test_a_second_driver_is_told_who_is_there(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from orchestrator.store import Dataset
Dataset.open(Path(sys.argv[1]), "s")
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(StoreError) as caught:
            Dataset.open(tmp_path, "s")
        assert f"process {first.pid} on host {os.uname().nodename}" in str(caught.value)
        first.kill()
        first.wait()
        Dataset.open(tmp_path, "s").close()


def test_torn_and_foreign_files_are_set_aside(tmp_path: Path) -> None:
    with Dataset.open(tmp_path, "s") as dataset:
        dataset.commit("r", records=batches("r", "good")[0])
    whole = next(dataset.records.glob("merged-*")).read_bytes()
    samples = next(dataset.samples.iterdir()).read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2 - 500 : len(whole) // 2 + 500] = bytes(1000)
    strangers = {
        "torn.arrow": whole[:-10],
        "broken.arrow": bytes(broken),
        "empty.arrow": b"",
        "text.arrow": b"trial_id,outcome\n1,ok\n",
        "notes.txt": b"do not forget the milk",
        ".DS_Store": b"\0",
        "samples.arrow": samples,
    }
    for name, content in strangers.items():
        (dataset.records / name).write_bytes(content)
    with pa.ipc.new_file(dataset.records / "other.arrow", pa.schema({"a": pa.int64()})):
        pass
    strangers["other.arrow"] = b""
    with Dataset.open(tmp_path, "s") as dataset:
        assert dataset.finished()["trial_id"].to_list() == ["good"]
        assert len(dataset.warnings) == len(strangers)
        for name in strangers:
            assert any(str(dataset.records / name) in warning for warning in dataset.warnings)
            assert (dataset.quarantine / f"records-{name}").exists()
        assert seen(dataset.folder) == ["good"]


def test_a_torn_merge_does_not_take_its_sources_with_it(tmp_path: Path) -> None:
    dataset = Dataset.open(tmp_path, "s")
    for i in range(3):
        dataset.commit("r", records=batches("r", f"t{i}")[0])
    sources = {path.name: path.read_bytes() for path in dataset.records.iterdir()}
    dataset.close()
    (merged,) = dataset.records.iterdir()
    for name, content in sources.items():
        (dataset.records / name).write_bytes(content)
    whole = bytearray(merged.read_bytes())
    # Damage in the rows; the footer, which names the replaced files, stays readable.
    at = whole.find(b"\x28\xb5\x2f\xfd")
    assert at > 0
    whole[at : at + 4] = b"\0\0\0\0"
    merged.write_bytes(whole)
    with Dataset.open(tmp_path, "s") as again:
        assert sorted(again.finished()["trial_id"]) == ["t0", "t1", "t2"]
        assert len(again.warnings) == 1
        assert merged.name in again.warnings[0]
