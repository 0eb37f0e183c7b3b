"""Drift of the machine: the figure, what is said of it, and times as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from analysis import load
from analysis.__main__ import main
from analysis.drift import between, lines
from analysis.errors import SelectionError
from analysis.figures.registry import find
from analysis.subtitle import subtitle
from tests.unit.scenes import SCENES
from tests.unit.test_analysis_dataset import record, write
from tests.unit.test_analysis_figures import of_records


def loads(bandwidth: float, tflops: float = 0.1, *, spread: float = 0.02) -> dict[str, float]:
    return {
        "reference_bandwidth_gb_s_before": bandwidth,
        "reference_bandwidth_gb_s_after": bandwidth,
        "reference_bandwidth_spread": spread,
        "reference_tflops_before": tflops,
        "reference_tflops_after": tflops,
        "reference_tflops_spread": spread,
    }


def times(**more: Any) -> dict[str, Any]:
    """A second of prompts and three of decoding."""
    return {
        "ttft_s": 0.9,
        "ttft_paper_s": 1.0,
        "itl_s": 0.1,
        "tpot_s": 0.1,
        "e2e_s": 4.0,
        "e2e_s_ci_low": 3.8,
        "e2e_s_ci_high": 4.2,
        "throughput_tok_s": 100.0,
        "throughput_tok_s_ci_low": 95.0,
        "throughput_tok_s_ci_high": 105.0,
        **more,
    }


def test_times_are_scaled_to_the_usual_speed_part_by_part(tmp_path: Path) -> None:
    """The machine read memory at half its usual rate around the second trial, and multiplied
    at four fifths: of its 4 s of decoding and prompts, 3 would have taken 1.5 and 1 would have 0.8.
    """
    write(
        tmp_path,
        [
            record("usual", top_k=1, **times(), **loads(20.0, 0.1)),
            record("slow", top_k=2, **times(), **loads(10.0, 0.08)),
            record("fast", top_k=4, **times(), **loads(22.0, 0.1)),
            record("silent", top_k=8, **times()),
        ],
    )
    found = {
        row["trial_id"]: row for row in load(tmp_path, correct_drift=True).collect().to_dicts()
    }
    slow = found["slow"]
    assert (slow["drift_bandwidth"], slow["drift_tflops"]) == pytest.approx((0.5, 0.8))
    assert (slow["ttft_s"], slow["ttft_paper_s"]) == pytest.approx((0.72, 0.8))
    assert (slow["itl_s"], slow["tpot_s"]) == pytest.approx((0.05, 0.05))
    assert slow["e2e_s"] == pytest.approx(2.3)
    assert slow["e2e_s_ci_high"] == pytest.approx(4.2 * 2.3 / 4)
    assert slow["throughput_tok_s"] == pytest.approx(100 * 4 / 2.3)
    assert slow["throughput_tok_s_ci_low"] == pytest.approx(95 * 4 / 2.3)
    assert found["usual"]["e2e_s"] == pytest.approx(4.0) and found["usual"]["drift_corrected"]
    assert found["silent"]["e2e_s"] == 4.0 and found["silent"]["drift_corrected"] is None
    plain = load(tmp_path).collect()
    assert set(plain["e2e_s"]) == {4.0} and plain["drift_corrected"].null_count() == 4
    assert plain.sort("trial_id")["drift_bandwidth"].to_list() == [1.1, None, 0.5, 1.0]


def test_speeds_are_held_against_those_of_the_same_device_and_threads(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            record("a", **loads(20.0)),
            record("b", threads=1, **loads(9.0)),
            record("c", device_digest="another", **loads(80.0)),
        ],
    )
    assert load(tmp_path).collect()["drift_bandwidth"].to_list() == [1.0, 1.0, 1.0]


def test_drift_is_told_where_it_is_more_than_the_noise_of_the_loads(tmp_path: Path) -> None:
    noisy = loads(19.0, spread=0.3)
    write(tmp_path / "calm", [record("a", top_k=1, **loads(20.0)), record("b", top_k=2, **noisy)])
    assert lines(load(tmp_path / "calm").collect()) == []
    write(tmp_path / "slow", [record("a", top_k=1, **loads(20.0)), record("b", **loads(10.0))])
    frame = load(tmp_path / "slow").collect()
    told = (
        "The machine drifted: memory was read at 67% to 133% of the usual rate of its reference "
        "loads (figure drift)"
    )
    assert lines(frame) == [told]
    assert told in subtitle(frame)
    scaled = load(tmp_path / "slow", correct_drift=True).collect()
    assert lines(scaled)[1].startswith("Times of 2 of 2 records scaled to the usual rate: prompts")
    assert lines(frame.drop("drift_bandwidth")) == []


def test_two_records_are_compared_by_their_loads() -> None:
    assert between(loads(20.0), loads(19.9)) == []
    assert between(loads(20.0), loads(8.0, 0.099)) == [("memory was read, GB/s", 20.0, 8.0)]
    drifting = loads(20.0) | {"reference_bandwidth_gb_s_after": 10.0}
    assert between(drifting, loads(12.0)) == []  # within what one of them saw itself
    assert between({}, loads(8.0)) == []


def test_the_figure_shows_drift_within_and_between_runs() -> None:
    figure = of_records("drift")
    frame = figure.prepare(SCENES["drift"].loaded())
    reading = frame.filter(pl.col("load") == "bandwidth")
    assert reading.select("line").n_unique() == 2 and len(reading) == 12
    first = reading.filter(pl.col("line") == "r0")
    assert first["minutes"].to_list() == [0.0, 4.0, 5.0, 9.0, 10.0, 14.0]
    assert first["rate"].to_list() == [20.0, 19.5, 19.0, 18.5, 18.0, 17.5]
    median = 13.75  # halfway between 17.5 of the first run and 10 of the second
    assert first["relative"].to_list() == pytest.approx([rate / median for rate in first["rate"]])
    assert first["high"][0] - first["low"][0] == pytest.approx(0.02 * 20 / median)
    told = figure.insight(frame)
    assert told.startswith(
        "Reading memory drifted by up to 18 % within a run (r0) and 68 % between"
    )
    assert "the quartiles of one load are 2 % apart" in told
    tables = figure.pivots(frame)
    assert [one.title for one in tables] == ["Reading memory, GB/s", "Multiplying matrices, TFLOPS"]
    assert tables[0].rows[1] == ("r1", "6", "9.38", "8.75", "10")
    spec = figure.chart(frame).to_dict()
    assert spec["title"]["text"] == "Speed of the machine over a run, by loads of fixed work"


def test_records_share_the_loads_of_their_round(tmp_path: Path) -> None:
    write(tmp_path, [record(name, top_k=k, **loads(20.0)) for name, k in (("a", 1), ("b", 2))])
    assert len(of_records("drift").prepare(load(tmp_path))) == 2


def test_without_loads_there_is_no_figure(tmp_path: Path) -> None:
    write(tmp_path, [record("a")])
    with pytest.raises(SelectionError, match=r"version 0\.1\.0, or predicted"):
        of_records("drift").prepare(load(tmp_path))


def test_the_command_line_corrects_on_request_and_says_so(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            record("a", top_k=1, **times(), **loads(20.0)),
            record("b", top_k=2, **times(), **loads(10.0)),
        ],
    )
    plain = CliRunner().invoke(main, ["table", str(tmp_path)])
    scaled = CliRunner().invoke(main, ["table", str(tmp_path), "--correct-drift"])
    assert plain.exit_code == scaled.exit_code == 0
    assert "The machine drifted" in plain.output and "scaled to the usual rate" not in plain.output
    assert "Times of 2 of 2 records scaled to the usual rate" in scaled.output
    listed = CliRunner().invoke(main, ["figures"])
    assert find("drift").title in listed.output
    refused = CliRunner().invoke(main, ["table", "--figure", "bandwidth-power", "--correct-drift"])
    assert refused.exit_code == 2 and "it takes no --correct-drift" in refused.output
