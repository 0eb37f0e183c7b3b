"""Figures 3, 5, 6, 13 and 14 against points of known arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis import load
from analysis.errors import SelectionError
from tests.unit.test_analysis_dataset import failure, record, write
from tests.unit.test_analysis_figures import of_records, points_of, spec_of

LITE = {"model": "deepseek-v2-lite", "num_experts": 64, "ffn_dim": 176, "hidden_size": 256}
QWEN = {"model": "qwen1.5-moe-a2.7b", "num_experts": 60, "ffn_dim": 176, "hidden_size": 256}


def _insight(folder: Path, name: str, values: list[dict[str, Any]]) -> str:
    write(folder, values)
    figure = of_records(name)
    return figure.insight(figure.prepare(load(folder)))


def _by_top_k() -> list[dict[str, Any]]:
    """Twice as fast per batch step; top-k 4 costs 10 % at batch 1 and 40 % at batch 16."""
    loss = {(1, 1): 1.0, (4, 1): 0.9, (1, 16): 1.0, (4, 16): 0.6}
    return [
        record(
            f"{model['model'][:2]}{top_k}{batch}",
            top_k=top_k,
            batch_size=batch,
            throughput_tok_s=100.0 * batch * loss[top_k, batch],
            **model,
        )
        for model in (LITE, QWEN)
        for top_k in (1, 4)
        for batch in (1, 16)
    ]


def test_figure_5_tells_the_loss_at_small_and_at_large_batches(tmp_path: Path) -> None:
    told = _insight(tmp_path, "fig5", _by_top_k())
    assert "From top-k 1 to 4 throughput falls by 25 % at deepseek-v2-lite" in told
    assert "deepseek-v2-lite: -10 % at batch 1 and -40 % at batch 16;" in told
    assert (
        "Throughput at batch 16 over that at batch 1: 13 times (11 to 16) for deepseek-v2-lite"
        in told
    )


def test_figure_5_has_a_panel_per_model_and_a_line_per_batch(tmp_path: Path) -> None:
    write(tmp_path, _by_top_k())
    spec = spec_of(of_records("topk-batch"), load(tmp_path))
    assert spec["vconcat"][0]["facet"]["field"] == "model"
    assert {one["batch_size"] for one in points_of(spec)} == {1, 16}
    assert spec["title"]["text"] == "Throughput against active experts, by batch size"


def test_figure_6_goes_by_length_whose_output_follows(tmp_path: Path) -> None:
    points = [
        record(
            f"{batch}-{length}",
            batch_size=batch,
            input_tokens=length,
            output_tokens=length,
            throughput_tok_s=1000.0 * batch / (1 + length / 256),
        )
        for batch in (1, 8)
        for length in (128, 256)
    ]
    told = _insight(tmp_path, "fig6", points)
    assert "Throughput at batch 8 over that at batch 1: 8 times (8 to 8) for mixtral-8x7b" in told
    assert (
        "at 256 tokens over that at 128 tokens: 0.75 times (0.75 to 0.75) for mixtral-8x7b, 0.75 at"
        in told
    )


def _layouts() -> list[dict[str, Any]]:
    def one(name: str, count: int, value: float | None, **layout: Any) -> dict[str, Any]:
        more = {"device_count": count, "threads": None} | layout
        if value is None:
            return failure(name, "crashed", **more)
        return record(name, throughput_tok_s=value, **more)

    return [
        one("a", 1, 100.0),
        one("b", 2, 180.0, tensor_parallel=2),
        one("c", 4, 300.0, tensor_parallel=4),
        one("d", 2, 110.0, pipeline_parallel=2),
        one("e", 2, None, tensor_parallel=2, expert_parallel=True),
        one("f", 4, 240.0, tensor_parallel=2, pipeline_parallel=2),
    ]


def test_figure_13_sets_every_layout_against_one_device(tmp_path: Path) -> None:
    told = _insight(tmp_path, "fig13", _layouts())
    assert "TP 3.00 times one device on 4 devices (efficiency 75 %)" in told
    assert "PP 1.10 times one device on 2 devices (efficiency 55 %)" in told
    assert "TP + PP 2.40 times one device on 4 devices (efficiency 60 %)" in told
    assert told.endswith("Without a value: mixtral-8x7b, TP + EP on 2 devices: crashed.")


def test_figure_13_begins_every_line_at_one_device(tmp_path: Path) -> None:
    write(tmp_path, _layouts())
    frame = of_records("parallelism").prepare(load(tmp_path))
    alone = frame.filter(device_count=1)
    assert alone.get_column("strategy").to_list() == ["PP", "TP", "TP + EP", "TP + PP"]
    assert alone.get_column("throughput_tok_s").unique().to_list() == [100.0]


def test_figure_13_keeps_kernels_of_experts_apart(tmp_path: Path) -> None:
    def unfused(name: str, value: float, **more: Any) -> dict[str, Any]:
        return {**_layouts()[0], "trial_id": name, "throughput_tok_s": value} | {
            "moe_backend": "unfused",
            **more,
        }

    spread = {"device_count": 2, "data_parallel": 2, "expert_parallel": True}
    told = _insight(
        tmp_path, "fig13", [*_layouts(), unfused("g", 50.0), unfused("h", 60.0, **spread)]
    )
    assert "DP + EP, unfused 1.20 times one device on 2 devices (efficiency 60 %)" in told
    assert "TP 3.00 times one device on 4 devices (efficiency 75 %)" in told


def test_figure_13_without_one_device_goes_from_the_fewest(tmp_path: Path) -> None:
    told = _insight(tmp_path, "fig13", _layouts()[1:3])
    assert "TP 1.67 times 2 on 4 devices" in told


def _kernels(**shares: float) -> list[dict[str, Any]]:
    return [
        record(
            f"{name}{batch}{length}",
            moe_backend=None if name == "fused" else name,
            batch_size=batch,
            input_tokens=length,
            output_tokens=length,
            throughput_tok_s=100.0 * batch * (share if batch == 1 else share**2),
        )
        for name, share in shares.items()
        for batch in (1, 16)
        for length in (128, 256)
    ]


@pytest.mark.parametrize(("name", "along"), [("fig14", "batch 1"), ("fig14b", "128 tokens")])
def test_figure_14_tells_what_fusing_gains(tmp_path: Path, name: str, along: str) -> None:
    told = _insight(tmp_path, name, _kernels(fused=1.0, unfused=0.8))
    assert "Throughput of fused over unfused: +41 % in the median of 4 points" in told
    assert "+25 % at" in told and "+56 % at" in told
    assert along in told
    assert "Intervals are apart in 4 of 4." in told


def test_figure_14_needs_both(tmp_path: Path) -> None:
    told = _insight(tmp_path, "fig14", _kernels(fused=1.0))
    assert "over" not in told


def _latencies() -> list[dict[str, Any]]:
    def one(model: str, seconds: float, **more: Any) -> dict[str, Any]:
        values = {"ttft_paper_s": seconds / 10, "itl_paper_s": seconds / 2000, "e2e_s": seconds}
        return record(model, model=model, **values, **more)

    return [
        one("mixtral-8x7b", 4.0, params_active=9),
        one("olmoe-1b-7b", 2.0, params_active=1, hidden_size=256),
        one("qwen3-30b-a3b", 3.0, params_active=3, num_experts=128),
        failure("phi", "oom", model="phi-3.5-moe"),
    ]


def test_figure_3_ranks_models_by_each_latency(tmp_path: Path) -> None:
    told = _insight(tmp_path, "fig3", _latencies())
    assert (
        "olmoe-1b-7b has the shortest time to first token, mixtral-8x7b the longest, "
        "100 % longer." in told
    )
    assert "rank alike by 1.00" in told
    assert "Without a value: phi-3.5-moe (out of memory)." in told


def test_figure_3_keeps_models_in_one_order_and_names_what_has_no_bar(tmp_path: Path) -> None:
    write(tmp_path, _latencies())
    figure = of_records("latency")
    frame = figure.prepare(load(tmp_path))
    assert frame.get_column("model").to_list() == [
        "olmoe-1b-7b",
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "phi-3.5-moe",
    ]
    spec = figure.chart(frame).to_dict()
    panels = spec["vconcat"][0]["hconcat"]
    titles = [one["layer"][0]["encoding"]["x"]["title"] for one in panels]
    assert titles == [
        "Time to first token (ms)",
        "Inter-token latency by Eq 1 (ms)",
        "End-to-end time (s)",
    ]
    told = [row["told"] for rows in spec["datasets"].values() for row in rows]
    assert told.count("out of memory") == 3 and told.count(None) == 9
    (pivot,) = figure.pivots(frame)
    assert pivot.rows[-1][1] == "OOM" and pivot.rows[0][3] == "2,000"


def test_figure_3_refuses_a_model_twice_and_mixed_batches(tmp_path: Path) -> None:
    write(tmp_path, [*_latencies(), record("again", model="olmoe-1b-7b", batch_size=1)])
    with pytest.raises(SelectionError, match="batch_size"):
        of_records("fig3").prepare(load(tmp_path))


@pytest.mark.parametrize("most", [790.0, 810.0, 850.0, 949.0, 960.0, 1000.0])
def test_every_height_has_round_numbers_on_its_axis(tmp_path: Path, most: float) -> None:
    """From 762 to 952 tokens per second there were none, and no picture."""
    write(
        tmp_path, [record("a", throughput_tok_s=most), record("b", top_k=4, throughput_tok_s=1.0)]
    )
    spec = spec_of(of_records("fig9"), load(tmp_path))
    points = next(
        one for one in spec["vconcat"][0]["spec"]["layer"] if one["mark"]["type"] == "point"
    )
    ticks = points["encoding"]["y"]["axis"]["values"]
    assert 4 <= len(ticks) <= 8 and ticks[0] == 0
