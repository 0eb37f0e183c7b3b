"""The command line: exit statuses, one-line errors, what is loaded.

A process of its own takes a second to import what it needs, so most are asked in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from orchestrator.__main__ import _outcomes, _show_summary, main
from orchestrator.run import Summary

GOOD = """\
name: s
base:
  model: {name: mixtral-8x7b, weights: dummy}
grid:
  model.top_k: [1, 2]
"""


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _asked(*arguments: object) -> Result:
    """The same within this process; a traceback is an exception here."""
    done = CliRunner().invoke(main, [*map(str, arguments)], prog_name="python -m orchestrator")
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


BAD = {
    "unknown key": (GOOD.replace("top_k", "topk"), (), r"s.yaml:5: grid.model.topk: unknown key"),
    "wrong type": (GOOD.replace("[1, 2]", "[one]"), (), "s.yaml:5: grid.model.top_k"),
    "empty axis": (GOOD.replace("[1, 2]", "[]"), (), "s.yaml:5: grid.model.top_k"),
    "unknown model": (GOOD.replace("8x7b", "8x8b"), (), "s.yaml:3: base.model.name"),
    "hostile where": (
        GOOD + 'where: [\'__import__("os").system("true")\']\n',
        (),
        "s.yaml:6: where",
    ),
    "hostile name": (GOOD.replace("name: s", "name: ../../s"), (), "s.yaml:1: name"),
    "broken YAML": (GOOD + "where: [\n", (), "s.yaml:"),
    "not YAML at all": ("\x00\x01", (), "s.yaml"),
    "bad override": (GOOD, ("base.workload.batch=4",), "command line: base.workload.batch=4"),
    "unknown profile": (GOOD, ("--profile", "h900"), "unknown device class 'h900'"),
    "unknown outcome": (GOOD, ("--rerun", "bad"), "bad: no such outcome"),
    "nothing to do": (GOOD, ("--limit", "0"), "--limit"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("mode", ["--dry-run", "--json"])
def test_what_the_user_can_get_wrong_ends_in_status_2_and_one_line(
    case: str, mode: str, tmp_path: Path
) -> None:
    text, arguments, words = BAD[case]
    path = tmp_path / "s.yaml"
    path.write_text(text)
    done = _asked(path, *arguments, mode, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_to_rerun_may_be_disturbed_alone_or_with_outcomes() -> None:
    context = click.Context(main)
    for text, found in (
        ("disturbed", {"disturbed"}),
        (" crashed, disturbed", {"crashed", "disturbed"}),
    ):
        assert _outcomes(context, main.params[0], text) == found
    words = r"noisy: no such outcome; known are ok, .*disturbed"
    with pytest.raises(click.BadParameter, match=words):
        _outcomes(context, main.params[0], "noisy")


def test_the_summary_counts_disturbed_records(capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary(
        sweep="s",
        run_id="r",
        dataset=Path("results/s"),
        trials=4,
        resumed=0,
        counts={"ok": 3, "oom": 1},
        disturbed=2,
        seconds=1.0,
        busy_share=None,
    )
    _show_summary(summary, as_json=False)
    said = capsys.readouterr().out
    assert said.startswith("4 of 4 trials have a record: 3 ok, 1 oom, 2 disturbed\n")
    assert "--rerun disturbed measures them again" in said
    _show_summary(summary, as_json=True)
    assert json.loads(capsys.readouterr().out)["disturbed"] == 2
    _show_summary(replace(summary, disturbed=0), as_json=False)
    assert "disturbed" not in capsys.readouterr().out


@pytest.mark.lengthy
def test_so_it_does_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(BAD["wrong type"][0])
    done = _run(path, "--json", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "s.yaml:5: grid.model.top_k" in done.stderr and done.stderr.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = _run(tmp_path / "no.yaml")
    assert done.returncode == 2
    assert "no.yaml" in done.stderr and "Traceback" not in done.stderr


def test_top_k_above_experts_everywhere_is_infeasible_not_wrong(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD.replace("[1, 2]", "[9, 10]"))
    done = _asked(path, "--dry-run", "--json", "--profile", "h100")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["groups"] == [] and len(plan["infeasible"]) == 2
    assert plan["infeasible"][0]["reason"] == "top_k 9 is above the 8 experts of a layer"


def test_dry_run_answers_what_is_promised(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    plan = json.loads(_run(path, "--dry-run", "--json", "--profile", "h100").stdout)
    assert {"sweep", "points", "trials", "dropped", "infeasible", "groups"} <= plan.keys()
    assert plan["predicted_seconds"] > 0 and plan["predicted_device_hours"] > 0
    keys = {"group_id", "devices", "trials", "predicted_memory_gib", "predicted_seconds"}
    assert all(keys <= group.keys() for group in plan["groups"])
    shown = _asked(path, "--dry-run", "--profile", "h100")
    assert "2 points, 2 trials, 2 engines" in shown.stdout
    assert "top_k 1" in shown.stdout
    assert not (tmp_path / "results").exists()


def test_dry_run_tells_who_will_find_no_activation_sheet(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD + "  measure.activation: [false, sheet]\n")
    done = _asked(path, "--dry-run", "--json", "--profile", "h100", "--sheets", tmp_path / "x")
    assert (done.exit_code, done.stderr) == (0, "")
    note = (
        "2 of 2 trials that ask for an activation sheet have none in "
        f"{tmp_path / 'x'}, and no trial of this sweep probes it: mixtral-8x7b, random ids, "
        "128/128 tokens, batch 1. Their s_mbu will be null"
    )
    assert json.loads(done.stdout)["notes"] == [note]
    shown = _asked(path, "--dry-run", "--profile", "h100", "--sheets", tmp_path / "x")
    assert note in " ".join(shown.stdout.split()) and shown.stderr == ""
    path.write_text(GOOD + "  measure.activation: [true, sheet]\n")
    assert "notes" not in json.loads(_asked(path, "--dry-run", "--json").stdout)


@pytest.mark.lengthy
@pytest.mark.parametrize("arguments", [["--help"], ["{sweep}", "--dry-run"]])
def test_neither_help_nor_dry_run_loads_an_engine_or_ray(
    arguments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    argv = ["orchestrator", *(one.format(sweep=path) for one in arguments)]
    code = (
        "import sys; from orchestrator.__main__ import main\n"
        f"sys.argv = {argv!r}\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.lengthy
def test_results_that_a_job_would_lose_are_refused(tmp_path: Path) -> None:
    """Ray removes its copy of a job's working directory; no dataset is begun in one."""
    out = tmp_path / "working_dir_files" / "_ray_pkg_1" / "results"
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", path, "--out", out, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
    )
    assert done.returncode == 2, done.stderr
    assert "copy of the working directory, which goes with the job" in done.stderr
    assert not out.exists()
