"""`python -m analysis replay`: the same point from a record, or one line on why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from analysis import load, replay
from analysis.__main__ import main
from analysis.errors import DatasetError
from analysis.replay import CHANGED, Made, check, find, rebuilt, written
from analysis.replay_tables import replay_facts, replay_table, sentences
from orchestrator import manifest, plan
from orchestrator import sweep as sweeps
from orchestrator.grid import expand
from orchestrator.plan import own_dimensions
from orchestrator.store import Dataset
from tests.unit.test_analysis_dataset import NOON, record, write
from tests.unit.test_sweep import examples
from workers import recorder, runner
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished
from workers.contract.record import RECORDS, rows
from workers.hardware.device import device
from workers.hardware.facts import dumps
from workers.moe.sheets import FOLDER
from workers.secrecy import HIDDEN, hide

pytestmark = pytest.mark.lengthy

ROOT = Path(__file__).resolve().parents[2]

SCALED = """\
name: scaled
base:
  model: {name: mixtral-8x7b, weights: dummy}
  layout: {tensor: 4}
  workload: {input_tokens: 64, output_tokens: 32}
  engine: {kind: roofline}
grid:
  model.top_k: [1, 2, 16]
  workload.batch_size: [1, 4]
where: [workload.batch_size * model.top_k < 60]
profiles:
  h100:
    base: {model: {scale: 0.5, num_layers: 4}, workload.output_tokens: 16}
    grid: {model.top_k: [2, 16]}
"""
HEAD = "name: s\nbase:\n  model: {name: olmoe-1b-7b, weights: dummy}\n"
ODD = {
    "nested": "  model.prune: {ratio: 0.75}\n"
    "grid:\n  model.prune.kind: [inter, intra]\n  engine.speculative.model: [ngram]\n",
    "whole blocks": "  model.prune: {ratio: 0.75, criterion: norm}\n"
    "grid:\n  model.prune: [null, {}, {kind: intra}]\n"
    "  engine.speculative: [null, {model: ngram, tokens: 2}]\n",
    "arguments": "  engine.args: {x: {y: 1, z: [1, {a.b: 2}]}, w: null}\n"
    "grid:\n  engine.args.x.y: [2, {q: 3}, [4]]\n  engine.args.v.u: [false, 'false']\n",
    "arguments as a whole": "  engine.args: {x: 1}\n"
    "grid:\n  engine.args: [{}, {a.b: 1}, {a: {b: 1}}, {z: {}}]\n",
    "zip and cases": "zip: {workload.input_tokens: [8, 16], workload.output_tokens: [4, 2]}\n"
    "cases:\n- {}\n- layout: {expert: true, tensor: 2}\n  measure.timeout_s: 5\n"
    "- {measure.accuracy: [gsm8k, 'no']}\n",
    "words": "  workload: {arrivals: ''}\n"
    "grid:\n  model.revision: ['1e10', '010', 'true', 'Null', '~', no, 'a b', 'a: b', '# c',"
    ' "\\u00e9\\x07\\u2028\\U0001f600", "two\\nlines", "\'q\'", \'"\', "0x1F", "12:30", "="]\n'
    "  model.name: [of/the-hub]\n",  # of a catalogue's skeleton a revision changes nothing
    "numbers": "  engine: {memory_limit_gib: 1.0e-05}\n"
    "grid:\n  measure.ci_width: [1, 0.1, 1.0e-7, 123456789.123456789, 1e22]\n"
    "  workload.seed: [0, 9223372036854775807]\n",
    "a name from the axes": "grid:\n  model.scale: [0.5, 1]\n  model.weights: [dummy]\n",
    "nothing varies": "",
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def dataset(folder: Path, text: str = SCALED, *overrides: str, run_id: str = "r1") -> Path:
    """What a run of a roofline sweep leaves, in a folder of the sweep's name."""
    path = folder / f"{run_id}.yaml"
    folder.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    sweep = sweeps.load(path, overrides, "h100")
    planned = plan.build(sweep, expand(sweep, own_dimensions), device("h100"))
    begun = manifest.started(
        manifest.read(folder / sweep.name / "manifest.json", sweep.name),
        run_id,
        at=datetime.now(UTC),
        command=["orchestrator"],
        profile="h100",
        sweep=sweep.resolved,
        driver=manifest.environment(),
    )
    with Dataset.open(folder, sweep.name) as opened:
        manifest.write(opened.manifest, begun)
        names: dict[str, Any] = {"sweep": sweep.name, "run_id": run_id, "profile": "h100"}
        for one in planned.infeasible:
            assert one.infeasible is not None
            ticket = Ticket(
                trial=one.trial, trial_id=one.trial_id, axes=one.axes, digests=one.digests
            )
            job = Job(**names, group_id=None, tickets=())
            opened.commit(run_id, records=recorder.failed(job, ticket, one.infeasible))
        for group in planned.groups:
            tickets = tuple(
                Ticket(trial=one.trial, trial_id=one.trial_id, axes=one.axes, digests=one.digests)
                for one in group.trials
            )
            job = Job(**names, group_id=group.group_id, tickets=tickets)
            for message in runner.run(job):
                if isinstance(message, Finished):
                    opened.commit(run_id, records=message.record, samples=message.samples)
        return opened.folder


def ids(folder: Path, **columns: Any) -> list[str]:
    frame = load(folder).filter(**columns).collect()
    return frame.get_column("trial_id").to_list()


def refusal(*arguments: object) -> str:
    """The one line with which a replay is refused, before anything was run."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


def changed(folder: Path, **columns: Any) -> None:
    """Rewrites all records of a dataset with other columns."""
    found = load(folder, every=True).select(RECORDS.names).collect().to_dicts()
    shutil.rmtree(folder / "records")
    write(folder, [one | columns for one in found])


def with_sweep(folder: Path, change: Any) -> None:
    """Rewrites the sweep that a manifest holds."""
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    for one in told["runs"]:
        change(one["sweep"])
    path.write_text(json.dumps(told))


# ---------------------------------------------------------------- from a record to its point


def test_every_point_of_a_scaled_sweep_is_rebuilt_without_its_profile_again(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    names = ids(folder)
    assert len(names) == 3  # 2 x 2 points, of which `where` drops one
    assert len(ids(folder, outcome="infeasible")) == 1
    for name in names:
        made = find(name, [folder])
        point = rebuilt(made)
        assert point.keys() == {"name", "base", "grid"}
        assert point["base"]["model"]["scale"] == 0.5
        assert point["base"]["workload"]["output_tokens"] == 16
        assert {key: [value] for key, value in json.loads(made.record["axes"]).items()} == (
            point["grid"]
        )
        check(made, written(made, point))


@pytest.mark.parametrize("profile", ["cpu", "h100"])
@pytest.mark.parametrize("name", [*ODD, *map(str, range(len(examples()))), "hparam", "scaled"])
def test_a_point_comes_back_as_the_trial_it_was(tmp_path: Path, name: str, profile: str) -> None:
    path = tmp_path / "s.yaml"
    text = HEAD + ODD[name] if name in ODD else SCALED
    if name == "hparam":
        text = (ROOT / "sweeps" / "hparam.yaml").read_text()
    elif name.isdigit():
        text = examples()[int(name)]
    path.write_text(text)
    sweep = sweeps.load(path, (), profile)
    kept = json.loads(json.dumps(hide(sweep.resolved)))
    points = expand(sweep, own_dimensions).points
    for point in points[:: len(points) // 8 + 1]:
        made = Made(
            record={
                "sweep": sweep.name,
                "trial_id": "t",
                "run_id": "r",
                "axes": json.dumps(point.axes),
            },
            dataset=tmp_path,
            run={"sweep": kept},
            companions=1,
        )
        path.write_text(written(made, rebuilt(made)), encoding="utf-8")
        (again,) = expand(sweeps.load(path, (), profile)).points
        assert again.trial_id == point.trial_id
        assert again.trial == point.trial
        assert again.axes == point.axes


def test_print_writes_the_sweep_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset(tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where nothing is installed
    trial_id = ids(folder, top_k=2, batch_size=4)[0]
    result = run(trial_id[:8], "--print")  # from results/, since no dataset is named
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"# Trial {trial_id} of run r1, written by analysis replay.",
        "name: scaled",
        "base:",
        "  model: {name: mixtral-8x7b, weights: dummy, scale: 0.5, num_layers: 4}",
        "  layout: {tensor: 4}",
        "  workload: {input_tokens: 64, output_tokens: 16}",
        "  engine: {kind: roofline}",
        "grid:",
        "  model.top_k: [2]",
        "  workload.batch_size: [4]",
    ]
    assert {one.name for one in tmp_path.iterdir()} == {"results"}


def test_the_newest_record_of_a_repeated_trial_is_the_one(tmp_path: Path) -> None:
    dataset(tmp_path)
    folder = dataset(tmp_path, run_id="r2")
    made = find(ids(folder, outcome="ok")[0], [folder])
    assert made.record["run_id"] == made.run["run_id"] == "r2"
    assert made.companions == 2  # both batches, of that run
    assert made.code == manifest_code()


def manifest_code() -> str | None:
    git = manifest.environment()["git"]
    return git and git["commit"][:12] + (CHANGED if git["dirty"] else "")


def test_trials_that_shared_an_engine_are_counted(tmp_path: Path) -> None:
    folder = dataset(tmp_path, SCALED, "base.engine.eager=true", "grid.model.top_k=[1,2]")
    found = [find(name, [folder]).companions for name in ids(folder)]
    assert found == [4, 4, 4, 4]


# ------------------------------------------------------------------------------- refusals


def test_identities_that_do_not_point_at_one_record(tmp_path: Path) -> None:
    folder = tmp_path / "hparam"
    write(folder, [record("abcdef01"), record("abcdef02"), record("ffffff00")])
    assert "'abcde' is too short: give 6 digits" in refusal("abcde", folder)
    assert f"no trial_id begins with 'abcdea' in {folder}" in refusal("abcdea", folder)
    assert "2 trial_ids begin with 'abcdef': abcdef01, abcdef02" in refusal("abcdef", folder)
    many = [record(f"abcdef{number:02}") for number in range(20)]
    write(tmp_path / "many", many)
    assert "20 trial_ids" in refusal("abcdef", tmp_path / "many")
    assert refusal("abcdef", tmp_path / "many").endswith("abcdef07, …\n")


def test_records_of_several_environments_are_for_the_user_to_choose(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (name,) = ids(folder, batch_size=1, outcome="ok")
    (row,) = load(folder).filter(trial_id=name).select(RECORDS.names).collect().to_dicts()
    write(folder, [row | {"device": "another", "run_id": "r9"}], name="1.arrow")
    assert "device" in refusal(name, folder, "--print")
    assert run(name, folder, "--print", "--only", f"device={row['device']}").exit_code == 0
    assert "run r9 is not in" in refusal(name, folder, "--print", "--only", "device=another")


def test_where_nothing_can_be_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name the DATASET of the record: there is none in results" in refusal("abcdef")
    assert "no dataset in nowhere" in refusal("abcdef", "nowhere")
    assert "--print runs nothing: it takes no --json" in refusal("abcdef", "--print", "--json")
    assert "it takes no --out" in refusal("abcdef", "--print", "--out", "x")


def test_the_golden_dataset_has_no_manifest(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "golden" / "hparam"
    name = ids(folder)[0]
    line = refusal(name, folder, "--out", tmp_path / "out")
    assert f"{folder / 'manifest.json'}, which would tell its sweep" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": {}}', '{"runs": [1]}', "\x00"])
def test_a_manifest_that_is_none(tmp_path: Path, content: str) -> None:
    folder = dataset(tmp_path)
    (folder / "manifest.json").write_text(content)
    assert "manifest.json is no manifest of a dataset" in refusal(ids(folder)[0], folder)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert "cannot read" in refusal(ids(folder)[0], folder)


def test_a_record_or_a_run_without_what_is_needed(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    name = ids(folder)[0]
    for axes in (None, "[1]", "{"):
        changed(folder, axes=axes)
        assert f"trial {name} has no axes in its record" in refusal(name, folder)
    changed(folder, axes="{}")
    with_sweep(folder, lambda sweep: sweep.clear())
    assert "model.name is missing" in refusal(name, folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({"runs": [{"run_id": "r1", "environment": []}]}))
    assert find(name, [folder]).code is None
    assert "manifest.json: run r1 has no sweep" in refusal(name, folder)


SECRET = "engine: {kind: roofline, args: {api_key: abcdefghijklmnop, deep: [{token: x}]}}"


def test_a_secret_is_missed_by_its_key_and_print_shows_where_it_goes(tmp_path: Path) -> None:
    assert replay.HIDDEN == HIDDEN
    folder = dataset(tmp_path, SCALED.replace("engine: {kind: roofline}", SECRET))
    name = ids(folder)[0]
    line = refusal(name, folder, "--out", tmp_path / "out")
    assert "base.engine.args.api_key, base.engine.args.deep held a secret" in line
    assert "as *** only" in line and "abcdefghijklmnop" not in line
    assert not (tmp_path / "out").exists()
    printed = run(name, folder, "--print")
    assert printed.exit_code == 2 and printed.stderr == line
    path = tmp_path / "mine.yaml"
    text = printed.stdout.replace('api_key: "***"', "api_key: abcdefghijklmnop")
    path.write_text(text.replace('token: "***"', "token: x"))
    (point,) = expand(sweeps.load(path, (), "h100")).points
    assert point.trial_id == name


def test_a_secret_among_the_axes(tmp_path: Path) -> None:
    text = SCALED.replace("grid:\n", "grid:\n  engine.args.api_key: [abcdefgh1, abcdefgh2]\n")
    folder = dataset(tmp_path, text)
    assert "axes.engine.args.api_key held a secret" in refusal(ids(folder)[0], folder)


def test_three_stars_that_were_no_secret_are_no_obstacle(tmp_path: Path) -> None:
    folder = dataset(tmp_path, SCALED, "base.engine.args.mark='***'")
    assert run(ids(folder)[0], folder, "--print").exit_code == 0


def test_a_sweep_that_this_version_reads_otherwise(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    name = ids(folder)[0]
    with_sweep(folder, lambda sweep: sweep["base"]["workload"].update(seed=1))
    line = refusal(name, folder, "--out", tmp_path / "out")
    assert f"trial {name} of run r1 cannot be rebuilt: this version of the code makes" in line
    assert f"the one that ran it ({manifest_code()}) read it otherwise" in line
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_this_version_refuses(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    with_sweep(folder, lambda sweep: sweep["base"]["workload"].update(sede=1))
    line = refusal(ids(folder)[0], folder)
    assert "refuses what another" in line
    assert "base.workload.sede: unknown key; did you mean workload.seed?" in line
    assert str(tmp_path / "sweep.yaml") not in line


def test_a_profile_that_this_version_does_not_know(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    changed(folder, profile="h900")
    assert "unknown device class 'h900'" in refusal(ids(folder)[0], folder)


def test_a_replay_never_lands_in_the_dataset_it_comes_from(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    before = sorted(folder.rglob("*"))
    (tmp_path / "alias").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "alias", tmp_path / "alias" / ".." / tmp_path.name):
        assert "give another --out" in refusal(ids(folder)[0], folder, "--out", out)
    assert sorted(folder.rglob("*")) == before
    assert not list(tmp_path.glob("scaled-*.yaml"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (tmp_path / "file").write_text("")
    line = refusal(ids(folder)[0], folder, "--out", tmp_path / "file" / "out")
    assert "cannot write" in line and "Not a directory" in line


def test_the_orchestrators_refusal_is_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = dataset(tmp_path / "results")
    (name, *_) = ids(folder)
    with Dataset.open(tmp_path / "out", "scaled"):  # held by another driver
        result = run(name, folder, "--out", tmp_path / "out")
        answer = run(name, folder, "--out", tmp_path / "out", "--json")
    assert result.exit_code == answer.exit_code == 2
    assert result.stdout == "The replay made no record (exit status 2).\n"
    assert capfd.readouterr().err.count("error: ") == 2
    told = json.loads(answer.stdout)
    assert (told["trial_id"], told["status"], told["replay"]) == (name, 2, None)
    assert told["figures"] == told["differences"] == []
    assert (tmp_path / "out" / f"scaled-{name}.yaml").exists()


@pytest.mark.parametrize(
    "asked", ["base.measure.activation=sheet", "grid.measure.activation=[sheet]"]
)
def test_a_point_that_takes_activation_sheets_gets_those_beside_its_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    commands: list[list[str]] = []

    def wait(command: list[str], *, quiet: bool) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr("analysis.replay._waited_for", wait)
    plain = dataset(tmp_path / "a")
    folder = dataset(tmp_path / "b", SCALED, asked)
    for one in ("a", "b"):
        (tmp_path / one / FOLDER).mkdir()
    for one in (plain, folder):
        result = run(ids(one)[0], one, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
    assert "--sheets" not in commands[0]
    assert commands[1][commands[1].index("--sheets") + 1] == str(tmp_path / "b" / FOLDER)


CHILD = """\
import signal, sys, time
def end(number, frame):
    time.sleep(0.3)  # cleaning up
    print('cleaned up', flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
print('ready', flush=True)
time.sleep(30)
"""
PARENT = """\
import sys
from analysis.replay import _waited_for
sys.exit(_waited_for([sys.executable, '-c', sys.argv[1]], quiet=False))
"""


@pytest.mark.parametrize("whom", ["terminal", "process"])
def test_an_interruption_waits_for_the_orchestrator_to_clean_up(whom: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        time.sleep(0.1)
        if whom == "terminal":
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.terminate()
        out, err = parent.communicate(timeout=20)
    assert (parent.returncode, out, err) == (130, "cleaned up\n", "")


def test_a_command_that_a_signal_ended_counts_as_in_a_shell() -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    before = signal.getsignal(signal.SIGTERM)
    assert replay._waited_for([sys.executable, "-c", kill], quiet=True) == 137
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------------- side by side


def made(
    code: str | None = "a" * 40, *, dirty: bool = False, companions: int | None = 1, **columns: Any
) -> Made:
    """A record as a dataset holds it, with what a manifest tells of its run."""
    columns = {"model_digest": "0123456789abcdef"} | columns
    (row,) = rows(RECORDS, [record("abcdef0123456789", **columns)]).to_pylist()
    git = None if code is None else {"commit": code, "dirty": dirty}
    run = {"environment": {"driver": {"git": git}}}
    return Made(record=row, dataset=Path("d"), run=run, companions=companions)


def table(facts: dict[str, Any]) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as shown:
        console.print(replay_table(facts))
    return shown.get()


def test_figures_stand_beside_each_other_with_ratio_and_intervals() -> None:
    times = {"ttft_s": 0.01, "itl_s": 0.002, "e2e_s": 1.0, "e2e_s_ci_low": 0.9, "e2e_s_ci_high": 1}
    original = made(**times)
    again = made(
        throughput_tok_s=1500.0,
        finished_at=NOON.replace(hour=13),
        **times | {"ttft_s": 0.02, "e2e_s": 1.1, "e2e_s_ci_high": 1.2, "itl_s": None},
    )
    facts = replay_facts(original, again, status=0)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    by_name = {one["name"]: one for one in facts["figures"]}
    assert list(by_name) == ["ttft_s", "itl_s", "e2e_s", "throughput_tok_s"]
    assert by_name["ttft_s"] == {
        "name": "ttft_s",
        "original": 0.01,
        "original_ci": None,
        "replay": 0.02,
        "replay_ci": None,
        "ratio": 2.0,
        "overlap": None,
    }
    assert (by_name["itl_s"]["ratio"], by_name["itl_s"]["replay"]) == (None, None)
    assert (by_name["e2e_s"]["replay_ci"], by_name["e2e_s"]["overlap"]) == ([0.9, 1.2], True)
    assert by_name["throughput_tok_s"]["original_ci"] == [990.0, 1010.0]
    assert by_name["throughput_tok_s"]["overlap"] is False
    assert facts["differences"] == []
    assert facts["original"]["code"] == "a" * 12
    lines = table(facts).splitlines()
    assert "hparam, trial abcdef0123456789" in lines[0]
    assert any("2026-11-22 12:00 UTC" in one and "2026-11-22 13:00 UTC" in one for one in lines)
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert rows["TTFT, ms"][-3:] == ["10", "20", "2.000"]
    assert rows["ITL, ms"][-2:] == ["2", "–"]
    assert "".join(rows["E2E, s"]).endswith("1.1(0.9to1.2)1.100overlap")
    assert "".join(rows["tokens/s"]).endswith("1,000(990to1,010)1,500(1,485to1,515)1.500apart")
    assert list(sentences(facts)) == [
        "The replay's throughput is 1.500 of the record's; their intervals (94 % coverage) do not "
        "overlap.",
        "Of versions, device, host, code and engine arguments nothing that was noted differs.",
    ]


def test_what_was_not_the_same_is_told() -> None:
    original = made(companions=3, engine_args='{"a": 1, "b": [2], "c": null}')
    again = made(
        "b" * 40,
        dirty=True,
        engine_version="0.33.0",
        device="[red]H100\n",
        threads=None,
        engine_args='{"a": 1, "b": [3], "d": true}',
    )
    facts = replay_facts(original, again, status=0)
    told = {one["name"]: (one["original"], one["replay"]) for one in facts["differences"]}
    assert told == {
        "engine_version": ("0.32.0", "0.33.0"),
        "device": ("x86 CPU", "[red]H100\n"),
        "code": ("a" * 12, f"{'b' * 12} with changes"),
        "engine_args.b": ([2], [3]),
        "engine_args.d": (None, True),
        "trials on the engine": (3, 1),
    }
    shown = table(facts)
    assert "[red]H100 " in shown and "trials on the engine" in shown
    assert len(list(sentences(facts))) == 1


def test_changes_that_were_not_committed_are_no_known_code() -> None:
    facts = replay_facts(made(dirty=True), made(dirty=True), status=0)
    assert facts["differences"] == []
    assert list(sentences(facts))[-1].startswith("The code had changes that were not committed")
    nowhere = replay_facts(made(None), made(), status=0)
    assert nowhere["differences"] == [] and nowhere["original"]["code"] is None


def test_outcomes_that_are_not_ok() -> None:
    nothing = {"throughput_tok_s": None, "throughput_tok_s_ci_low": None, "ci_level": None}
    oom = made(outcome="oom", oom_stage="load", outcome_reason="no\x1b[2J memory")
    facts = replay_facts(oom, made(), status=0)
    assert list(sentences(facts))[:2] == [
        "The record ended oom (load), the replay ok.",
        "Reason in the record: no [2J memory",
    ]
    assert "oom (load)" in table(facts)
    both = replay_facts(oom, oom, status=0)
    assert list(sentences(both))[:2] == ["Both ended oom (load).", "Reason in both: no [2J memory"]
    assert "TTFT" not in table(both)
    empty = made()
    empty.record.update(nothing)
    assert next(sentences(replay_facts(empty, made(), status=0))) == (
        "One of the two has no throughput."
    )


def test_a_prediction_says_so_and_a_missing_interval_too() -> None:
    said = "The replay's throughput is 1.000 of the record's; "
    predicted = made(measured=False, throughput_tok_s_ci_low=None)
    assert next(sentences(replay_facts(predicted, predicted, status=0))) == (
        f"{said}both are predicted."
    )
    facts = replay_facts(made(), made(throughput_tok_s_ci_low=None), status=0)
    assert next(sentences(facts)) == f"{said}without an interval of each there is no more to say."
    touching = made(throughput_tok_s=1020.0, throughput_tok_s_ci_low=1010.0, ci_level=0.5)
    assert next(sentences(replay_facts(made(), touching, status=0))).endswith(
        "1.020 of the record's; their intervals (50 % and 94 % coverage) overlap."
    )


def test_check_speaks_of_the_one_file_only(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    found = find(ids(folder)[0], [folder])
    with pytest.raises(DatasetError, match="not valid YAML"):
        check(found, "a: [")


def test_a_device_that_kept_its_name_and_is_another_one_is_told() -> None:
    fast, slow = ({"amx_tile": amx, "cores": 2, "core_quota": None} for amx in (True, False))
    one = made(device_digest="a", device_facts=dumps(fast))
    other = made(device_digest="b", device_facts=dumps(slow | {"core_quota": 1.5}))
    facts = replay_facts(one, other, status=0)
    assert facts["differences"] == [
        {"name": "device: AMX", "original": "yes", "replay": "no"},
        {"name": "device: cores by quota", "original": "?", "replay": "1.5"},
    ]
    assert replay_facts(one, made(), status=0)["differences"] == []  # 0.1.0 tells nothing of it


def test_a_disturbed_side_is_named_before_the_figures_are_compared() -> None:
    noisy = made(disturbed=True, disturbed_reason="the hypervisor took 9% of its cores' time")
    facts = replay_facts(noisy, made(disturbed=False), status=0)
    first, second, *_ = sentences(facts)
    said = "disturbed by something else: the hypervisor took 9% of its cores' time"
    assert [f"The record was {said}"] == [one for one in (first, second) if "disturbed" in one]
    assert {"name": "disturbed", "original": True, "replay": False} in facts["differences"]
    quiet = replay_facts(made(disturbed=False), made(disturbed=False), status=0)
    assert not any("disturbed" in one for one in sentences(quiet))


def test_a_machine_that_was_slower_is_told_with_its_reference_loads() -> None:
    def loads(rate: float) -> dict[str, float]:
        return {
            "reference_bandwidth_gb_s_before": rate,
            "reference_bandwidth_gb_s_after": rate,
            "reference_bandwidth_spread": 0.05,
        }

    facts = replay_facts(made(**loads(20.0)), made(**loads(8.0)), status=0)
    assert facts["drift"] == [{"load": "memory was read, GB/s", "original": 20.0, "replay": 8.0}]
    assert (
        "The machine was not equally fast: around the replay memory was read at 0.40 of the rate "
        "around the record." in list(sentences(facts))
    )
    assert "memory was read, GB/s" in table(facts)
    assert replay_facts(made(**loads(20.0)), made(**loads(19.9)), status=0)["drift"] == []


def folder_model(folder: Path, **changes: Any) -> str:
    """A sweep of a folder's skeleton."""
    config = json.loads((ROOT / "workers/moe/catalog/mixtral-8x7b.json").read_text())["config"]
    small = {"hidden_size": 512, "intermediate_size": 128, "num_hidden_layers": 2}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | small | changes))
    model = f"{{name: {folder}, weights: dummy}}"
    return f"name: s\nbase:\n  model: {model}\n  engine: {{kind: roofline}}\n"


def test_a_model_that_changed_is_refused_with_its_structure_first(tmp_path: Path) -> None:
    kept = dataset(tmp_path, folder_model(tmp_path / "m"))
    (name,) = ids(kept)
    assert run(name, kept, "--print").exit_code == 0
    folder_model(tmp_path / "m", num_hidden_layers=8)
    line = refusal(name, kept, "--out", tmp_path / "out")
    differ = line.partition("stand for now: ")[2]
    assert differ.startswith("num_layers 8 instead of 2, params_total ")
    assert "model_digest" in differ and "--across-models" in differ
    assert not (tmp_path / "out").exists()
    assert run(name, kept, "--print", "--across-models").exit_code == 0
    folder_model(tmp_path / "m", rope_theta=1.0)  # one structure, and not one model
    differ = refusal(name, kept, "--out", tmp_path / "out").partition("stand for now: ")[2]
    assert differ.startswith("model_digest ")
    folder_model(tmp_path / "m")
    assert run(name, kept, "--print").exit_code == 0


def test_a_record_of_version_0_1_0_is_found_again_by_its_names(tmp_path: Path) -> None:
    kept = dataset(tmp_path, folder_model(tmp_path / "m"))
    path = tmp_path / "r1.yaml"
    (point,) = expand(sweeps.load(path, (), "h100")).points
    changed(kept, trial_id=point.trial.named_id, model_digest=None)
    assert run(point.trial.named_id, kept, "--print").exit_code == 0
    folder_model(tmp_path / "m", num_local_experts=4)
    differ = refusal(point.trial.named_id, kept, "--out", tmp_path / "out")
    assert "num_experts 4 instead of 8" in differ


def test_there_is_no_ratio_across_models_unless_asked() -> None:
    one, other = made(), made(num_layers=9, model_digest="f" * 16)
    facts = replay_facts(one, other, status=0)
    assert [x["name"] for x in facts["models"]] == ["num_layers", "model_digest"]
    assert (
        {x["ratio"] for x in facts["figures"]} == {x["overlap"] for x in facts["figures"]} == {None}
    )
    said = list(sentences(facts))
    assert said[:2] == [
        "These are two models: they differ in num_layers and model_digest.",
        "So there is no ratio of their figures; --across-models gives one.",
    ]
    shown = table(facts)
    assert shown.index("num_layers") < shown.index("outcome")
    asked = replay_facts(one, other, status=0, across_models=True)
    assert asked["figures"][-1]["ratio"] == 1 and "1.000" in list(sentences(asked))[1]


def test_what_a_record_does_not_say_is_no_difference_but_is_told() -> None:
    facts = replay_facts(made(model_digest=None), made(), status=0)
    assert facts["models"] == [] and facts["figures"][-1]["ratio"] == 1
    assert "cannot be vouched for" in next(sentences(facts))
