"""The dataset store: commits, merging, older files, and what resume takes as done."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest

from orchestrator import store
from orchestrator.store import KEYS, REPLACES, RESUME, Dataset, Guard, StoreError, settled
from orchestrator.vouching import machines
from workers.contract.record import ACTIVATIONS, RECORDS, SAMPLES, TABLES, rows
from workers.hardware.facts import digest, dumps

START = datetime(2025, 1, 1, tzinfo=UTC)
ZSTD = b"\x28\xb5\x2f\xfd"
"""How a compressed buffer begins."""


def record(trial: str, *, run: str = "r1", minute: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "sweep": "s",
        "run_id": run,
        "trial_id": trial,
        "attempt": 1,
        "outcome": "ok",
        "finished_at": START + timedelta(minutes=minute),
        **more,
    }


def records(*values: dict[str, Any]) -> pa.RecordBatch:
    return rows(RECORDS, values)


def samples(trial: str, *, run: str = "r1") -> pa.RecordBatch:
    key = {"run_id": run, "trial_id": trial, "attempt": 1, "kind": "timed"}
    return rows(SAMPLES, [{**key, "repeat": i, "token_s": [[0.5, 1.0]]} for i in range(3)])


def activations(trial: str, *, run: str = "r1") -> pa.RecordBatch:
    key = {"run_id": run, "trial_id": trial, "phase": "decode", "layer": 0}
    return rows(ACTIVATIONS, [{**key, "expert": i, "tokens": 7 - i} for i in range(4)])


def write_old(path: Path, schema: pa.Schema, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_file(path, schema) as writer:
        writer.write_batch(batch)


def test_a_new_dataset_is_readable_before_its_first_row(tmp_path: Path) -> None:
    with Dataset.open(tmp_path / "results", "s") as dataset:
        for table, schema in TABLES.items():
            folder = dataset.folder / table
            frame = pl.scan_ipc(folder)
            assert frame.collect_schema() == pl.Schema(schema)
            assert frame.collect().is_empty()
            assert pyarrow.dataset.dataset(folder, format="ipc").schema.equals(schema)
        assert dataset.finished().is_empty()
        assert dataset.logs.is_dir()
        assert dataset.manifest == tmp_path / "results" / "s" / "manifest.json"


def test_every_commit_is_a_new_file_that_readers_find_at_once(tmp_path: Path) -> None:
    dataset = Dataset.open(tmp_path, "s")
    before: dict[Path, bytes] = {}
    for i in range(3):
        trial = f"t{i}"
        dataset.commit(
            "r1",
            records=records(record(trial)),
            samples=samples(trial),
            activations=activations(trial),
        )
        files = {path: path.read_bytes() for path in dataset.folder.glob("*/*.arrow")}
        assert len(files) == 3 * (i + 2)
        assert before.items() <= files.items()
        before = files
        assert pl.scan_ipc(dataset.records).collect().height == i + 1
        assert pl.scan_ipc(dataset.samples).collect().height == 3 * (i + 1)
        assert pl.scan_ipc(dataset.activations).collect()["tokens"].sum() == 22 * (i + 1)
    for path in dataset.records.iterdir():
        with pa.OSFile(str(path)) as source:
            schema = pa.ipc.open_file(source).schema
        assert schema.equals(RECORDS, check_metadata=True)
    assert list((dataset.folder / ".staging").iterdir()) == []
    dataset.close()


def test_a_commit_without_rows_writes_nothing(tmp_path: Path) -> None:
    with Dataset.open(tmp_path, "s") as dataset:
        before = sorted(dataset.folder.rglob("*"))
        dataset.commit("r1", records=None)
        dataset.commit("r1", records=records(), samples=rows(SAMPLES, []))
        assert sorted(dataset.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("run", "batch", "words"),
    [
        ("r1", samples("t"), "differ from schema version 1 in .*outcome"),
        ("r1", rows(RECORDS, [{"trial_id": "t"}]), "no value in run_id, attempt, schema_version"),
        ("r2", records(record("t")), "run r1 given as run r2"),
        ("r1", records(record("t", outcome="fine")), "fine is no outcome"),
        ("r1", records(record("t", schema_version=2)), "schema version 2, not 1: is the same"),
        ("../r1", records(record("t", run="../r1")), "run '../r1' cannot name files"),
        ("_r1", records(record("t", run="_r1")), "run '_r1' cannot name files"),
    ],
)
def test_rows_that_do_not_belong_are_refused(
    tmp_path: Path, run: str, batch: pa.RecordBatch, words: str
) -> None:
    with Dataset.open(tmp_path, "s") as dataset:
        with pytest.raises(StoreError, match=words):
            dataset.commit(run, records=batch, samples=samples("t", run=run))
        assert pl.scan_ipc(dataset.records).collect().is_empty()
        assert pl.scan_ipc(dataset.samples).collect().is_empty()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", ".hidden", "a\nb"])
def test_a_sweep_name_must_be_a_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name files"):
        Dataset.open(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_compaction_keeps_every_row_and_names_what_it_replaced(tmp_path: Path) -> None:
    dataset = Dataset.open(tmp_path, "s")
    for i in range(5):
        dataset.commit("r1", records=records(record(f"t{i}")), samples=samples(f"t{i}"))
    rows_before = pl.scan_ipc(dataset.samples).collect().sort("trial_id", "repeat")
    names = sorted(path.name for path in dataset.records.iterdir())
    dataset.compact()
    (merged,) = dataset.records.iterdir()
    with pa.OSFile(str(merged)) as source:
        schema = pa.ipc.open_file(source).schema
    assert sorted(json.loads(schema.metadata[REPLACES])) == names
    assert len(list(dataset.samples.iterdir())) == 1
    assert pl.scan_ipc(dataset.samples).collect().sort("trial_id", "repeat").equals(rows_before)
    assert sorted(dataset.finished()["trial_id"]) == [f"t{i}" for i in range(5)]
    again = merged.stat()
    dataset.compact()
    assert merged.stat().st_ino == again.st_ino, "one file has nothing to be merged with"
    dataset.close()


def test_many_commits_are_merged_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SMALL_FILES", 4)
    dataset = Dataset.open(tmp_path, "s")
    most = 0
    for i in range(20):
        dataset.commit("r1", records=records(record(f"t{i}")))
        most = max(most, len(list(dataset.records.iterdir())))
    assert most == 7  # three merged files and four commits
    assert len(dataset.finished()) == 20
    dataset.close()
    assert len(list(dataset.records.iterdir())) == 1


@pytest.mark.lengthy
def test_a_row_is_rewritten_a_few_times_however_many_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SMALL_FILES", 4)
    written = 0
    put = Dataset._put

    def counting(self: Dataset, table: str, name: str, batches: Any, replaces: Any) -> None:
        nonlocal written
        written += sum(batch.num_rows for batch in batches)
        put(self, table, name, batches, replaces)

    monkeypatch.setattr(Dataset, "_put", counting)
    most = 0
    with Dataset.open(tmp_path, "s") as dataset:
        for i in range(100):
            dataset.commit("r1", records=records(record(f"t{i}")))
            most = max(most, len(list(dataset.records.iterdir())))
    assert most <= 8
    assert written < 6 * 100  # and 1,300 where each merge takes all that is small
    with Dataset.open(tmp_path, "s") as dataset:
        assert set(dataset.finished()["trial_id"]) == {f"t{i}" for i in range(100)}


def test_what_is_merged_from_memory_is_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []
    for remembered in (0, store.RECENT_BYTES):
        monkeypatch.setattr(store, "RECENT_BYTES", remembered)
        with Dataset.open(tmp_path / str(remembered), "s") as dataset:
            for i in range(5):
                dataset.commit("r1", records=records(record(f"t{i}")), samples=samples(f"t{i}"))
            assert len(dataset._recent) == (10 if remembered else 0)
            packed = [ZSTD in path.read_bytes() for path in dataset.records.glob("r1-*")]
            assert packed == [not remembered] * 5
            dataset.compact()
            assert not dataset._recent
            (merged,) = dataset.records.iterdir()
            with pa.OSFile(str(merged)) as source:
                schema = pa.ipc.open_file(source).schema
            assert schema.equals(RECORDS)
            assert len(json.loads(schema.metadata[REPLACES])) == 6  # and the empty one
        frames.append(
            [pl.read_ipc(path / "*.arrow") for path in (dataset.records, dataset.samples)]
        )
    for one, other in zip(*frames, strict=True):
        assert one.sort("trial_id").equals(other.sort("trial_id"))


def test_large_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Dataset.open(tmp_path, "s") as dataset:
        dataset.commit("r1", records=records(record("t0")))
        monkeypatch.setattr(store, "SMALL_BYTES", 1)
        before = sorted(dataset.records.iterdir())
        dataset.compact()
        assert sorted(dataset.records.iterdir()) == before


def test_opening_finishes_an_interrupted_merge(tmp_path: Path) -> None:
    dataset = Dataset.open(tmp_path, "s")
    for i in range(3):
        dataset.commit("r1", records=records(record(f"t{i}")))
    left = {path: path.read_bytes() for path in dataset.records.iterdir()}
    dataset.close()
    for path, content in left.items():
        path.write_bytes(content)
    (dataset.folder / ".staging" / "records-half.arrow").write_bytes(b"ARROW1")
    doubled = pl.scan_ipc(dataset.records).collect()
    assert doubled.height == 6
    assert doubled.unique(KEYS["records"]).height == 3
    with Dataset.open(tmp_path, "s") as again:
        assert len(list(again.records.iterdir())) == 1
        assert pl.scan_ipc(again.records).collect().height == 3
        assert list((again.folder / ".staging").iterdir()) == []
        assert again.warnings == []


def test_files_of_an_older_schema_are_brought_up_to_date(tmp_path: Path) -> None:
    """Columns may be added; a folder of two schemas would not open with polars."""
    Dataset.open(tmp_path, "s").close()
    gone = ["axes", "acceptance_rate"]
    fields = [field for field in RECORDS if field.name not in gone]
    old = pa.schema(fields, metadata=RECORDS.metadata)
    batch = records(record("old", throughput_tok_s=12.5)).select(old.names)
    write_old(tmp_path / "s" / "records" / "r0-1.arrow", old, batch)
    with Dataset.open(tmp_path, "s") as dataset:
        dataset.commit("r1", records=records(record("new", acceptance_rate=0.5)))
        frame = pl.scan_ipc(dataset.records).collect().sort("trial_id")
        assert frame["trial_id"].to_list() == ["new", "old"]
        assert frame["acceptance_rate"].to_list() == [0.5, None]
        assert frame["throughput_tok_s"].to_list() == [None, 12.5]
        assert dataset.warnings == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (RECORDS.append(pa.field("beauty", pa.float64())), "newer version .*beauty"),
        (RECORDS.with_metadata({**RECORDS.metadata, b"schema_version": b"99"}), "newer .*99"),
    ],
)
def test_files_of_a_newer_version_are_neither_read_nor_moved(
    tmp_path: Path, schema: pa.Schema, words: str
) -> None:
    Dataset.open(tmp_path, "s").close()
    path = tmp_path / "s" / "records" / "r9-1.arrow"
    write_old(path, schema, rows(schema, [record("t")]))
    with pytest.raises(StoreError, match=words) as caught:
        Dataset.open(tmp_path, "s")
    assert str(path) in str(caught.value)
    assert path.exists()
    path.unlink()
    Dataset.open(tmp_path, "s").close()


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    first = Dataset.open(tmp_path, "s")
    with pytest.raises(StoreError, match=r"in use by process \d+ on host .* since 20"):
        Dataset.open(tmp_path, "s")
    Dataset.open(tmp_path, "other").close()
    first.close()
    first.close()
    Dataset.open(tmp_path, "s").close()


def test_finished_gives_each_attempt_once_and_the_columns_asked_for(tmp_path: Path) -> None:
    with Dataset.open(tmp_path, "s") as dataset:
        one = records(record("t", ffn_dim=1792))
        dataset.commit("r1", records=one)
        dataset.commit("r1", records=one)
        dataset.commit("r2", records=records(record("t", run="r2", ffn_dim=1792)))
        assert dataset.finished().columns == list(RESUME)
        assert sorted(dataset.finished()["run_id"]) == ["r1", "r2"]
        wide = dataset.finished(["ffn_dim", "trial_id"])
        assert wide.to_dict(as_series=False) == {"ffn_dim": [1792, 1792], "trial_id": ["t", "t"]}
        assert dataset.finished(RECORDS.names).schema == pl.Schema(RECORDS)


HERE = Guard(engine_version="0.32", device="H100")


def frame(*values: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(records(*values)).select(RESUME)


def ran(trial: str, outcome: str = "ok", **more: Any) -> dict[str, Any]:
    more = {"engine_version": "0.32", "device": "H100", **more}
    return record(trial, outcome=outcome, **more)


def test_nothing_is_settled_by_no_records() -> None:
    assert settled(frame(), guard=HERE) == {}


def test_every_outcome_settles_unless_it_is_to_run_again() -> None:
    found = frame(
        ran("a"),
        ran("b", "oom"),
        ran("c", "crashed"),
        ran("d", "timeout"),
        record("e", outcome="infeasible"),
    )
    assert settled(found, guard=HERE) == {
        "a": "ok",
        "b": "oom",
        "c": "crashed",
        "d": "timeout",
        "e": "infeasible",
    }
    faults = settled(found, guard=HERE, rerun=frozenset({"crashed", "timeout"}))
    assert faults.keys() == {"a", "b", "e"}


def test_disturbed_records_are_run_again_where_that_is_asked() -> None:
    found = frame(
        ran("a", disturbed=True),
        ran("b", disturbed=False),
        ran("c", disturbed=None),
        ran("d", "crashed"),
        ran("e", disturbed=True, finished_at=datetime(2026, 1, 1, tzinfo=UTC)),
        ran("e", disturbed=False, finished_at=datetime(2026, 1, 2, tzinfo=UTC)),
    )
    assert settled(found, guard=HERE).keys() == {"a", "b", "c", "d", "e"}
    assert settled(found, guard=HERE, rerun=frozenset({"disturbed"})).keys() == {"b", "c", "d", "e"}
    both = settled(found, guard=HERE, rerun=frozenset({"disturbed", "crashed"}))
    assert both.keys() == {"b", "c", "e"}


def test_another_engine_or_device_settles_nothing() -> None:
    found = frame(ran("a", device="A100"), ran("b", engine_version="0.31"), ran("c"))
    assert settled(found, guard=HERE).keys() == {"c"}
    assert settled(found, guard=Guard(engine_version="0.31", device=None)).keys() == {"b"}
    anywhere = Guard(engine_version=None, device=None)
    assert settled(found, guard=anywhere).keys() == {"a", "b", "c"}


AMX = dumps({"amx_tile": True, "l3_kib": 260 * 1024, "cores": 2})
PLAIN = dumps({"amx_tile": False, "l3_kib": 32 * 1024, "cores": 2})


def test_a_device_of_the_same_name_and_other_facts_settles_nothing() -> None:
    """Records of 0.1.0 have no facts: they go by the name."""
    found = frame(
        ran("same", device_digest=digest(AMX)),
        ran("other", device_digest=digest(PLAIN)),
        ran("old"),
    )
    here = Guard(engine_version="0.32", device="H100", device_digest=digest(AMX))
    assert settled(found, guard=here).keys() == {"same", "old"}
    assert settled(found, guard=HERE).keys() == {"same", "other", "old"}


def test_resuming_tells_what_differs_on_another_machine_of_that_name() -> None:
    found = pl.DataFrame(
        records(
            ran("same", device_digest=digest(AMX), device_facts=AMX, engine="vllm"),
            ran("other", device_digest=digest(PLAIN), device_facts=PLAIN, engine="vllm"),
            ran("renewed", run="r0", engine="vllm"),
            ran("renewed", run="r2", device_digest=digest(AMX), device_facts=AMX, engine="vllm"),
            ran("elsewhere", device="A100", engine="vllm"),
            record("never ran", outcome="infeasible"),
        )
    )
    here = Guard(engine_version="0.32", device="H100", device_digest=digest(AMX), engine="vllm")
    resumed = settled(found, guard=here)
    assert list(machines(found, resumed, [(here, AMX)])) == [
        "1 trial measured on another H100 (here / there: AMX: yes / no, L3: 260 MiB / 32 MiB) "
        "count for nothing here",
    ]
    assert list(machines(found, resumed, [(HERE, None)])) == []


def test_the_newest_record_under_the_same_guard_decides() -> None:
    found = frame(
        ran("a", "crashed", run="r1", minute=0),
        ran("a", "ok", run="r2", minute=5),
        ran("a", "oom", run="r3", minute=9, device="A100"),
        ran("b", "ok", run="r2", minute=5),
        ran("b", "crashed", run="r4", minute=7),
    )
    assert settled(found, guard=HERE) == {"a": "ok", "b": "crashed"}
    assert settled(found, guard=HERE, rerun=frozenset({"crashed"})) == {"a": "ok"}
    assert settled(found.reverse(), guard=HERE) == {"a": "ok", "b": "crashed"}


def test_a_later_run_decides_though_the_clock_was_set_back() -> None:
    """It is later because the manifest has it later; a run that it lacks is older than what a
    clock that went right says."""
    runs = [
        {"run_id": "first", "started_at": "2025-01-01T09:00:00.000+00:00"},
        {"run_id": "set back", "started_at": "2024-12-01T00:00:00.000+00:00"},
        {"run_id": "right again", "started_at": "2025-01-02T00:00:00.000+00:00"},
    ]
    month, day = -31 * 24 * 60, 24 * 60
    found = frame(
        ran("a", "crashed", run="first", minute=9 * 60),
        ran("a", "ok", run="set back", minute=month),
        ran("b", "ok", run="set back", minute=month),
        ran("b", "oom", run="right again", minute=day),
        ran("c", "ok", run="lost from the manifest", minute=1),
        ran("c", "timeout", run="first", minute=9 * 60),
    )
    wanted = {"a": "ok", "b": "oom", "c": "timeout"}
    assert settled(found, guard=HERE, runs=runs) == wanted
    assert settled(found.reverse(), guard=HERE, runs=runs) == wanted
    crashed = frozenset({"crashed"})
    assert settled(found, guard=HERE, runs=runs, rerun=crashed) == wanted
    assert settled(found, guard=HERE)["a"] == "crashed", "by the clock alone"


def test_a_witness_counts_as_its_latest_run_has_it() -> None:
    """It ran out of memory by a clock that was an hour ahead, and was measured again since."""
    runs = [{"run_id": name, "started_at": "2025-01-01T00:00:00+00:00"} for name in ("r1", "r2")]
    found = frame(
        ran("small", "oom", run="r1", minute=60),
        record("big", run="r1", outcome="skipped", skipped_by="small", minute=61),
        ran("small", "ok", run="r2", minute=5),
    )
    assert settled(found, guard=HERE, runs=runs) == {"small": "ok"}
    assert settled(found, guard=HERE) == {"small": "oom", "big": "skipped"}


def test_runs_without_a_readable_time_keep_the_order_of_the_manifest() -> None:
    runs = [{"run_id": "r1", "started_at": "soon"}, {"run_id": "r2"}, {"run_id": "r3"}]
    found = frame(*(ran("a", what, run=name, minute=at) for what, name, at in (
        ("oom", "r3", 1), ("crashed", "r2", 2), ("ok", "r1", 3))))  # fmt: skip
    assert settled(found, guard=HERE, runs=runs) == {"a": "oom"}


def test_a_skipped_trial_stays_skipped_only_with_its_witness() -> None:
    skip = record("big", outcome="skipped", skipped_by="small", minute=2)
    here = frame(ran("small", "oom", minute=1), skip)
    assert settled(here, guard=HERE) == {"small": "oom", "big": "skipped"}
    assert settled(here, guard=HERE, rerun=frozenset({"oom"})) == {}
    elsewhere = frame(ran("small", "oom", minute=1, device="A100"), skip, ran("big", minute=0))
    assert settled(elsewhere, guard=HERE) == {"big": "ok"}
    alone = frame(record("big", outcome="skipped"))
    assert settled(alone, guard=HERE) == {"big": "skipped"}

    fits_now = frame(record("small", outcome="oom"), skip, record("small", outcome="ok", minute=3))
    assert settled(fits_now, guard=HERE) == {"small": "ok"}
