"""What a commit and a resume cost: `python tests/bench/bench_store.py [FOLDER]`.

FOLDER should lie on the disk that the dataset will be on: a commit waits for that disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa

from orchestrator.store import Dataset, Guard, settled
from workers.contract.record import RECORDS, SAMPLES, rows

COMMITS = 300
RECORDS_READ = 100_000


def records(first: int, count: int) -> pa.RecordBatch:
    """Rows filled as a measured trial fills them."""
    fixed = {
        "schema_version": 1,
        "sweep": "bench",
        "run_id": "run",
        "attempt": 1,
        "outcome": "ok",
        "engine_version": "0.32.0",
        "device": "NVIDIA H100 80GB HBM3",
        "host": "host",
        "finished_at": datetime.now(UTC),
    }
    floats = [field.name for field in RECORDS if field.type == pa.float64()]
    return rows(
        RECORDS,
        (
            {**fixed, "trial_id": f"{i:016x}", **dict.fromkeys(floats, i * 1.37)}
            for i in range(first, first + count)
        ),
    )


def samples(i: int) -> pa.RecordBatch:
    """Seven passes of 16 requests with 128 tokens each."""
    stamps = [step * 0.011 for step in range(128)]
    key = {"run_id": "run", "trial_id": f"{i:016x}", "attempt": 1, "kind": "timed"}
    values = ({**key, "repeat": n, "token_s": [stamps] * 16, "step_s": stamps} for n in range(7))
    return rows(SAMPLES, values)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
        with Dataset.open(Path(name), "commits") as dataset:
            for what, with_samples in (("1 record", False), ("1 record and samples", True)):
                took = []
                for i in range(COMMITS):
                    record = records(i, 1)
                    raw = samples(i) if with_samples else None
                    start = time.perf_counter()
                    dataset.commit("run", records=record, samples=raw)
                    took.append(1e3 * (time.perf_counter() - start))
                print(
                    f"commit of {what}: median {statistics.median(took):.2f} ms, "
                    f"worst {max(took):.1f} ms (with a merge)"
                )
            assert dataset.finished().height == COMMITS

        with Dataset.open(Path(name), "read") as dataset:
            for first in range(0, RECORDS_READ, 10_000):
                dataset.commit("run", records=records(first, 10_000))
            start = time.perf_counter()
            frame = dataset.finished()
            read = time.perf_counter()
            done = settled(frame, guard=Guard(engine_version="0.32.0", device=frame["device"][0]))
            end = time.perf_counter()
            assert len(done) == RECORDS_READ
            print(f"finished() of {RECORDS_READ} records: {1e3 * (read - start):.0f} ms")
            print(f"settled() of them: {1e3 * (end - read):.0f} ms")
            start = time.perf_counter()
            assert pl.scan_ipc(dataset.records).collect().height == RECORDS_READ
            print(f"pl.scan_ipc of all columns: {1e3 * (time.perf_counter() - start):.0f} ms")


if __name__ == "__main__":
    main()
