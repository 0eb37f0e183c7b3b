"""Reading a dataset: whole, empty, mid-compaction, old, newer, torn and foreign files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from analysis import load
from analysis.columns import DERIVED
from analysis.dataset import is_dataset
from analysis.errors import DatasetError
from workers.contract.record import ACTIVATIONS, RECORDS, SAMPLES, SCHEMA_VERSION, TABLES, rows

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
FFN_SHARE = {224: 1.0, 448: 0.8, 896: 0.5}
TOP_K_SHARE = {
    224: {1: 1.0, 2: 0.9, 4: 0.8},
    448: {1: 1.0, 2: 0.8, 4: 0.6},
    896: {1: 1.0, 2: 0.7, 4: 0.39},
}
EXPERTS_SHARE = {8: 1.0, 16: 0.9}


def record(trial_id: str = "t0", **columns: Any) -> dict[str, Any]:
    """One measured trial of a small skeleton on a CPU, 1,000 tokens per second ± 1 %."""
    value = columns.pop("throughput_tok_s", 1000.0)
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": "hparam",
        "run_id": "r0",
        "trial_id": trial_id,
        "attempt": 1,
        "outcome": "ok",
        "profile": "cpu",
        "measured": True,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "device": "x86 CPU",
        "device_count": 1,
        "threads": 2,
        "finished_at": NOON,
        "model": "mixtral-8x7b",
        "weights": "dummy",
        "scale": 0.125,
        "num_layers": 4,
        "hidden_size": 512,
        "ffn_dim": 224,
        "num_experts": 8,
        "top_k": 2,
        "dtype": "bfloat16",
        "params_total": 4000,
        "params_active": 1000,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "data_parallel": 1,
        "batch_size": 16,
        "input_tokens": 32,
        "output_tokens": 32,
        "seed": 0,
        "repeats": 5,
        "memory_limit_gib": 0.75,
        "ci_level": 0.9375,
        "throughput_tok_s": value,
        "throughput_tok_s_ci_low": 0.99 * value,
        "throughput_tok_s_ci_high": 1.01 * value,
        **columns,
    }


def failure(trial_id: str, outcome: str, **columns: Any) -> dict[str, Any]:
    """A trial that ended without figures; `measured` is then false, as the recorder has it."""
    numbers = ("throughput_tok_s", "throughput_tok_s_ci_low", "throughput_tok_s_ci_high")
    without = dict.fromkeys((*numbers, "ci_level", "repeats"))
    return record(trial_id) | without | {"outcome": outcome, "measured": False} | columns


def grid(**columns: Any) -> list[dict[str, Any]]:
    """18 points of known arithmetic; the largest model with top-k 2 ran out of memory."""
    points = []
    for ffn_dim, by_top_k in TOP_K_SHARE.items():
        for num_experts, of_experts in EXPERTS_SHARE.items():
            for top_k, of_top_k in by_top_k.items():
                name = f"f{ffn_dim}e{num_experts}k{top_k}"
                shape = {"ffn_dim": ffn_dim, "num_experts": num_experts, "top_k": top_k}
                value = 1000 * FFN_SHARE[ffn_dim] * of_experts * of_top_k
                point = record(name, throughput_tok_s=value)
                if name == "f896e16k2":
                    reason = "cannot allocate memory </script><b>"
                    point = failure(name, "oom", oom_stage="load", outcome_reason=reason)
                if name == "f896e16k4":
                    nowhere = {"device": None, "engine_version": None, "threads": None}
                    point = failure(name, "skipped", skipped_by="f896e16k2", **nowhere)
                points.append(point | shape | columns)
    return points


def write(
    folder: Path,
    values: Iterable[Mapping[str, Any]],
    *,
    table: str = "records",
    name: str = "000.arrow",
    compression: str | None = "zstd",
    columns: Sequence[str] | None = None,
) -> Path:
    """A file of `table` in the dataset `folder`, with only `columns` where they are given."""
    schema = TABLES[table]
    batch = rows(schema, values)
    if columns is not None:
        batch = batch.select(list(columns))
    path = folder / table / name
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return path


def ids(frame: pl.LazyFrame) -> list[str]:
    return frame.collect().get_column("trial_id").to_list()


def test_load_is_what_the_package_offers() -> None:
    import analysis
    import analysis.dataset

    assert analysis.load is analysis.dataset.load
    with pytest.raises(AttributeError, match="nothing"):
        _ = analysis.nothing


def test_a_missing_or_empty_folder_is_an_empty_frame_with_the_schema(tmp_path: Path) -> None:
    (tmp_path / "empty" / "records").mkdir(parents=True)
    frame = load(tmp_path / "missing", tmp_path / "empty")
    assert isinstance(frame, pl.LazyFrame)
    schema = frame.collect_schema()
    assert {name: schema[name] for name in RECORDS.names} == dict(pl.Schema(RECORDS))
    assert list(schema)[len(RECORDS) :] == [one.meta.output_name() for one in DERIVED]
    assert frame.collect().is_empty()
    assert load.samples(tmp_path).collect_schema() == pl.Schema(SAMPLES)
    assert load.activations(tmp_path).collect_schema() == pl.Schema(ACTIVATIONS)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_every_compression_is_read(tmp_path: Path, compression: str | None) -> None:
    write(tmp_path, [record("a")], compression=compression)
    assert load(str(tmp_path)).collect().row(0, named=True)["throughput_tok_s"] == 1000.0


def test_several_datasets_are_one_frame(tmp_path: Path) -> None:
    write(tmp_path / "a", [record("a")])
    write(tmp_path / "b", [record("b", sweep="other")])
    assert sorted(ids(load(tmp_path / "a", tmp_path / "b"))) == ["a", "b"]


def test_rows_seen_twice_during_a_compaction_count_once(tmp_path: Path) -> None:
    write(tmp_path, [record("a")], name="0.arrow")
    write(tmp_path, [record("b")], name="1.arrow")
    write(tmp_path, [record("a"), record("b")], name="merged.arrow")
    assert sorted(ids(load(tmp_path, every=True))) == ["a", "b"]


def test_files_that_a_compaction_takes_away_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(tmp_path, [record("a")], name="0.arrow")
    read = pl.read_ipc

    def compacting(path: Path) -> pl.DataFrame:
        if old.exists():
            write(tmp_path, [record("a"), record("b")], name="1.arrow")
            old.unlink()
        return read(path)

    monkeypatch.setattr(pl, "read_ipc", compacting)
    assert sorted(ids(load(tmp_path))) == ["a", "b"]


def test_a_file_that_stays_away_is_named(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "gone.arrow").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="vanish"):
        load(tmp_path)


def test_the_newest_record_of_a_trial_stands(tmp_path: Path) -> None:
    later = NOON + timedelta(hours=1)
    write(tmp_path, [record("a", run_id="r1", finished_at=later, throughput_tok_s=2.0)])
    write(tmp_path, [record("a", throughput_tok_s=1.0)], name="old.arrow")
    assert load(tmp_path).collect().get_column("throughput_tok_s").to_list() == [2.0]
    assert sorted(load(tmp_path, every=True).collect()["throughput_tok_s"]) == [1.0, 2.0]


def test_the_latest_run_stands_though_its_clock_was_set_back(tmp_path: Path) -> None:
    """As the driver sees it when it resumes."""
    for name, runs in {"one": ("r0", "r1"), "two": ("r2", "r3")}.items():
        folder = tmp_path / name
        first, again = (
            record("a", run_id=run, sweep=name, throughput_tok_s=speed, finished_at=NOON - earlier)
            for run, speed, earlier in zip(
                runs, (1.0, 2.0), (timedelta(0), timedelta(9)), strict=True
            )
        )
        write(folder, [again, first])
        entries = [{"run_id": run, "started_at": NOON.isoformat()} for run in runs]
        (folder / "manifest.json").write_text(json.dumps({"runs": entries}))
    folders = [tmp_path / "one", tmp_path / "two"]
    assert load(*folders).collect()["throughput_tok_s"].to_list() == [2.0, 2.0]
    for text in ("{", "[]", '{"runs": [1]}'):  # by the clock, then
        (tmp_path / "one" / "manifest.json").write_text(text)
        assert load(folders[0]).collect()["throughput_tok_s"].to_list() == [1.0]


def test_between_datasets_the_later_run_stands(tmp_path: Path) -> None:
    """One trial in two datasets: nothing but clocks tells which is newer. The second run of the
    first had a clock that was set back, and counts as begun when the first one did."""
    begun = {"one": {"r0": 0, "r1": -100}, "two": {"r2": 5}}
    for name, runs in begun.items():
        entries = [
            {"run_id": run, "started_at": (NOON + timedelta(hours=at)).isoformat()}
            for run, at in runs.items()
        ]
        made = [
            record(
                "a",
                run_id=run,
                throughput_tok_s=float(run[1:]),
                finished_at=NOON + timedelta(hours=at),
            )
            for run, at in runs.items()
        ]
        write(tmp_path / name, made)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"runs": entries}))
    both = [tmp_path / "two", tmp_path / "one"]
    assert load(*both).collect()["throughput_tok_s"].to_list() == [2.0]
    assert load(tmp_path / "one").collect()["throughput_tok_s"].to_list() == [1.0]


def test_another_machine_is_another_result(tmp_path: Path) -> None:
    write(tmp_path, [record("a"), record("a", run_id="r1", device="NVIDIA H100")])
    assert len(load(tmp_path).collect()) == 2


def test_a_device_of_the_same_name_is_another_one_where_its_facts_differ(tmp_path: Path) -> None:
    """A record of 0.1.0, which has no facts, goes by the name: a newer one supersedes it."""
    later = {f"r{n}": NOON + timedelta(hours=n) for n in range(1, 4)}
    write(
        tmp_path,
        [
            record("a"),
            record("a", run_id="r1", finished_at=later["r1"], device_digest="fast"),
            record("a", run_id="r2", finished_at=later["r2"], device_digest="slow"),
            record("a", run_id="r3", finished_at=later["r3"], device_digest="fast"),
            record("b"),
        ],
    )
    found = load(tmp_path).select("trial_id", "run_id").collect()
    assert sorted(found.rows()) == [("a", "r2"), ("a", "r3"), ("b", "r0")]


def test_a_record_without_a_device_stands_only_alone(tmp_path: Path) -> None:
    lost = failure("a", "crashed", run_id="r1", device=None, finished_at=NOON + timedelta(1))
    write(tmp_path, [record("a"), lost, failure("b", "infeasible", device=None)])
    frame = load(tmp_path).sort("trial_id").collect()
    assert frame.select("trial_id", "outcome").rows() == [("a", "ok"), ("b", "infeasible")]


def test_an_older_file_gets_null_for_what_it_lacks(tmp_path: Path) -> None:
    few = ["schema_version", "run_id", "trial_id", "attempt", "outcome", "top_k"]
    write(tmp_path, [record("a")], name="old.arrow", columns=few)
    write(tmp_path, [record("b")], name="new.arrow")
    frame = load(tmp_path).sort("trial_id").collect()
    assert frame.get_column("throughput_tok_s").to_list() == [None, 1000.0]
    assert frame.get_column("top_k").to_list() == [2, 2]


def test_a_column_of_a_later_version_is_kept(tmp_path: Path) -> None:
    table = pa.Table.from_batches([rows(RECORDS, [record("a")])])
    (tmp_path / "records").mkdir()
    with pa.ipc.new_file(
        str(tmp_path / "records" / "x.arrow"),
        (table := table.append_column("later", pa.array([7]))).schema,
    ) as writer:
        writer.write_table(table)
    assert load(tmp_path).collect().get_column("later").to_list() == [7]


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [record("a", schema_version=SCHEMA_VERSION + 1)])
    with pytest.raises(DatasetError, match=f"version {SCHEMA_VERSION + 1}.*up to {SCHEMA_VERSION}"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 500])
def test_a_torn_file_is_named(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, [record("a")])
    os.truncate(path, size)
    with pytest.raises(DatasetError, match=r"records/000\.arrow: not a whole Arrow file"):
        load(tmp_path)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"trial_id": "a"}], table="activations")
    (tmp_path / "records").mkdir()
    shutil.copy(path, tmp_path / "records" / "x.arrow")
    with pytest.raises(DatasetError, match=r"x\.arrow: no file of records.*column attempt"):
        load(tmp_path)


def test_a_column_of_another_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    columns = {"run_id": ["r"], "trial_id": ["a"], "attempt": [1], "top_k": ["two"]}
    pl.DataFrame(columns).write_ipc(tmp_path / "records" / "x.arrow")
    with pytest.raises(DatasetError, match=r"x\.arrow: column top_k is String, but Int64"):
        load(tmp_path)


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    path = write(tmp_path, [record("a")])
    with pytest.raises(DatasetError, match="a file, but a dataset is a folder"):
        load(path)


def test_a_dataset_is_known_by_its_records_or_manifest(tmp_path: Path) -> None:
    assert not is_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert is_dataset(tmp_path)
    write(tmp_path / "x", [])
    assert is_dataset(tmp_path / "x")


def test_samples_and_activations_are_read_once_each(tmp_path: Path) -> None:
    sample = {"run_id": "r", "trial_id": "a", "attempt": 1, "kind": "timed", "repeat": 0}
    stamped = sample | {"e2e_s": 2.0, "token_s": [[0.5, 1.0], [0.25]]}
    write(tmp_path, [stamped, stamped | {"repeat": 1}], table="samples")
    write(tmp_path, [stamped], table="samples", name="again.arrow")
    frame = load.samples(tmp_path).sort("repeat").collect()
    assert frame.get_column("repeat").to_list() == [0, 1]
    assert frame.get_column("token_s")[0].to_list() == [[0.5, 1.0], [0.25]]

    chosen = {"run_id": "r", "trial_id": "a", "phase": "decode", "layer": 0, "expert": 3}
    write(tmp_path, [chosen | {"tokens": 12}], table="activations")
    assert load.activations(tmp_path).collect().row(0)[-1] == 12
