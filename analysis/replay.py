"""One record's point, found again and measured again, alone.

A record names its run, and the run's entry in `manifest.json` holds the sweep as profile and
command line had left it. With the record's `axes` that is one point. The axes stay axes, of
one value each, over that base: the loader that once made the point makes it again by its own
rules (whole blocks, keys inside them, dotted arguments), and the new record has the same
`axes`. No `profiles` block is in there any more, so none can be merged a second time.

That it is the same trial is never assumed. The orchestrator plans the file before anything
runs, and the identity that comes out must be the record's. Identities follow content, so a model
whose files were replaced is another trial: it is refused with what differs, structure first,
unless the user asks for a comparison across models. Orchestrator and analysis meet on disk alone,
so planning and running are processes of their own.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import polars as pl
import yaml

from analysis.conditions import only, refuse_repeated
from analysis.dataset import load, manifest, runs
from analysis.errors import DatasetError, SelectionError
from workers.moe.sheets import FOLDER

LEAST_DIGITS = 6
"""Of a trial's identity, that it can be called by."""
HIDDEN = "***"
"""What a manifest has in place of a secret (`workers.secrecy`)."""
CHANGED = " with changes"
"""Behind a commit, where tracked files differed from it."""

_ORCHESTRATOR = (sys.executable, "-m", "orchestrator")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
"""Text that is text without quotes, unless it is one of `_WORDS`."""
_WORDS = ("true", "false", "null")
_MOST_NAMED = 8
STRUCTURE = (
    *("num_layers", "hidden_size", "ffn_dim", "num_experts", "top_k", "shared_experts"),
    *("params_total", "params_active"),
)
"""Columns that say what a model is made of."""
CONTENT = ("model_digest", "draft_digest", "dataset_digest")
"""Columns that say which files were behind the names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A column in which a record and what would stand beside it are not the same."""

    name: str
    original: Any
    replay: Any

    def __str__(self) -> str:
        told = (json.dumps(value) for value in (self.replay, self.original))
        return f"{self.name} {' instead of '.join(told)}"


def apart(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """What makes the models, drafts and texts of two records other ones, structure first.

    A column that one of them leaves open is no difference: nobody knows.
    """
    return [
        Difference(name=name, original=record[name], replay=other[name])
        for name in (*STRUCTURE, *CONTENT)
        if None not in (record.get(name), other.get(name)) and record[name] != other[name]
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A record, and the run that made it."""

    record: dict[str, Any]
    """Its columns."""
    dataset: Path
    """The folder that holds it."""
    run: dict[str, Any]
    """The run's entry in the manifest."""
    companions: int | None
    """Trials that went to the same engine in that run, this one included; null where none did."""

    @property
    def trial_id(self) -> str:
        """Identity of the trial."""
        return str(self.record["trial_id"])

    @property
    def code(self) -> str | None:
        """Commit of the code that measured, 12 digits; null where that was no checkout."""
        try:
            git = self.run["environment"]["driver"]["git"]
            return f"{git['commit'][:12]}{CHANGED if git['dirty'] else ''}"
        except (LookupError, TypeError):
            return None


def find(prefix: str, datasets: Sequence[Path], choices: Sequence[str] = ()) -> Made:
    """The record of the one trial whose identity begins with `prefix`.

    Args:
        datasets: dataset folders.
        choices: `COLUMN=VALUE`, for a trial with records of several environments.

    Raises:
        SelectionError: no trial, several, or several records of it.
        DatasetError: a folder that cannot be read, or no manifest that knows the run.
    """
    if len(prefix) < LEAST_DIGITS:
        raise SelectionError(f"{prefix!r} is too short: give {LEAST_DIGITS} digits of a trial_id")
    where = ", ".join(map(str, datasets))
    frame = load(*datasets).filter(pl.col("trial_id").str.starts_with(prefix)).collect()
    found = frame.get_column("trial_id").unique(maintain_order=True).to_list()
    if not found:
        raise SelectionError(f"no trial_id begins with {prefix!r} in {where}")
    if len(found) > 1:
        named = ", ".join(found[:_MOST_NAMED]) + (", …" if len(found) > _MOST_NAMED else "")
        raise SelectionError(f"{len(found)} trial_ids begin with {prefix!r}: {named}")
    frame = only(frame.lazy(), choices).collect()
    refuse_repeated(frame, ["trial_id"])
    return _made(frame.row(0, named=True), datasets)


def rebuilt(made: Made) -> dict[str, Any]:
    """The sweep of exactly this record's point.

    Raises:
        DatasetError: the record or its run does not hold what is needed.
    """
    sweep, axes = made.run.get("sweep"), _axes(made.record["axes"])
    if axes is None:
        raise DatasetError(f"{made.dataset}: trial {made.trial_id} has no axes in its record")
    if not isinstance(sweep, dict):
        raise DatasetError(f"{manifest(made.dataset)}: run {_run_id(made)} has no sweep")
    grid = {key: [value] for key, value in axes.items()}
    parts = {"base": sweep.get("base"), "grid": grid}
    return {"name": made.record["sweep"]} | {key: part for key, part in parts.items() if part}


def written(made: Made, sweep: dict[str, Any]) -> str:
    """The text of a sweep file, with a line on where it comes from."""
    text = yaml.dump(
        sweep,
        Dumper=_Dumper,
        default_flow_style=None,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return f"# Trial {made.trial_id} of run {_run_id(made)}, written by analysis replay.\n{text}"


def check(made: Made, text: str, *, across_models: bool = False) -> str:
    """Plans `text` with the orchestrator's own loader.

    Args:
        across_models: take it too where the files behind its names are other ones by now.

    Returns:
        The identity of the planned trial: the record's, unless version 0.1.0 wrote the record,
        or models may differ.

    Raises:
        SelectionError: it is the trial of another model, draft or text; the message says how
            they differ.
        DatasetError: it is not the one trial that the record is of; the message says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [*_ORCHESTRATOR, str(path), "--profile", _profile(made), "--dry-run", "--json"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        said = (done.stderr.splitlines() or [""])[-1].removeprefix("error: ")
        why = said.replace(str(path), "its sweep")
    planned = _planned(done.stdout) if done.returncode == 0 else []
    found = [one["trial_id"] for one in planned]
    if found == [made.trial_id]:
        return made.trial_id
    if len(planned) == 1 and (by := _same_by_name(made, planned[0], across_models)):
        return by
    trial = f"trial {made.trial_id} of run {_run_id(made)} cannot be rebuilt"
    if secrets := list(_hidden(made)):
        raise DatasetError(
            f"{trial}: {', '.join(secrets)} held a secret, which manifest and record have as "
            f"{HIDDEN} only; put it into the sweep that --print writes, and run that"
        )
    by = f" ({made.code})" if made.code else ""
    if done.returncode != 0:
        raise DatasetError(f"{trial}: this version of the code refuses what another{by} ran: {why}")
    raise DatasetError(
        f"{trial}: this version of the code makes trial {', '.join(found)} of its sweep, so the "
        f"one that ran it{by} read it otherwise; use that one"
    )


def _same_by_name(made: Made, planned: Mapping[str, Any], across_models: bool) -> str | None:
    """The planned identity where it is what the record's names stand for now; null where
    something else keeps the two apart.

    Raises:
        SelectionError: as `check`.
    """
    now = dict(planned.get("structure") or {}) | planned["digests"]
    unvouched = made.record.get("model_digest") is None
    differ = apart(made.record, now)
    if unvouched and made.trial_id not in planned.get("named_ids", ()):
        differ += [
            Difference(name=name, original=None, replay=now[name])
            for name in CONTENT
            if made.record.get(name) is None and name in now
        ]
        if not differ:
            return None
    elif not unvouched and not any(one.name in CONTENT for one in differ):
        return None
    if differ and not across_models:
        raise SelectionError(
            f"trial {made.trial_id} of run {_run_id(made)} measured something else than its names "
            f"stand for now: {', '.join(map(str, differ))}. A ratio of the two says nothing of "
            "either; --across-models measures it all the same and shows both"
        )
    return str(planned["trial_id"])


def run(
    made: Made, text: str, out: Path, *, quiet: bool, across_models: bool = False
) -> tuple[int, Made | None]:
    """Checks the point, measures it and keeps its record below `out`.

    Args:
        text: the sweep file; it is kept as `out/SWEEP-TRIAL.yaml`.
        across_models: as `check`.
        quiet: leave standard output alone.

    Returns:
        The orchestrator's exit status, and the new record, null where none was made.

    Raises:
        SelectionError: the new record would land in the dataset that it repeats; or as `check`.
        DatasetError: as `check`; `out` cannot be written, or what is there cannot be read.
    """
    folder = out / str(made.record["sweep"])
    if folder.resolve() == made.dataset.resolve():
        raise SelectionError(
            f"{folder} is the dataset that this record comes from, and a replay must not touch "
            "it: give another --out"
        )
    trial_id = check(made, text, across_models=across_models)
    before = _records_of(trial_id, folder).get_column("run_id").to_list()
    path = out / f"{folder.name}-{made.trial_id}.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error.strerror or error}") from error
    asked = [str(path), "--out", str(out), "--profile", _profile(made), "--fresh"]
    sheets = made.dataset.parent / FOLDER
    if _looks_up(rebuilt(made)) and sheets.is_dir():  # it probes nothing, so it writes nothing
        asked += ["--sheets", str(sheets)]
    status = _waited_for([*_ORCHESTRATOR, *asked, *(["--json"] if quiet else [])], quiet=quiet)
    after = _records_of(trial_id, folder)
    new = after.filter(~pl.col("run_id").is_in(before)).sort("finished_at")
    return status, _made(new.row(-1, named=True), [folder]) if len(new) else None


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML carries no types
    """YAML that the sweep's reader takes for what it was: of the words that look like
    something else to one YAML or another, each stands in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _made(record: dict[str, Any], datasets: Sequence[Path]) -> Made:
    """`record` with its run, from the manifest that knows it."""
    run_id = record["run_id"]
    for folder in datasets:
        for entry in runs(folder):
            if entry.get("run_id") == run_id:
                return Made(
                    record=record,
                    dataset=folder,
                    run=entry,
                    companions=_companions(record, folder),
                )
    looked = ", ".join(str(manifest(folder)) for folder in datasets)
    raise DatasetError(f"run {run_id} is not in {looked}, which would tell its sweep")


def _companions(record: dict[str, Any], folder: Path) -> int | None:
    if record["group_id"] is None or record["outcome"] == "skipped":
        return None
    same = {name: record[name] for name in ("run_id", "group_id")}
    group = load(folder, every=True).filter(pl.col("outcome") != "skipped", **same)
    return int(group.select(pl.col("trial_id").n_unique()).collect().item())


def _records_of(trial_id: str, folder: Path) -> pl.DataFrame:
    return load(folder, every=True).filter(pl.col("trial_id") == trial_id).collect()


def _axes(text: object) -> dict[str, Any] | None:
    try:
        axes = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return axes if isinstance(axes, dict) else None


def _run_id(made: Made) -> str:
    return str(made.record["run_id"])


def _profile(made: Made) -> str:
    return str(made.record["profile"])


def _planned(answer: str) -> list[dict[str, Any]]:
    """The trials in the answer of `--dry-run --json`, each with what its group says of it."""
    plan = json.loads(answer)
    grouped = [
        group | {"trial_id": trial_id}
        for group in plan["groups"]
        for trial_id in group["trial_ids"]
    ]
    return [*plan["infeasible"], *grouped]


def _looks_up(point: Any) -> bool:
    """Whether a point takes its experts from activation sheets."""
    if not isinstance(point, dict):
        return False
    return any(
        (key.rpartition(".")[2] == "activation" and value in ("sheet", ["sheet"]))
        or _looks_up(value)
        for key, value in point.items()
    )


def _hidden(made: Made) -> Iterator[str]:
    """Keys of the point under which a secret was."""
    point = rebuilt(made)
    yield from _hidden_in(point.get("base"), "base")
    yield from _hidden_in(point.get("grid"), "axes")


def _hidden_in(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _hidden_in(inner, f"{key}.{name}")
    elif isinstance(value, list):
        if any(True for item in value for _ in _hidden_in(item, key)):
            yield key
    elif isinstance(value, str) and HIDDEN in value:
        yield key


def _waited_for(command: Sequence[str], *, quiet: bool) -> int:
    """Exit status of a command; of one that a signal ended, as shells count it.

    The command decides how a run is interrupted: it keeps what is finished and cleans up.
    Ctrl-C reaches it by itself, as it does everything in the terminal's foreground; SIGTERM
    is passed on. Until it has ended, this process stays.
    """
    sys.stdout.flush()
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None) as child,
        _staying(child),
    ):
        status = child.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def _staying(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def leave_alone(number: int, frame: FrameType | None) -> None: ...

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    # Handlers, not SIG_IGN: that would be inherited.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, leave_alone),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
