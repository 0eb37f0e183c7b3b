"""`python -m analysis`: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from analysis import load
from analysis.__main__ import main
from analysis.figures.registry import FIGURES
from analysis.tables import reasons, records_table
from tests.unit.test_analysis_dataset import failure, grid, record, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    write(tmp_path / "hparam", grid())
    return str(tmp_path / "hparam")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def shown(*renderables: object) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(*renderables, sep="\n")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_figures_are_listed_with_the_papers() -> None:
    result = run("figures")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == len(FIGURES)
    assert lines[0].startswith("hparam-ffn, fig7 ")
    assert lines[0].endswith("(MoE-Inference-Bench, Figure 7)")


@pytest.mark.lengthy
def test_figure_writes_files_and_prints_the_insight(dataset: str, tmp_path: Path) -> None:
    svg, table = tmp_path / "x.svg", tmp_path / "x.CSV"
    result = run("figure", "fig9", dataset, "-o", str(svg), "-o", str(table))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("From top-k 1 to 4 throughput falls by 20 % at FFN 224")
    assert svg.read_text().startswith("<svg")
    assert table.read_text().count("\n") == 19


@pytest.mark.lengthy
def test_figure_in_a_process_of_its_own(dataset: str, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    command = [sys.executable, "-m", "analysis", "figure", "fig7", dataset, "-o", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("From FFN 224 to 896")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help_needs_nothing_but_click() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from analysis.__main__ import main\n"
        "for name in ('figure', 'table', 'plan', 'models', 'devices', 'replay'):\n"
        "    assert CliRunner().invoke(main, [name, '--help']).exit_code == 0\n"
        "print({'torch', 'vllm', 'ray', 'polars', 'pyarrow', 'altair', 'rich'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.lengthy
def test_altair_is_imported_only_to_draw(tmp_path: Path) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from analysis.__main__ import main\n"
        "for words in ('plan --model mixtral-8x7b', 'models', 'devices', 'table --figure sparsity',"
        f" 'figure sparsity -o {tmp_path}/x.csv', 'figures'):\n"
        "    assert CliRunner().invoke(main, words.split()).exit_code == 0, words\n"
        "print({'torch', 'vllm', 'ray', 'transformers', 'altair'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_table_has_a_row_per_trial_and_a_sentence(dataset: str) -> None:
    result = run("table", dataset)
    assert result.exit_code == 0
    assert result.stdout.startswith("mixtral-8x7b scaled to 1/8")
    assert "f224e8k1" in result.stdout
    assert "1,000 ±1 %" in result.stdout
    assert "oom (load): cannot allocate memory" in result.stdout
    assert result.stdout.rstrip().endswith("of trial f224e8k1.")


def test_table_as_json_is_json_and_nothing_else(dataset: str) -> None:
    result = run("table", dataset, "--json", "--only", "top_k=2")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert len(found) == 6
    assert {one["outcome"] for one in found} == {"ok", "oom"}
    assert found[0]["finished_at"] == "2026-11-22T12:00:00+00:00"
    assert found[0]["ci_width"] == pytest.approx(0.02)


def test_table_of_a_figure_is_its_grid(dataset: str) -> None:
    result = run("table", dataset, "--figure", "fig9")
    assert result.exit_code == 0
    assert [word for word in ("FFN 224", "FFN 448", "FFN 896") if word in result.stdout]
    row = next(one for one in result.stdout.splitlines() if "OOM" in one)
    assert row.split() == ["16", "experts", "450", "±1", "%", "OOM", "skipped"]
    assert "From top-k 1 to 4 throughput falls" in result.stdout
    drawn = json.loads(run("table", dataset, "--figure", "fig9", "--json").stdout)
    assert [one["out_of_memory"] for one in drawn].count(True) == 2


def test_a_run_that_has_only_begun_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    result = run("table", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, "No records yet.\n")
    assert json.loads(run("table", str(tmp_path), "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure", "fig77", "{}", "-o", "{}/x.svg"], "no figure 'fig77'; did you mean 'fig7'?"),
        (["figure", "fig7", "{}/nothing", "-o", "{}/x.svg"], "no dataset in"),
        (["figure", "fig7", "{}/..", "-o", "{}/x.svg"], "did you mean"),
        (["figure", "fig7", "{}", "-o", "{}/x.pdf"], "known: .csv, .html, .png, .svg"),
        (["figure", "fig7", "{}", "-o", "{}/no/x.svg"], "there is no folder"),
        (["figure", "fig7", "{}", "-o", "{}/x.svg", "--only", "top_k=x"], "is a number"),
        (["table", "{}", "--only", "topk=1"], "did you mean 'top_k'?"),
        (
            ["table", "{}", "--figure", "radar"],
            "no figure 'radar'; known: activation-heatmap, bandwidth-power",
        ),
    ],
)
def test_mistakes_end_with_two_and_one_line(
    dataset: str, arguments: list[str], message: str
) -> None:
    result = run(*(one.replace("{}", dataset) for one in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_mixed_datasets_end_with_two_until_one_is_chosen(dataset: str, tmp_path: Path) -> None:
    write(tmp_path / "gpu", [record("gpu", profile="h100")])
    arguments = ("table", dataset, str(tmp_path / "gpu"), "--figure", "fig7")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "profile (cpu, h100)" in result.stderr
    assert run(*arguments, "--only", "profile=cpu").exit_code == 0


def test_a_torn_file_ends_with_two(dataset: str) -> None:
    path = Path(dataset) / "records" / "torn.arrow"
    path.write_bytes(b"ARROW1")
    result = run("table", dataset)
    assert result.exit_code == 2
    assert str(path) in result.stderr


def test_only_what_varies_is_a_column(tmp_path: Path) -> None:
    write(tmp_path, [record("a", top_k=1), record("b", top_k=2, sweep="other")])
    text = shown(records_table(load(tmp_path).collect()))
    heading = text.splitlines()[-5:]
    assert "sweep" in text
    assert not any("batch" in line or "ffn" in line for line in heading)


def test_utilisation_is_shown_where_it_was_recorded(tmp_path: Path) -> None:
    write(tmp_path, [record("a", top_k=1, s_mbu=0.1234, s_mfu=None), record("b", top_k=2)])
    text = shown(records_table(load(tmp_path).collect()))
    assert "S-MBU" in text and "S-MFU" not in text
    assert "12.3 %" in text


def test_experts_that_are_no_expectation_are_told(tmp_path: Path) -> None:
    points = [
        record("a", batch_size=1, s_mbu=0.5, activation_source="sheet"),
        record("b", batch_size=2, s_mbu=0.5, activation_source="uniform"),
        record("c", batch_size=4, mbu=0.5, outcome_reason="no activation sheet fits: none"),
    ]
    write(tmp_path / "some", points)
    frame = load(tmp_path / "some").collect()
    heading, *lines = shown(records_table(frame)).split("outcome", 1)[1].splitlines()
    assert any(line.rstrip().endswith("from") for line in [heading, *lines])
    assert [line.split()[-1] for line in lines if line.split()[:1] == ["a"]] == ["sheet"]
    assert shown(*reasons(frame)).strip() == "1 × ok: no activation sheet fits: none"
    write(tmp_path / "plain", points[1:2])
    assert "uniform" not in shown(records_table(load(tmp_path / "plain").collect()))


def test_no_number_is_cut_short_by_a_narrow_terminal() -> None:
    done = run("plan", "--model", "mixtral-8x7b", "--batch", "1", "--batch", "64")
    assert "…" not in done.stdout
    assert "2 × (1,400 W, $76,000, memory 55 %)" in done.stdout
    assert "…" not in run("models", "mixtral-8x7b").stdout


def test_reasons_are_grouped_and_made_harmless(tmp_path: Path) -> None:
    nasty = "[red]died\x1b[2J\nof it"
    write(
        tmp_path,
        [record("a"), *(failure(f"b{n}", "crashed", outcome_reason=nasty) for n in (1, 2))],
    )
    write(tmp_path, [failure("c", "skipped")], name="1.arrow")
    assert shown(*reasons(load(tmp_path).collect())).splitlines() == [
        "2 × crashed: [red]died [2J of it",
        "1 × skipped: no reason recorded",
    ]
    many = [failure(str(n), "crashed", outcome_reason=str(n)) for n in range(12)]
    write(tmp_path / "many", many)
    assert "and 4 more reasons" in shown(*reasons(load(tmp_path / "many").collect()))
