"""The figure of expert weights by layer and batch, from samples of known arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from analysis import load
from analysis.__main__ import main
from analysis.errors import SelectionError
from analysis.figures.layer_bytes import LAYER_BYTES
from analysis.figures.registry import find
from analysis.figures.write import write as write_figure
from tests.unit.test_analysis_dataset import record, write
from workers.moe.accounting import distinct_experts

EXPERTS, TOP_K, EXPERT = 8, 2, 50_000
MOE_LAYERS = 4
"""Of 5 layers; an expert has 50,000 parameters, 0.1 MB in 16 bits."""
SPARE = MOE_LAYERS * (EXPERTS - TOP_K) * EXPERT


def trial(batch: int, **columns: Any) -> dict[str, Any]:
    return record(
        f"b{batch}",
        model="small-moe",
        batch_size=batch,
        num_experts=EXPERTS,
        top_k=TOP_K,
        num_layers=5,
        params_total=SPARE + 1_000_000,
        params_active=1_000_000,
        activation_source="traced",
        **columns,
    )


def probe(batch: int, *passes: list[int], repeat: int = 0) -> dict[str, Any]:
    """A prompt pass, a mixed one, and then decode passes with these experts per MoE layer."""
    return {
        "run_id": "r0",
        "trial_id": f"b{batch}",
        "attempt": 1,
        "kind": "probe",
        "repeat": repeat,
        "batch_size": batch,
        "pass_s": [0.1] * (2 + len(passes)),
        "pass_new": [[5] * batch, [1] + [5] * (batch - 1)] + [[1] * batch] * len(passes),
        "pass_context": [[0] * batch, [5] + [0] * (batch - 1)] + [[9] * batch] * len(passes),
        "pass_decoding": [[False] * batch, [True] + [False] * (batch - 1)]
        + [[True] * batch] * len(passes),
        "pass_experts": [[8] * MOE_LAYERS] * 2 + [list(one) for one in passes],
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path, [trial(2), trial(16)])
    few = probe(2, [2, 3, 4, 4], [2, 3, 2, 4])
    many = [probe(16, [4, 6, 8, 8]), probe(16, [5, 6, 8, 8], repeat=1)]
    timed = few | {"kind": "timed", "pass_experts": None, "pass_decoding": None, "pass_new": None}
    write(tmp_path, [few, *many, timed], table="samples")
    return tmp_path


def prepared(folder: Path) -> pl.DataFrame:
    return LAYER_BYTES.prepare(load(folder), load.samples(folder))


def test_bytes_are_experts_times_their_size(dataset: Path) -> None:
    frame = prepared(dataset)
    assert frame.select("moe_layer", "batch_size", "passes").rows() == [
        (1, 2, 2), (1, 16, 2), (2, 2, 2), (2, 16, 2), (4, 2, 2), (4, 16, 2),
    ]  # fmt: skip
    assert frame.get_column("expert_mb").to_list() == pytest.approx([0.1] * 6)
    assert frame.get_column("experts").to_list() == [2.0, 4.5, 3.0, 6.0, 4.0, 8.0]
    assert frame.get_column("traced_mb").to_list() == pytest.approx([0.2, 0.45, 0.3, 0.6, 0.4, 0.8])
    assert frame.get_column("all_mb").to_list() == pytest.approx([0.8] * 6)
    expected = 0.1 * distinct_experts(EXPERTS, TOP_K, 16)
    assert frame.filter(batch_size=16).get_column("uniform_mb")[0] == pytest.approx(expected)


def test_the_sentence_has_both_ends_and_the_layers_apart(dataset: Path) -> None:
    sentence = LAYER_BYTES.insight(prepared(dataset))
    assert sentence == (
        "At batch 2 a layer of small-moe reads 0.3 MB of experts; MBU takes 0.8 MB, 167 % more. "
        "At batch 16 a layer of small-moe reads 0.6 MB of experts; MBU takes 0.8 MB, 30 % more. "
        "Layers differ most at batch 16: 4.50 experts in MoE layer 1, 8.00 in 4."
    )


def test_tables_picture_and_command(dataset: Path) -> None:
    frame = prepared(dataset)
    tables = LAYER_BYTES.pivots(frame)
    assert [one.title for one in tables] == [
        f"small-moe, MoE layer {layer} of 4" for layer in (1, 2, 4)
    ]
    assert tables[0].columns == ("2", "16")
    assert tables[0].rows[0] == ("MB, traced", "0.200", "0.450")
    write_figure(LAYER_BYTES, frame, dataset / "x.svg")
    page = (dataset / "x.svg").read_text()
    for words in ("layer 1, traced", "layer 4, traced", "uniform routing", "all experts (MBU)"):
        assert words in page
    assert "NaN" not in page
    asked = ["figure", "layer-bytes", str(dataset), "-o", str(dataset / "x.csv")]
    result = CliRunner().invoke(main, asked)
    assert (result.exit_code, result.stderr) == (0, "")
    assert pl.read_csv(dataset / "x.csv", schema=frame.schema).equals(frame)
    assert find("layer-bytes") is LAYER_BYTES


def test_what_has_no_traced_decode_passes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [trial(2)])
    write(tmp_path, [probe(2)], table="samples")
    with pytest.raises(SelectionError, match="no unquantised trial has traced decode passes"):
        prepared(tmp_path)
    other = tmp_path / "quantised"
    write(other, [trial(2, quantization="fp8")])
    write(other, [probe(2, [2, 2, 2, 2])], table="samples")
    with pytest.raises(SelectionError, match="no unquantised trial"):
        prepared(other)
