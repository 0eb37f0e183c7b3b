"""Hostile names and paths: what a sweep calls things must not reach past its folder, nor drive
a terminal.

A name ends up in a folder's name, in a table that rich draws, in lines for a log, in messages.
Each of these has its own way of being fooled: `..`, markup, escape sequences, lines that
pretend to be another's, text that runs from right to left.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.__main__ import _explained
from orchestrator.display.base import GroupView, LaneView, Snapshot, Why
from orchestrator.display.live import LiveDisplay
from orchestrator.display.plain import PlainDisplay
from orchestrator.errors import Place, SweepError
from orchestrator.request import Request, prepare
from orchestrator.store import Dataset, StoreError
from workers.contract.errors import TrialError
from workers.contract.model import MOST_LAYERS, Model
from workers.moe.architecture import UnknownModel, catalogue, configuration, resolve

HOSTILE = {
    "up": "../../../escaped",
    "absolute": "/escaped",
    "slash": "a/b",
    "backslash": "..\\..\\escaped",
    "nul": "a\0b",
    "newline": "a\nb",
    "carriage return": "all well\rok",
    "tab": "a\tb",
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "C1": "\x9b31mred",
    "bell": "\a",
    "backspace": "safe\b\b\b\bevil",
    "right to left": "\u202egnp.exe",
    "invisible": "a\u200bb\u2066c",
    "line separator": "a\u2028b",
    "markup": "[bold red]x[/bold red]",
    "broken markup": "[/]",
    "link": "[link=http://example.org]here[/link]",
    "emoji code": ":pile_of_poo:",
    "long": "x" * 10_000,
    "wide": "\uff21" * 5_000,
    "combining": "a" + "\u0301" * 5_000,
    "home of nobody": "~nobody-here/x",
    "dash": "--fresh",
    "dot": ".",
    "hidden": ".hidden",
    "blank": " ",
    "noncharacter": "\ufffe",
    "surrogate": "\udcff",
}
each = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


@contextmanager
def printed() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err


def plain(text: str) -> bool:
    """Nothing in it moves a cursor, changes a colour or a direction."""
    return text.replace("\n", "").isprintable()


def dry_run(folder: Path, sweep: Any, *overrides: str, **asked: Any) -> tuple[int, str, str]:
    path = folder / "s.yaml"
    path.write_text(json.dumps(sweep), encoding="utf-8")
    request = Request(sweep=path, overrides=overrides, out=folder / "out", profile="h100", **asked)
    with printed() as (out, err):
        status = _explained(request, dry_run=True)
    return status, out.getvalue(), err.getvalue()


@each
def test_no_name_of_a_sweep_leaves_its_folder(tmp_path: Path, text: str) -> None:
    """A name is refused, by the parser and by the dataset for itself."""
    status, out, err = dry_run(tmp_path, {"name": text, "base": {"model.name": "mixtral-8x7b"}})
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and plain(err) and "Traceback" not in err
    assert len(err) < 1_500
    if text not in ("--fresh", "x" * 10_000):  # names that a file system may have
        inner = tmp_path / "a" / "b"
        inner.mkdir(parents=True)
        with suppress(StoreError), Dataset.open(inner, text) as dataset:
            assert dataset.folder.parent == inner
        made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
        assert made <= {"a", "s.yaml"}


@pytest.mark.parametrize(
    "key",
    ["model.name", "model.quantization", "engine.args.x", "layout.device", "measure.accuracy"],
)
@each
def test_no_text_of_a_sweep_drives_the_terminal(tmp_path: Path, key: str, text: str) -> None:
    """As the base's value, and as an axis, where it becomes a label."""
    base: dict[str, Any] = {"model.name": "mixtral-8x7b", "model.weights": "dummy"}
    value: Any = [text] if key == "measure.accuracy" else text
    usual: Any = {"model.name": "olmoe-1b-7b", "layout.device": "h100"}.get(key, "fp8")
    axes = {key: [value, [usual] if key == "measure.accuracy" else usual]}
    for sweep in (
        {"name": "s", "base": {**base, key: value}},
        {"name": "s", "base": base, "grid": axes},
    ):
        for as_json in (False, True):
            status, out, err = dry_run(tmp_path, sweep, json=as_json)
            assert status in (0, 2)
            assert plain(out) and plain(err) and "Traceback" not in err
            assert bool(out) is (status == 0) and err.count("\n") == (status == 2)
            if as_json and status == 0:
                assert json.loads(out)["trials"] >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"s.yaml"}


@each
def test_no_key_override_or_constraint_drives_the_terminal(tmp_path: Path, text: str) -> None:
    good = {"name": "s", "base": {"model.name": "mixtral-8x7b"}}
    for sweep in ({**good, text: 1}, {**good, "base": {**good["base"], text: 1}},  # type: ignore[dict-item]
                  {**good, "where": [text]}, {**good, "where": [f"model.name == '{text}'"]},
                  {**good, "profiles": {text: {text: 1}}}):  # fmt: skip
        status, _, err = dry_run(tmp_path, sweep)
        assert (status, err.count("\n")) == (2, 1)
        assert plain(err) and len(err) < 1_500
    for override in (
        text,
        f"base.{text}=1",
        f"{text}=1",
        f"base.model.name={text}",
        f"name={text}",
    ):
        status, out, err = dry_run(tmp_path, good, override)
        assert status in (0, 2) and plain(out) and plain(err) and len(err) < 1_500


@each
def test_no_argument_drives_the_terminal(tmp_path: Path, text: str) -> None:
    with printed() as (out, err):
        status = _explained(Request(sweep=Path(text), profile="h100"), dry_run=True)
    assert (status, out.getvalue()) == (2, "")
    assert plain(err.getvalue()) and err.getvalue().count("\n") == 1
    status, out_text, err_text = dry_run(
        tmp_path, {"name": "s", "base": {"model.name": "mixtral-8x7b"}, "profiles": {text: {}}}
    )
    assert status in (0, 2) and plain(out_text) and plain(err_text)
    with printed() as (_, err):
        request = Request(sweep=tmp_path / "s.yaml", profile=text)
        assert _explained(request, dry_run=True) == 2
    assert plain(err.getvalue()) and err.getvalue().count("\n") == 1


def test_a_file_is_named_in_one_line_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[31mb.yaml"
    path.write_text("name: [")
    with pytest.raises(SweepError) as caught:
        prepare(Request(sweep=path), "h100")
    assert str(caught.value).isprintable()


def _snapshot(text: str) -> Snapshot:
    return Snapshot(
        sweep=text,
        profile=text,
        device=text,
        elapsed_s=1.0,
        eta_s=None,
        trials_total=3,
        resumed=0,
        counts={"oom": 1},
        lanes=(
            LaneView(
                node=text,
                devices=text,
                group_id="g",
                label=text,
                stage="run",
                since_s=1.0,
                trial=text,
                trials_done=1,
                trials_total=3,
            ),
        ),
        groups=(
            GroupView(
                group_id="g",
                label=text,
                devices=1,
                trials=3,
                done=1,
                outcomes={"oom": 1},
                throughput_tok_s=None,
                state="running",
            ),
        ),
        whys=(Why(label=text, outcome="oom", reason=text),),
        busy_share=None,
    )


@each
def test_plain_lines_stay_lines(text: str) -> None:
    file = io.StringIO()
    with PlainDisplay(Console(file=file, width=120)) as display:
        display.update(_snapshot(text))
        display.say(text)
    shown = file.getvalue()
    assert plain(shown)
    assert len(shown.splitlines()) == 5
    if text in ("[bold red]x[/bold red]", "[/]", ":pile_of_poo:"):
        assert text in shown, "shown as it is, not as markup"


@each
def test_the_live_table_draws_names_and_obeys_none(text: str) -> None:
    """Its own control sequences are those that it also draws with harmless names."""
    harmless, shown = _drawn("x" * 40), _drawn(text)
    assert _controls(shown) <= _controls(harmless)
    if text in ("[bold red]x[/bold red]", ":pile_of_poo:"):
        assert text in shown


def _drawn(text: str) -> str:
    file = io.StringIO()
    console = Console(file=file, width=150, height=30, force_terminal=True, color_system=None)
    with LiveDisplay(console) as display:
        display.update(_snapshot(text))
        display.say(text)
    return file.getvalue()


def _controls(text: str) -> set[str]:
    """Control sequences, and whatever else cannot be printed."""
    sequences = set(re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[^\[]", text))
    rest = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[^\[]", "", text)
    sequences = {re.sub(r"\d+", "N", one) for one in sequences}
    return sequences | {character for character in rest if not character.isprintable()}


# What the fuzzers found, each as it was found.


@pytest.mark.parametrize("name", ["~nobody-here/x", "~nobody-here", "x" * 5_000, "a/" + "b" * 300])
def test_a_name_that_can_be_no_folder_is_no_traceback(name: str) -> None:
    if name.count("/") == 1 and not name.startswith("~"):
        assert configuration(name) is None, "a hub id"
    else:
        with pytest.raises(UnknownModel, match="unknown model"):
            configuration(name)


def test_a_configuration_without_end_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UnknownModel, match="cannot be read"):
        configuration(str(tmp_path))


@pytest.mark.parametrize("layers", [MOST_LAYERS + 1, 99_999_999_999])
def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path: Path, layers: int) -> None:
    base = {"model": {"name": "olmoe-1b-7b", "weights": "dummy", "num_layers": layers}}
    status, _, err = dry_run(tmp_path, {"name": "s", "base": base})
    assert status == 2 and "model.num_layers: is" in err and "at most 10000" in err


def test_a_configuration_with_more_layers_than_any_model_is_not_read(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    config = {**catalogue()["olmoe-1b-7b"]["config"], "num_hidden_layers": 10**12}
    (folder / "config.json").write_text(json.dumps(config))
    status, out, _ = dry_run(tmp_path, {"name": "s", "base": {"model.name": str(folder)}})
    assert status == 0 and "at most 10000" in " ".join(out.split())


@pytest.mark.parametrize(
    ("model", "part", "key", "value"),
    [
        ("deepseek-v2-lite", None, "n_group", 10**18),
        ("switch-c", None, "num_decoder_layers", 10**18),
        ("deepseek-vl2", "vision_config", "mlp_ratio", float("nan")),
        ("deepseek-vl2", "vision_config", "mlp_ratio", float("inf")),
        ("deepseek-vl2", "vision_config", "mlp_ratio", 1e308),
    ],
)
def test_a_hostile_configuration_takes_no_time_and_no_traceback(
    tmp_path: Path, model: str, part: str | None, key: str, value: float
) -> None:
    config = json.loads(json.dumps(catalogue()[model]["config"]))
    (config[part] if part else config)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with suppress(UnknownModel, TrialError):
        resolve(Model(name=str(tmp_path), weights="dummy", num_experts=16))
    assert time.process_time() - start < 1


def test_a_message_is_one_short_line_whatever_it_quotes() -> None:
    error = Place(Path("x\x1b[31m" * 500), 1, "k\n" * 5_000).error("m\r" * 5_000)
    assert str(error).isprintable() and len(str(error)) < 10_000


@pytest.mark.parametrize(
    "override",
    [
        'grid.engine.args.x\udcff=["a", "b"]',
        'grid.engine.args.x=["\udcff", "b"]',
        r'grid.engine.args.x=["\ud800", "b"]',
    ],
    ids=["bytes in a key", "bytes in a value", "half a character"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_no_text_is_refused(tmp_path: Path, override: str, as_json: bool) -> None:
    """Found by the guided fuzzer: a table that no terminal could be given."""
    good = {"name": "s", "base": {"model.name": "mixtral-8x7b"}}
    status, out, err = dry_run(tmp_path, good, override, json=as_json)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.encode().decode() == err and plain(err)
