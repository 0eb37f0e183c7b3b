"""A stored peak that is far too low, met by a real engine: it must not pass for a peak."""

from __future__ import annotations

import time
from pathlib import Path

import polars as pl
import pytest

from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.measure import Measure
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware import peaks
from workers.hardware.host import describe
from workers.hardware.peaks import Calibration

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

LOW = 0.02
"""GB/s: what any pass reads is more than that."""


def test_a_peak_that_is_far_too_low_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host = describe()
    if host.gpus:
        pytest.skip("utilisations of a GPU are taken against its data sheet")
    peaks.store(
        Calibration(
            device=host.device,
            device_digest=host.device_digest,
            kind="cpu",
            threads=host.cpus,
            torch_version=str(host.torch_version),
            bandwidth_gb_s=LOW,
            patterns_gb_s={"read": LOW},
            array_gib=2.0,
            tflops={"bf16": 1e-5, "fp32": 1e-5},
            overhead_s=1e-5,
            spread={},
            others=0.0,
            stolen=0.0,
            waiting=0.0,
            runs=1,
            measured_at=time.time(),
            seconds=5.0,
        ),
        host,
    )
    trial = Trial(
        model=Model(name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, top_k=2),
        workload=Workload(batch_size=2, input_tokens=16, output_tokens=8),
        engine=EngineSettings(eager=True, memory_limit_gib=1.0),
        measure=Measure(repeats=2),
    )
    ticket = Ticket(trial=trial, trial_id="t")
    job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=(ticket,))
    (finished,) = [one for one in runner.run(job) if isinstance(one, Finished)]
    row = pl.DataFrame(finished.record).row(0, named=True)
    assert row["outcome"] == "ok"
    kept = peaks.stored(host)
    assert kept is not None and kept.runs == 2, "it was measured again, under the memory limit"
    assert row["peak_bandwidth_gb_s"] == row["calibrated_bandwidth_gb_s"] == kept.bandwidth_gb_s
    assert kept.bandwidth_gb_s > 10 * LOW
    for name in ("s_mbu", "s_mbu_paper", "s_mfu", "prefill_s_mbu", "prefill_s_mfu"):
        assert row[name] is None or 0 < row[name] <= 1, name
    assert row["s_mbu"] is not None or "such a peak is none" in row["outcome_reason"]
    assert row["reference_bandwidth_gb_s_before"] > 0 and row["reference_tflops_after"] > 0
    assert row["device_digest"] == host.device_digest
