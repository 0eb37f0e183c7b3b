"""Two sweeps of one `--out`: the first probes, the second takes what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.dataset import is_dataset
from tests.integration.harness import TINY, orchestrate, records, summary, sweep_file
from workers.moe.sheets import FOLDER

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_later_sweep_takes_its_experts_from_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "results"
    base = TINY["base"]
    probing = base | {"measure": {"repeats": 2, "activation": True}}
    first = sweep_file(tmp_path, name="first", base=probing, grid={"workload.batch_size": [1, 4]})
    done = orchestrate(first, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert not is_dataset(out / FOLDER) and len(list((out / FOLDER).rglob("*.arrow"))) == 2
    torn = next((out / FOLDER).rglob("1.arrow")).with_name("7.arrow")
    torn.write_bytes(b"ARROW1 and no more")

    asking = base | {"measure": {"repeats": 2, "activation": "sheet"}}
    later = sweep_file(
        tmp_path, name="later", base=asking, grid={"workload.batch_size": [1, 2, 4, 8]}
    )
    dry = orchestrate(later, "--out", out, "--dry-run", "--json")
    torn_told, missing = summary(dry)["notes"]
    assert "7.arrow" in torn_told and "batch 8" in missing
    done = orchestrate(later, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert summary(done)["outcomes"] == {"ok": 4}

    one, two, four, eight = records(out / "later").sort("batch_size").to_dicts()
    counted = {row["batch_size"]: row for row in records(out / "first").to_dicts()}
    for row in (one, four):
        probe = counted[row["batch_size"]]
        assert row["activation_source"] == "sheet" and probe["activation_source"] == "traced"
        assert row["activation_sheet"] == f"first, run {probe['run_id']}, trial {probe['trial_id']}"
        assert row["activated_experts_decode"] == probe["activated_experts_decode"]
        assert row["activated_experts_prefill"] == probe["activated_experts_prefill"]
        assert row["s_mbu"] > 0 and row["s_mbu_uniform"] > 0
    assert two["activation_source"] == "sheet-interpolated"
    assert eight["outcome"] == "ok" and eight["s_mbu"] is None
    assert "batch 8 is outside" in eight["outcome_reason"]
