"""Whatever a sweep file, an override or a constraint holds, the answer is a sweep or a SweepError.

Anything else raised here would reach a user as a traceback. The examples are drawn from the
grammar's own words, so that they get past the first check.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import fields
from orchestrator.errors import Place, SweepError
from orchestrator.grid import expand
from orchestrator.sweep import load
from orchestrator.where import NoAnswer, compile_constraint
from tests.faults.fuzz_sweep import SPLIT, Failure, Target, inputs, seeds, watch

PATIENCE_S = 1.0
"""CPU time that one document may take."""

FEW = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = """
dummy inter vllm ngram ${name} ${base.model.name} ${oc.env:HOME} ??? \\??? 1e5 é
""".split()
WORDS += ["model.top_k <= 4", "layout.devices == 1", "model.num_experts > 2", "\x00", "\u2028"]
text = st.text(st.characters(codec="utf-8"), max_size=6)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    text,
)
wrong_keys = st.one_of(st.sampled_from(["model.topk", "", ".", "a b", "top_k"]), text)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(wrong_keys, inner, max_size=3)
    ),
    max_leaves=5,
)
USUAL: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(1, 4),
    "float": st.sampled_from([0.25, 0.5, 1]),
    "str": st.sampled_from(["m", "ngram", "${name}"]),
    "bool": st.booleans(),
    "texts": st.lists(st.sampled_from(["a", "b"]), max_size=2),
    "block": st.sampled_from([None, {}, {"model": "ngram"}, {"ratio": 0.25}]),
    "free": st.dictionaries(st.sampled_from(["x", "y"]), anything, max_size=2),
}
NAMES = [key for key, field in fields.catalogue().items() if field.sweepable]
NAMES += ["engine.args.x", "engine.args.x.y", "engine.args.y"]


def usual(key: str) -> st.SearchStrategy[Any]:
    """Values that the field would take."""
    field = fields.catalogue().get(key)
    if field is None:
        return anything
    values = st.sampled_from(field.choices) if field.choices else USUAL[field.kind]
    return st.one_of(st.none(), values) if field.optional else values


@st.composite
def blocks(draw: st.DrawFn, axes: bool = False) -> dict[str, Any]:
    """Mostly right keys with mostly right values, or lists of them."""
    block = {}
    for key in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        values = usual(key)
        block[key] = draw(st.lists(values, min_size=1, max_size=3) if axes else values)
    if draw(st.integers(0, 7)) == 0:
        block[draw(st.one_of(wrong_keys, st.sampled_from(NAMES)))] = draw(anything)
    return block


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    parts: dict[str, st.SearchStrategy[Any]] = {
        "base": blocks(),
        "grid": blocks(axes=True),
        "zip": blocks(axes=True),
        "cases": st.lists(blocks(), min_size=1, max_size=3),
        "where": st.lists(st.sampled_from(WORDS[-5:-2]), max_size=2),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(parts)), max_size=4, unique=True))
    found = {name: draw(parts[name]) for name in chosen}
    if draw(st.integers(0, 9)) == 0:
        found[draw(st.sampled_from(sorted(parts)))] = draw(anything)
    return found


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    first, profile = draw(sections()), draw(sections())
    if isinstance(first.setdefault("base", {}), dict):
        first["base"].setdefault("model.name", "m")
        first["base"].setdefault("model.weights", "dummy")
    return {"name": draw(st.sampled_from(["a", "a", "a", "../a", 3])), **first} | {
        "profiles": {draw(st.sampled_from(["cpu", "h100"])): profile}
    }


@contextmanager
def only_refusals() -> Iterator[None]:
    """Passes a SweepError of one printable line, and nothing that takes long."""
    start, message = time.process_time(), "none"
    try:
        yield
    except SweepError as error:
        message = str(error)
    assert message.isprintable()
    assert "full_key" not in message
    assert time.process_time() - start < PATIENCE_S


def attempt(path: Path, data: bytes, *overrides: str) -> None:
    path.write_bytes(data)
    with only_refusals():
        expand(load(path, overrides), lambda model: {"num_experts": 8})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.yaml"


@pytest.mark.lengthy
@FEW
@given(document=documents())
def test_documents_of_the_right_words(path: Path, document: dict[str, Any]) -> None:
    attempt(path, json.dumps(document, ensure_ascii=False).encode())


@FEW
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_bytes(path: Path, data: bytes) -> None:
    attempt(path, data)


LINES = r"""
name: a
base: &b
  model.name: m
  model: {name: m, top_k: &k 2}
grid:
  model.top_k: [1, *k]
  layout:
    tensor: [1, 2]
  <<: *b
zip: *b
where:
- model.top_k < 3
- *k
cases:
- {}
-
  - [
}
? a
profiles: {cpu: *b}
--- !!x
...
%YAML 1.1
  engine.args: {<<: {}}
""".splitlines()


@FEW
@given(
    lines=st.lists(
        st.sampled_from(LINES),
        max_size=12,
    )
)
def test_lines_in_any_order(path: Path, lines: list[str]) -> None:
    attempt(path, "\n".join(lines).encode())


@FEW
@given(
    key=st.one_of(
        st.sampled_from(["base", "grid", "zip", "name", "where[0]", "cases[0]", "cases.0.model"]),
        st.builds(
            "{}.{}".format,
            st.sampled_from(["base", "grid", "cases[0]", "q"]),
            st.one_of(st.sampled_from(NAMES), wrong_keys),
        ),
        st.text(max_size=8),
    ),
    value=st.one_of(anything.map(json.dumps), st.text(max_size=12)),
)
def test_overrides(path: Path, key: str, value: str) -> None:
    text = "name: a\nbase: {model.name: m}\ncases: [{}]\nwhere: [1 < 2]\n"
    attempt(path, text.encode(), f"{key}={value}")


TOKENS = """
model.top_k model.num_layers model.name model engine.args.x layout.devices x.__class__ 1 2.5
"a" ' null true None [ ] ( ) , + - * ** / // % < <= == != in not and or is if else lambda: :=
f'{1}' min max(1, abs( { } : . await yield for \\ # @ ~ import ª
""".split()
tokens = st.sampled_from([*TOKENS, "9" * 30, "\n", "\ufeff"])


@FEW
@given(
    text=st.one_of(
        st.lists(tokens, max_size=12).map(" ".join),
        st.text(max_size=40),
        st.builds(str.__mul__, tokens, st.integers(1, 1_200)),
    )
)
def test_constraints(text: str) -> None:
    known = {"model.top_k": 2, "model.name": "m", "layout.devices": 1}
    with only_refusals():
        constraint = compile_constraint(text, Place(Path("s.yaml"), 1, "where[0]"))
        with suppress(NoAnswer):
            assert constraint.holds(known.get) in (True, False)


# The command line's own door, as `tests/faults/fuzz_sweep.py` opens it a hundred thousand times.


@pytest.mark.lengthy
def test_changed_sweeps_end_in_a_plan_or_in_one_line(tmp_path: Path) -> None:
    watch()
    target = Target(tmp_path)
    for data in itertools.islice(inputs(7), 300):
        target.run(data)
    assert target.statuses[0] >= 15 and target.statuses[2] >= 150
    assert set(target.statuses) == {0, 2}
    assert len(target.messages) > 50


@pytest.mark.lengthy
def test_the_fuzzer_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a file outside the folder, a message of two lines, an input that is slow."""
    from orchestrator import request

    watch()
    (tmp_path / "in").mkdir()
    target = Target(tmp_path / "in")
    outside = tmp_path / "outside"
    broken = {
        "traceback": lambda *_: {}["no such key"],
        "outside the folder": lambda *_: outside.write_text("x"),
        "slow": lambda *_: _burn(1.2),
    }
    for kind, does in broken.items():

        def prepare(*asked: Any, does: Any = does) -> Any:
            does()
            raise SweepError("refused")

        monkeypatch.setattr(request, "prepare", prepare)
        with pytest.raises(Failure, match=kind):
            target.run(b"name: a")
    assert outside.exists(), "watched, not prevented"


def _burn(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass


def test_inputs_are_many_and_the_same_each_time() -> None:
    first = list(itertools.islice(inputs(3), 200))
    assert first == list(itertools.islice(inputs(3), 200))
    assert len(set(first)) > 190
    assert any(SPLIT in one for one in first) and set(seeds()) <= set(first)
