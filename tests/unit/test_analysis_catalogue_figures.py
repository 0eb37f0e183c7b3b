"""Figures that are computed from the catalogues: their numbers, sentences, files and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest
from click.testing import CliRunner, Result

from analysis.__main__ import main
from analysis.breakdown import OUTSIDE, PARTS, breakdown
from analysis.errors import OptionError
from analysis.figures.figure import CatalogueFigure
from analysis.figures.registry import FIGURES, find
from analysis.figures.sparsity import activated_share
from analysis.figures.write import write
from analysis.options import Options
from analysis.structures import architecture, structure
from workers.hardware.device import devices
from workers.moe.architecture import catalogue

FROM_CATALOGUE = [figure for figure in FIGURES if isinstance(figure, CatalogueFigure)]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def drawn(name: str, **asked: Any) -> tuple[CatalogueFigure, pl.DataFrame]:
    figure = find(name)
    assert isinstance(figure, CatalogueFigure)
    return figure, figure.frame(Options(**asked))


def said(name: str, **asked: Any) -> str:
    figure, frame = drawn(name, **asked)
    return figure.insight(frame)


def test_the_papers_numbers_are_aliases() -> None:
    assert {figure.name: figure.aliases for figure in FROM_CATALOGUE} == {
        "layer-breakdown": ("mib-fig1",),
        "bandwidth-power": ("cap-fig4",),
        "sparsity": ("cap-fig5", "cap-fig6"),
    }


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_parts_add_up_to_the_model(name: str) -> None:
    a = architecture(name)
    rows = breakdown(name, a)
    whole = rows.select(
        (pl.col("count") * pl.col("params_total")).sum().alias("total"),
        (pl.col("count") * pl.col("params_active")).sum().alias("active"),
    )
    assert whole.row(0) == (a.params_total, a.params_active)
    kinds = rows.filter(pl.col("layers") != OUTSIDE).unique("layers")
    assert kinds.get_column("count").sum() == a.num_layers
    assert set(rows.get_column("part")) <= set(PARTS)


def test_layers_of_a_kind_are_one_row_with_their_number() -> None:
    rows = breakdown("x", architecture("deepseek-v2-lite"))
    assert rows.get_column("layers").unique(maintain_order=True).to_list() == [
        "1 dense layer",
        "26 MoE layers",
        OUTSIDE,
    ]
    experts = rows.filter(pl.col("part") == "routed experts").row(0, named=True)
    assert (experts["count"], experts["params_total"]) == (26, 64 * 8_650_752)
    assert experts["params_active"] == 6 * 8_650_752


def test_whether_experts_dominate_is_worked_out() -> None:
    agrees = said("mib-fig1")
    assert "97 % of the 46.70 billion parameters of mixtral-8x7b and 88 % of" in agrees
    assert "holds for mixtral-8x7b, olmoe-1b-7b and qwen1.5-moe-a2.7b." in agrees
    assert "does not" not in agrees
    mixed = said("mib-fig1", models=("mixtral-8x7b", "arctic"))
    assert "holds for mixtral-8x7b. It does not hold for arctic." in mixed
    assert "(as the paper says) does not hold for qwen3-8b" in said(
        "mib-fig1", models=("qwen3-8b",)
    )


@pytest.mark.parametrize(
    ("name", "share"),
    [("deepseek-v2-lite", 57.15), ("qwen1.5-moe-a2.7b", 47.60), ("deepseek-r1", 24.19)],
)
def test_golden_shares_at_batch_8(name: str, share: float) -> None:
    assert round(100 * activated_share(structure(name, "bf16"), 8), 2) == share


def test_sparsity_grows_to_all_experts_and_asks_for_more() -> None:
    _, frame = drawn("sparsity")
    rows = frame.filter(pl.col("kind") == "model")
    assert rows.get_column("batch").unique().sort().to_list() == [2**n for n in range(10)]
    for (_,), one in rows.group_by("name"):
        ordered = one.sort("batch")
        for column in ("share", "bandwidth_gb_s"):
            assert ordered.get_column(column).is_sorted()
        assert ordered.get_column("share")[-1] == pytest.approx(1, abs=1e-4)
    traced = frame.filter(pl.col("kind") == "paper").select("name", "batch", "share").rows()
    assert traced == [
        ("deepseek-v2-lite", 8, 0.5305),
        ("qwen1.5-moe-a2.7b", 8, 0.4679),
        ("deepseek-r1", 8, 0.1844),
    ]


def test_the_sparsity_sentence_follows_the_options() -> None:
    usual = said("sparsity")
    assert "57.15 % of deepseek-v2-lite, 47.60 % of qwen1.5-moe-a2.7b and 24.19 %" in usual
    assert "18.44 % of deepseek-r1 (+5.7)" in usual
    assert "so it bounds them" in usual
    assert "m3-max 32 (here all), agx-orin-64gb 16 (here all) and orin-nx-16gb 4 (here 8)" in usual
    assert "deepseek-v2-lite (whose weights do not fit)" in usual  # 31 GB in an Orin NX
    slower = said("sparsity", tpot_s=0.5, batches=(1, 2), models=("deepseek-v2-lite",))
    assert "At batch 2 uniform routing activates 22.65 % of deepseek-v2-lite." in slower
    assert "The paper" not in slower
    long = said("sparsity", context=4096, models=("deepseek-v2-lite",))
    assert "orin-nx-16gb 4 (as here)" in long
    assert "KV cache of 4,096 tokens" in long


def test_devices_are_left_out_or_chosen_by_alias() -> None:
    _, frame = drawn("sparsity", devices=("orin-nx", "orin-nx-16gb", "h100"))
    assert frame.filter(pl.col("kind") == "device").get_column("name").to_list() == [
        "orin-nx-16gb",
        "h100",
    ]


def test_the_power_map_has_all_devices_and_two_lines_per_model() -> None:
    _, frame = drawn("cap-fig4")
    assert frame.filter(pl.col("kind") == "device").height == len(devices())
    lines = frame.filter(pl.col("kind") == "model")
    assert lines.get_column("name").value_counts().get_column("count").to_list() == [2, 2, 2]
    needs = {
        (name, activation): need
        for name, activation, need in lines.select("name", "activation", "bandwidth_gb_s").rows()
    }
    assert needs["deepseek-r1", "every expert"] == pytest.approx(18_876, rel=1e-3)
    assert needs["deepseek-r1", "batch 1"] == pytest.approx(1_032, rel=1e-3)


def test_the_power_sentence_follows_the_options() -> None:
    usual = said("bandwidth-power")
    assert "of 34 devices only dgx-h100 at 10,200 W" in usual.replace(str(len(devices())), "34")
    assert "has 1,008 GB/s: 98 % of the need" in usual
    assert "m3-max has no known power" in usual
    slow = said("bandwidth-power", tpot_s=0.2, devices=("rtx-4090", "h100"))
    assert "has 1,008 GB/s, and so it is." in slow
    assert "none has it, h100 has most" in slow
    assert "no known power" not in slow
    eight_bit = said("bandwidth-power", dtype="fp8", models=("deepseek-r1",), context=1024)
    assert "deepseek-r1 (fp8) needs 53" in eight_bit
    assert "KV cache of 1,024 tokens" in eight_bit


@pytest.mark.lengthy
@pytest.mark.parametrize("figure", FROM_CATALOGUE, ids=lambda one: one.name)
def test_every_one_says_that_it_is_not_measured(figure: CatalogueFigure) -> None:
    frame = figure.frame(Options())
    assert "not measured" in figure.insight(frame)
    spec = figure.chart(frame).to_dict()
    assert "not measured" in str(spec["title"]["subtitle"])
    assert figure.pivots(frame)


@pytest.mark.lengthy
@pytest.mark.parametrize("figure", FROM_CATALOGUE, ids=lambda one: one.name)
def test_files_hold_the_frame_the_names_and_the_sentence(
    figure: CatalogueFigure, tmp_path: Path
) -> None:
    frame = figure.frame(Options(models=("mixtral-8x7b", "deepseek-v2-lite")))
    for suffix in ("csv", "svg", "html", "png"):
        write(figure, frame, tmp_path / f"x.{suffix}")
    assert pl.read_csv(tmp_path / "x.csv", schema=frame.schema).equals(frame)
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [" ".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    page = " ".join(texts)
    assert figure.title in texts
    assert figure.insight(frame) in page
    assert "mixtral-8x7b" in page and "deepseek-v2-lite" in page
    assert "NaN" not in (tmp_path / "x.svg").read_text()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert figure.title in (tmp_path / "x.html").read_text()


@pytest.mark.lengthy
def test_one_model_and_no_device_with_a_known_power_is_still_a_picture(tmp_path: Path) -> None:
    figure, frame = drawn("bandwidth-power", models=("olmoe-1b-7b",), devices=("m3-max",))
    write(figure, frame, tmp_path / "x.svg")
    assert "olmoe-1b-7b, every expert" in (tmp_path / "x.svg").read_text()
    figure, frame = drawn("sparsity", batches=(4,), models=("olmoe-1b-7b",))
    write(figure, frame, tmp_path / "y.svg")
    assert "orin-nx-16gb" in (tmp_path / "y.svg").read_text()


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    result = run("figure", "cap-fig6", "-o", str(path), "--batch", "8", "--model", "deepseek-r1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("At batch 8 uniform routing activates 24.19 % of deepseek-r1.")
    assert pl.read_csv(path).filter(pl.col("kind") == "model").height == 1
    table = run("table", "--figure", "cap-fig6")
    assert "57.15%" in table.stdout
    rows = json.loads(run("table", "--figure", "mib-fig1", "--json").stdout)
    assert rows[0]["part"] == "routed experts"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("figure layer-breakdown --tpot 1 -o x.csv", "takes no --tpot; it takes --model"),
        ("figure bandwidth-power --batch 1 -o x.csv", "'bandwidth-power' takes no --batch"),
        ("figure fig7 results/x --model m -o x.csv", "figure 'hparam-ffn' takes no --model"),
        ("figure fig7 -o x.csv", "is drawn from records: name a DATASET"),
        ("figure sparsity results/x -o x.csv", "it takes no dataset (results/x)"),
        ("figure sparsity --only a=b -o x.csv", "it takes no --only"),
        ("figure sparsity --model qwen3-8b -o x.csv", "qwen3-8b is dense"),
        ("figure sparsity --model mixtral -o x.csv", "no model 'mixtral'; did you mean 'mixtral"),
        ("figure sparsity --device orin -o x.csv", "no device 'orin'; did you mean"),
        ("figure sparsity --dtype fp9 -o x.csv", "no dtype 'fp9'; did you mean 'fp8'?"),
        ("figure sparsity --s-mbu 0 -o x.csv", "--s-mbu 0: a share"),
        ("table", "name a DATASET, or a --figure"),
        ("table results/x --tpot 1", "a table of records takes no --tpot"),
    ],
)
def test_mistakes_end_with_two_and_one_line(arguments: str, message: str) -> None:
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_option_is_filled_from_defaults_or_refused() -> None:
    defaults = Options(models=("a",), tpot_s=0.1)
    asked = Options(models=("b",), s_mbu=0.5)
    assert asked.over(defaults) == Options(models=("b",), tpot_s=0.1, s_mbu=0.5)
    assert Options().over(defaults) == defaults
    with pytest.raises(OptionError, match="it takes no --s-mbu; it takes --model, --tpot"):
        asked.over(defaults, takes=("models", "tpot_s"), what="it")
