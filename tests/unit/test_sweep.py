"""The sweep grammar: what is read, how it merges, and what every mistake is answered with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import fields, yamltext
from orchestrator.errors import SweepError
from orchestrator.grid import expand
from orchestrator.sweep import Sweep, load
from workers.contract.model import Prune

README = Path(__file__).resolve().parents[2] / "sweeps" / "README.md"
HEAD = "name: study\nbase:\n  model: {name: olmoe, weights: dummy}\n"
"""Three lines: what a test adds begins on line 4."""

Load = Callable[..., Sweep]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as the file `s.yaml`."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes, *overrides: str, profile: str = "cpu") -> Sweep:
        path = Path("s.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load(path, overrides, profile)

    return read


def refusal(read: Load, text: str | bytes, *overrides: str, **more: Any) -> str:
    with pytest.raises(SweepError) as caught:
        read(text, *overrides, **more)
    message = str(caught.value)
    assert message.isprintable()
    assert not re.search(r"Traceback|full_key|omegaconf|object_type", message, re.IGNORECASE)
    return message


INTERFACE = """\
name: hparam
base:
  model: {name: mixtral-8x7b, weights: dummy}
  layout: {tensor: 4}
  workload: {batch_size: 16, input_tokens: 2048, output_tokens: 2048}
  engine: {kind: vllm}
  measure: {warmup: 1, repeats: 5, ci_width: 0.02}
grid:
  model.ffn_dim: [1792, 3584, 7168, 14336]
  model.num_experts: [8, 16, 32, 64]
  model.top_k: [1, 2, 4, 8]
where: [model.top_k <= model.num_experts]
profiles:
  cpu:
    base: {model.scale: 0.125, workload: {input_tokens: 64, output_tokens: 32}, layout.tensor: 1}
  h100: {}
"""


# What is read


def test_the_sweep_of_the_interface(read: Load) -> None:
    sweep = read(INTERFACE, profile="h100")
    assert sweep.name == "hparam" and sweep.profile == "h100" and sweep.path == Path("s.yaml")
    assert sweep.base.layout.devices == 4
    assert sweep.base.workload.tokens_per_request == 4096
    assert sweep.base.measure.ci_width == 0.02
    assert [(axis.key, axis.values) for axis in sweep.grid] == [
        ("model.ffn_dim", (1792, 3584, 7168, 14336)),
        ("model.num_experts", (8, 16, 32, 64)),
        ("model.top_k", (1, 2, 4, 8)),
    ]
    assert [constraint.text for constraint in sweep.where] == ["model.top_k <= model.num_experts"]
    assert sweep.zip == () and sweep.cases is None


def test_the_chosen_profile_is_merged_over_the_file(read: Load) -> None:
    base = read(INTERFACE).base
    assert base.model.scale == 0.125 and base.model.name == "mixtral-8x7b"
    assert base.layout.tensor == 1
    assert (base.workload.batch_size, base.workload.input_tokens) == (16, 64)


def test_a_profile_that_the_file_does_not_have_changes_nothing(read: Load) -> None:
    assert read(INTERFACE, profile="b200").base == read(INTERFACE, profile="h100").base


def test_nested_and_dotted_keys_are_the_same(read: Load) -> None:
    dotted = "name: a\nbase: {model.name: m, layout.tensor: 2}\ngrid: {model.top_k: [1, 2]}\n"
    nested = (
        "name: a\nbase:\n  model: {name: m}\n  layout: {tensor: 2}\n"
        "grid:\n  model:\n    top_k: [1, 2]\n"
    )
    assert read(dotted).resolved == read(nested).resolved
    assert read(dotted) == read(nested)


def test_values_become_what_their_fields_hold(read: Load) -> None:
    sweep = read(
        HEAD
        + "  measure: {timeout_s: 60, accuracy: [gsm8k]}\n"
        + "  engine: {args: {max_num_seqs: 4, compilation_config: {level: [0, x]}}}\n"
        + "grid:\n"
        + "  model.scale: [1, 0.5]\n"
        + "  model.prune: [null, {kind: intra, ratio: 0.25}]\n"
        + "  measure.accuracy: [[], [mmlu, gsm8k]]\n"
        + "  engine.args.enforce: [true, 2, auto, null]\n"
    )
    assert sweep.base.measure.timeout_s == 60.0 and isinstance(sweep.base.measure.timeout_s, float)
    assert sweep.base.measure.accuracy == ("gsm8k",)
    assert sweep.base.engine.args == {
        "max_num_seqs": 4,
        "compilation_config": {"level": [0, "x"]},
    }
    scale, prune, accuracy, enforce = (axis.values for axis in sweep.grid)
    assert scale == (1.0, 0.5) and all(isinstance(value, float) for value in scale)
    assert prune == (None, Prune(kind="intra", ratio=0.25))
    assert accuracy == ((), ("mmlu", "gsm8k"))
    assert enforce == (True, 2, "auto", None)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'2'", "2"),
        ('"null"', "null"),
        ("3e", "3e"),
        ("|-\n    a", "a"),
    ],
)
def test_plain_words_stay_words(read: Load, written: str, value: str) -> None:
    assert read(f"name: a\nbase:\n  model.name: {written}\n").base.model.name == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 0.001),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-0", 0),
        ("~", None),
        ("", None),
        ("Null", None),
        ("TRUE", True),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_plain_scalars(read: Load, written: str, value: object) -> None:
    found = read(HEAD + f"  engine: {{args: {{x: {written}}}}}\n").base.engine.args["x"]
    assert found == value and type(found) is type(value)


def test_anchors_and_merge_keys(read: Load) -> None:
    sweep = read(
        HEAD
        + "zip:\n  workload.input_tokens: &lengths [1, 2]\n  workload.output_tokens: *lengths\n"
        + "profiles:\n"
        + "  h100: &h100\n    base: {layout.tensor: 4, model.scale: 0.5}\n"
        + "  h200:\n    <<: *h100\n    where: [layout.tensor == 4]\n",
        profile="h200",
    )
    assert [axis.values for axis in sweep.zip] == [(1, 2), (1, 2)]
    assert sweep.base.layout.tensor == 4 and len(sweep.where) == 1


def test_references_to_plain_keys(read: Load) -> None:
    sweep = read(
        "name: study\n"
        "base:\n"
        "  model: {name: m, revision: 'of-${name}', num_experts: 8}\n"
        "  workload: {batch_size: '${base.model.num_experts}'}\n"
        "grid:\n  model.top_k: [1, '${base.model.num_experts}']\n"
        "where: ['model.top_k <= ${base.model.num_experts}']\n",
        "base.model.num_experts=4",
    )
    assert sweep.base.model.revision == "of-study"
    assert sweep.base.workload.batch_size == 4
    assert sweep.grid[0].values == (1, 4)
    assert sweep.where[0].text == "model.top_k <= 4"
    assert sweep.resolved["grid"] == {"model.top_k": [1, 4]}


def test_resolved_is_a_sweep_itself(read: Load) -> None:
    text = (
        INTERFACE
        + "zip:\n  workload.seed: [0, 1]\n  engine.speculative: [null, {model: ngram, tokens: 2}]\n"
        + "cases:\n  - {model: {prune: {ratio: 0.5}}, engine.args.x: [1, '2']}\n  - {}\n"
    )
    first = read(text, "grid.model.top_k=[1,2]")
    second = read(json.dumps(first.resolved), profile="none")
    assert second.resolved == first.resolved
    assert expand(second).points == expand(first).points


def test_base_is_completed_by_what_every_point_sets(read: Load) -> None:
    assert read("name: a\ngrid: {model.name: [m, n]}\n").base.model.name == "m"
    by_case = "name: a\ncases:\n- {model.name: m}\n- {model.name: n, model.top_k: 1}\n"
    assert read(by_case).base.model.name == "m"
    assert read(by_case).base.model.top_k is None


def test_place_finds_where_a_value_came_from(read: Load) -> None:
    sweep = read(HEAD + "grid:\n  layout.tensor:\n    - 1\n    - 2\n", "base.model.name=m")
    assert sweep.place("layout.tensor", 2).line == 7
    assert str(sweep.place("model.name", "m").error("x")) == "command line: base.model.name=m: x"
    assert sweep.place("workload.seed", 0).line is None


# Overrides


@pytest.mark.parametrize("grid", ["  model.top_k: [1, 2]\n", "  model:\n    top_k: [1, 2]\n"])
def test_an_override_replaces_an_axis_however_it_was_written(read: Load, grid: str) -> None:
    text = HEAD + "grid:\n" + grid + "  layout.tensor: [1, 2]\n"
    sweep = read(text, "grid.model.top_k=[4,8,2]")
    assert [(axis.key, axis.values) for axis in sweep.grid] == [
        ("model.top_k", (4, 8, 2)),
        ("layout.tensor", (1, 2)),
    ]
    assert [axis.key for axis in read(text, "grid.model.top_k=null").grid] == ["layout.tensor"]
    assert read(text, "grid.model={top_k: [1]}").grid[0].values == (1,)
    assert read(text, "grid=null").grid == ()


def test_overrides_win_over_profiles_and_later_over_earlier(read: Load) -> None:
    sweep = read(INTERFACE, "base.layout.tensor=2", "base.layout={tensor: 8}", "name=other")
    assert sweep.base.layout.tensor == 8 and sweep.name == "other"


def test_overrides_take_values_as_the_file_does(read: Load) -> None:
    sweep = read(
        HEAD,
        "base.model.revision=a=b",
        "base.workload.dataset=",
        "base.engine.args.x={y: [1, null]}",
        "base.model.name='7'",
        "base.model.prune={}",
        "where=['layout.devices < 9']",
    )
    assert sweep.base.model.revision == "a=b" and sweep.base.workload.dataset is None
    assert sweep.base.engine.args == {"x": {"y": [1, None]}}
    assert sweep.base.model.name == "7" and sweep.base.model.prune == Prune()
    assert sweep.where[0].text == "layout.devices < 9"


def test_an_override_reaches_one_item_of_a_list(read: Load) -> None:
    text = HEAD + "cases: [{model.top_k: 1}, {model: {top_k: 2}}]\nwhere: [1 < 2, layout.expert]\n"
    sweep = read(text, "cases[1].model.top_k=4", "cases.0={layout.tensor: 2}", "where[1]=2 < 3")
    assert sweep.resolved["cases"] == [
        {"model.top_k": 1, "layout.tensor": 2},
        {"model.top_k": 4},
    ]
    assert [constraint.text for constraint in sweep.where] == ["1 < 2", "2 < 3"]


def test_a_block_and_its_keys_give_way_to_each_other(read: Load) -> None:
    text = HEAD.replace("dummy", "dummy, prune: {kind: intra, ratio: 0.25}")
    assert read(text, "base.model.prune=null").base.model.prune is None
    assert read(text, "base.model.prune.ratio=0.5").base.model.prune == Prune(
        kind="intra", ratio=0.5
    )
    assert read(text, "base.model.prune={}").base.model.prune == Prune()
    again = read(text, "base.model.prune=null", "base.model.prune.ratio=0.75").base.model.prune
    assert again == Prune(ratio=0.75)


def test_a_profile_may_replace_or_remove_every_part(read: Load) -> None:
    sweep = read(
        HEAD
        + "grid: {model.top_k: [1, 2], layout.tensor: [1]}\n"
        + "zip: {workload.seed: [1, 2]}\n"
        + "cases: [{layout.pipeline: 2}]\n"
        + "where: [model.top_k > 1]\n"
        + "profiles:\n"
        + "  cpu:\n"
        + "    grid: {model: {top_k: null}, workload.batch_size: [4]}\n"
        + "    zip: null\n"
        + "    cases: [{layout.data: 2}]\n"
        + "    where: []\n"
    )
    assert [axis.key for axis in sweep.grid] == ["layout.tensor", "workload.batch_size"]
    assert sweep.zip == () and sweep.where == ()
    assert sweep.cases is not None
    assert [cell.key for cell in sweep.cases[0]] == ["layout.data"]


# Mistakes in the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys
        (
            "grid:\n  model.topk: [1]\n",
            "5: grid.model.topk: unknown key; did you mean model.top_k?",
        ),
        (
            "grid:\n  model:\n    topk: [1]\n",
            "6: grid.model.topk: unknown key; did you mean model.top_k?",
        ),
        ("zip:\n  top_k: [1]\n", "5: zip.top_k: unknown key; did you mean model.top_k?"),
        (
            "cases:\n- workload: {batch: 1}\n",
            "5: cases[0].workload.batch: unknown key; did you mean workload.batch_size?",
        ),
        (
            "  layout: {zzzzzz: 1}\n",
            "4: base.layout.zzzzzz: unknown key; layout has tensor, pipeline, data, expert, device",
        ),
        (
            "  model.top_k.x: 1\n",
            "4: base.model.top_k.x: unknown key; model.top_k has no keys of its own, "
            "it takes a whole number or null",
        ),
        ("  model..top_k: 1\n", "4: base.model..top_k: unknown key; did you mean model.top_k?"),
        ("grdi:\n", "4: grdi: unknown key; did you mean grid?"),
        ("measure: {repeats: 2}\n", "4: measure: unknown key; did you mean base.measure?"),
        (
            "qqqq: 1\n",
            "4: qqqq: unknown key; expected one of name, base, grid, zip, cases, where, profiles",
        ),
        (
            "profiles:\n  h100:\n    bsae: {}\n",
            "6: profiles.h100.bsae: unknown key; did you mean base?",
        ),
        (
            "profiles:\n  h100:\n    base:\n      model.nam: x\n",
            "7: profiles.h100.base.model.nam: unknown key; did you mean model.name?",
        ),
        (
            "profiles:\n  h100:\n    name: x\n",
            "6: profiles.h100.name: unknown key; expected one of base, grid, zip, cases, where",
        ),
        # shapes
        (
            "grid:\n  model.top_k: 3\n",
            "5: grid.model.top_k: expected a list, but found the number 3",
        ),
        (
            "grid:\n  model.top_k: []\n",
            "5: grid.model.top_k: the list is empty; fill it, or leave the key out",
        ),
        ("grid:\n  model.top_k:\n", "5: grid.model.top_k: expected a list, but found null"),
        ("grid: [1]\n", "4: grid: expected a block of keys, but found a list"),
        ("cases: {}\n", "4: cases: expected a list, but found a block"),
        ("cases: []\n", "4: cases: the list is empty; fill it, or leave the key out"),
        ("cases:\n-\n", "5: cases[0]: expected a block of keys, but found null"),
        ("where: true\n", "4: where: expected a list, but found true"),
        ("where: [1 < 2, 3]\n", "4: where[1]: expected an expression, but found the number 3"),
        ("profiles: [cpu]\n", "4: profiles: expected a block of keys, but found a list"),
        (
            "profiles: {cpu: 3}\n",
            "4: profiles.cpu: expected a block of keys, but found the number 3",
        ),
        ("  layout: 4\n", "4: base.layout: expected a block of keys, but found the number 4"),
        (
            "grid:\n  layout: [{tensor: 2}]\n",
            "5: grid.layout: expected a block of keys, but found a list; "
            "vary its fields, or use cases",
        ),
        (
            "zip:\n  workload.seed: [1, 2]\n  workload.batch_size: [1]\n",
            "6: zip.workload.batch_size: this list has length 1 and workload.seed has length 2, "
            "but the lists of zip advance together",
        ),
        # kinds
        (
            "grid:\n  model.top_k: [1, '2']\n",
            "5: grid.model.top_k[1]: expected a whole number or null, but found the text '2'; "
            "write it without quotes",
        ),
        (
            "grid:\n  model.top_k:\n  - 1\n  - 010\n",
            "7: grid.model.top_k[1]: expected a whole number or null, but found the text '010'",
        ),
        (
            "grid:\n  layout.tensor: [1, null]\n",
            "5: grid.layout.tensor[1]: expected a whole number, but found null",
        ),
        (
            "grid:\n  layout.tensor: [true]\n",
            "5: grid.layout.tensor[0]: expected a whole number, but found true",
        ),
        (
            "grid:\n  layout.tensor: [2.0]\n",
            "5: grid.layout.tensor[0]: expected a whole number, but found the number 2.0",
        ),
        (
            "grid:\n  layout.tensor: [[1]]\n",
            "5: grid.layout.tensor[0]: expected a whole number, but found a list",
        ),
        (
            "  layout.expert: 1\n",
            "4: base.layout.expert: expected true or false, but found the number 1",
        ),
        (
            "  layout.expert: no\n",
            "4: base.layout.expert: expected true or false, but found the text 'no'",
        ),
        (
            "  layout.expert: 'true'\n",
            "4: base.layout.expert: expected true or false, but found the text 'true'; "
            "write it without quotes",
        ),
        (
            "  measure.activation: shet\n",
            "4: base.measure.activation: expected true, false or sheet, but found the text 'shet'; "
            "did you mean sheet?",
        ),
        (
            "  measure.activation: 'true'\n",
            "4: base.measure.activation: expected true, false or sheet, but found the text 'true'; "
            "write it without quotes",
        ),
        (
            "  measure.activation: 1\n",
            "4: base.measure.activation: expected true, false or sheet, but found the number 1",
        ),
        (
            "  measure.activation: null\n",
            "4: base.measure.activation: expected true, false or sheet, but found null",
        ),
        (
            "  model.revision: 1e10\n",
            "4: base.model.revision: expected text or null, but found the number 10000000000.0; "
            "put it in quotes if it is a name",
        ),
        (
            "  engine.kind: vlm\n",
            "4: base.engine.kind: expected one of vllm, transformers, endpoint, roofline, "
            "but found the text 'vlm'; did you mean vllm?",
        ),
        (
            "  engine.args: null\n",
            "4: base.engine.args: expected a block of keys, but found null",
        ),
        (
            "  measure.accuracy: mmlu\n",
            "4: base.measure.accuracy: expected a list of texts, but found the text 'mmlu'",
        ),
        (
            "  measure:\n    accuracy:\n    - mmlu\n    - 3\n",
            "7: base.measure.accuracy[1]: expected text, but found the number 3",
        ),
        (
            "grid:\n  model.prune: [half]\n",
            "5: grid.model.prune[0]: expected a block of keys or null, but found the text 'half'",
        ),
        (
            "grid:\n  model.prune: [{kind: inner}]\n",
            "5: grid.model.prune[0].kind: expected one of inter, intra, "
            "but found the text 'inner'; did you mean inter?",
        ),
        (
            "grid:\n  model.prune: [{ration: 0.5}]\n",
            "5: grid.model.prune[0].ration: unknown key; did you mean model.prune.ratio?",
        ),
        (
            "grid:\n  engine.speculative: [{tokens: 4}]\n",
            "5: grid.engine.speculative[0]: model is missing",
        ),
        (
            "profiles:\n  h100:\n    grid: {model.top_k: [x]}\n",
            "6: profiles.h100.grid.model.top_k[0]: expected a whole number or null, "
            "but found the text 'x'",
        ),
        # ranges
        ("grid:\n  model.top_k: [1, 0]\n", "5: grid.model.top_k[1]: is 0, but must be at least 1"),
        ("  layout.tensor: -1\n", "4: base.layout.tensor: is -1, but must be at least 1"),
        (
            "grid:\n  model.prune: [{ratio: 1}]\n",
            "5: grid.model.prune[0].ratio: is 1.0, but must be above 0 and below 1",
        ),
        ("  model.name: ''\n", "4: base.model.name: given twice; first on line 3"),
        (
            "  workload.seed: 99999999999999999999999\n",
            "4: base.workload.seed: a whole number must fit in 64 bits",
        ),
        (
            "  workload.seed: 9223372036854775808\n",
            "4: base.workload.seed: a whole number must fit in 64 bits",
        ),
        ("  model.scale: .nan\n", "4: base.model.scale: .nan is not a finite number"),
        ("  model.scale: 1e999\n", "4: base.model.scale: 1e999 is too large for a number"),
        (
            "  model.scale: 0.5\n  model.weights: checkpoint\n",
            "5: base.model.weights: given twice; first on line 3",
        ),
        (
            "  measure: {repeats: 5, max_repeats: 2}\n",
            "4: base.measure.max_repeats: measure.max_repeats is 2, below measure.repeats 5",
        ),
        (
            "  engine:\n    speculative:\n      tokens: 4\n",
            "2: base: engine.speculative.model is missing",
        ),
        # given twice
        ("name: b\n", "4: name: given twice; first on line 1"),
        (
            "grid:\n  model.top_k: [1]\n  model: {top_k: [2]}\n",
            "6: grid.model.top_k: given twice; first on line 5",
        ),
        (
            "grid:\n  model.top_k: [1]\nzip:\n  model.top_k: [2]\n",
            "7: zip.model.top_k: given twice; first on line 5",
        ),
        (
            "grid:\n  model.top_k: [1]\ncases:\n- {}\n- model: {top_k: 2}\n",
            "8: cases[1].model.top_k: given twice; first on line 5",
        ),
        (
            "grid:\n  model.prune.ratio: [0.5]\n  model.prune: [null]\n",
            "6: grid.model.prune: model.prune and model.prune.ratio in it are both given; "
            "first on line 5",
        ),
        (
            "zip:\n  model.prune: [null]\ncases:\n- model.prune.ratio: 0.5\n",
            "7: cases[0].model.prune.ratio: model.prune and model.prune.ratio in it "
            "are both given; first on line 5",
        ),
        (
            "grid:\n  model.top_k:\n  - 1\n  - 2\n  - 1\n",
            "8: grid.model.top_k[2]: the number 1 is in this axis twice",
        ),
        (
            "grid:\n  model.prune: [{}, {ratio: 0.5}]\n",
            "5: grid.model.prune[1]: a block is in this axis twice",
        ),
        (
            "grid:\n  model.scale: [1, 1.0]\n",
            "5: grid.model.scale[1]: the number 1.0 is in this axis twice",
        ),
        # constraints
        (
            "where:\n- model.top_k <= model.num_expert\n",
            "5: where[0]: 'model.top_k <= model.num_expert': model.num_expert is no field "
            "of a trial; did you mean model.num_experts?",
        ),
        ("where:\n- 1 < 2\n- 2**9\n", "6: where[1]: '2**9': ** is not allowed"),
        (
            "profiles: {h100: {where: [__import__('os')]}}\n",
            "4: profiles.h100.where[0]: \"__import__('os')\": only min, max and abs can be called",
        ),
        # references
        (
            "  model.revision: ${oc.env:HOME}\n",
            "4: base.model.revision: ${…} takes a plain key such as ${base.model.name}; "
            "resolvers are refused",
        ),
        (
            "  engine.args.token: [x, 'a${oc.env:TOKEN,${name}}']\n",
            "4: base.engine.args.token[1]: ${…} takes a plain key such as ${base.model.name}; "
            "resolvers are refused",
        ),
        (
            "  model.revision: '$${name}{oc.env:HOME}'\n  model.quantization: '$${base.x}'\n",
            "5: base.model.quantization: ${base.x} is not given in this sweep",
        ),
        (
            "  model.revision: ${base.model.nam}\n",
            "4: base.model.revision: ${base.model.nam} is not given in this sweep; "
            "did you mean base.model.name?",
        ),
        (
            "  model.revision: ${base.model.revision}\n",
            "4: base.model.revision: ${base.model.revision} is not a single value of its own",
        ),
        (
            "  model.revision: '???'\n",
            "4: base.model.revision: ??? stands for a value that is missing; give one",
        ),
        # YAML
        ("grid: [\n", "5: not valid YAML: did not find expected node content"),
        ("a: b: c\n", "4: not valid YAML: mapping values are not allowed in this context"),
        ("  engine.args.x: \x07\n", "4: not valid YAML: control characters are not allowed"),
        (
            "  engine.args.x: !!python/object/apply:os.system [ls]\n",
            "4: base.engine.args.x: tags such as tag:yaml.org,2002:python/object/apply:os.system "
            "are not allowed",
        ),
        (
            "  engine.args.x: *nothing\n",
            "4: base.engine.args.x: the alias *nothing stands for nothing yet",
        ),
        (
            "  engine.args: &a {x: *a}\n",
            "4: base.engine.args.x: the alias *a stands for nothing yet",
        ),
        ("  ? [a]\n  : 1\n", "4: base: a key must be plain text"),
        ("  <<: 3\n", "4: base.<<: << takes a block or a list of blocks"),
        ("---\nname: b\n", "4: one document is expected, but a second one starts here"),
        ("  engine.args.x: " + "[" * 30 + "\n", None),
        (
            "  engine.args.x: " + "a" * 10_001 + "\n",
            "4: base.engine.args.x: a text of more than 10,000 characters",
        ),
        ("  engine.args." + "a" * 200 + ": 1\n", "4: base: a key of more than 200 characters"),
        ("  engine.args" + ".a" * 25 + ": 1\n", None),
    ],
)
def test_mistakes_in_the_file(read: Load, text: str, message: str | None) -> None:
    found = refusal(read, HEAD + text, profile="gb300")
    if message is None:
        assert re.match(
            r"s\.yaml:4: base\.engine\.args\..*: more than 20 .* inside one another$", found
        )
    else:
        assert found == f"s.yaml:{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml: the file is empty"),
        ("# nothing\n", "s.yaml: the file is empty"),
        ("~\n", "s.yaml:1: the file is empty"),
        ("- a\n", "s.yaml:1: expected a block of keys, but found a list"),
        ("base: {model: {name: a}}\n", "s.yaml: name is missing: every sweep has one"),
        ("name: a\n", "s.yaml: model.name is missing"),
        ("name: a\n\nbase: {layout.tensor: 2}\n", "s.yaml:3: base: model.name is missing"),
        ("name: a\nbase: 3\n", "s.yaml:2: base: expected a block of keys, but found the number 3"),
        ("name: a\ncases: [{model.name: a}, {}]\n", "s.yaml: model.name is missing"),
        (
            "name: a\nbase: {model: {name: 3}}\n",
            "s.yaml:2: base.model.name: expected text, but found the number 3; "
            "put it in quotes if it is a name",
        ),
        (
            'name: a\nbase: {model: {name: "a\\nb"}}\n',
            "s.yaml:2: base.model.name: is 'a\\nb', but must be a printable, non-empty name",
        ),
        ("name: 3\n", "s.yaml:1: name: expected text, but found the number 3"),
        (b"name: a\nbase: \xff\n", "s.yaml:2: this is not UTF-8 text"),
        ("#" * (1 << 20) + "\n", "s.yaml: a sweep file holds at most 1,048,576 bytes"),
        (
            HEAD
            + "grid: {workload.seed: ["
            + ",".join(map(str, range(2000)))
            + "], workload.batch_size: ["
            + ",".join(map(str, range(1, 601)))
            + "]}\n",
            "s.yaml: 2,000 × 600 = 1,200,000 points, but a sweep has at most 1,000,000",
        ),
        (
            "name: a\nbase:\n  model: {name: m}\n  model.scale: 0.5\n",
            "s.yaml:4: base.model.scale: model.scale 0.5 shrinks a skeleton: "
            "it needs model.weights: dummy",
        ),
    ],
)
def test_mistakes_of_a_whole_file(read: Load, text: str | bytes, message: str) -> None:
    assert refusal(read, text) == message


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/tmp/x",
        "",
        ".x",
        "-x",
        "a/b",
        "a\\b",
        "a b",
        "a\nb",
        "a\0b",
        "ä",
        "a" * 101,
        "..",
        "a\n",
    ],
)
def test_hostile_names(read: Load, name: str) -> None:
    found = refusal(read, f"name: {json.dumps(name)}\nbase: {{model.name: m}}\n")
    assert found.startswith("s.yaml:1: name: ")
    assert found.endswith(
        "cannot be the name of a folder here: at most 100 letters, digits, "
        "dots, dashes and underscores, a letter or digit first"
    )


@pytest.mark.parametrize("name", ["a", "7b", "Fig7.b_x-2", "a" * 100])
def test_names_that_are_fine(read: Load, name: str) -> None:
    assert read(f"name: {json.dumps(name)}\nbase: {{model.name: m}}\n").name == name


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "this is not a file"),
        (tmp_path / "a\0b", "this is not the name of a file"),
    ):
        with pytest.raises(SweepError) as caught:
            load(path)
        assert caught.value.message == message and caught.value.path == path


def test_alias_bombs_are_bounded(read: Load) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{after}: &{after} [" + ",".join([f"*{before}"] * 10) + "]\n"
    assert re.fullmatch(
        r"s\.yaml:1: .*: more than 10,000 values, each alias counted in full", refusal(read, bomb)
    )


def test_deep_aliases_are_bounded(read: Load) -> None:
    chain = "a: &a [x]\n"
    for number in range(30):
        chain += f"k{number}: &b{number} [*{'a' if number == 0 else f'b{number - 1}'}]\n"
    assert "more than 20 blocks or lists inside one another" in refusal(read, chain)


def test_reference_floods_are_bounded(read: Load) -> None:
    flood = (
        HEAD
        + "  engine.args.a: "
        + "a" * 9_000
        + "\n  engine.args.b: '"
        + "${base.engine.args.a}" * 9
        + "'\n"
    )
    assert refusal(read, flood).endswith("what the references make here is not plain, short text")
    sly = HEAD + "  engine.args.a: '{oc.env:HOME}'\n  engine.args.b: '$${base.engine.args.a}'\n"
    assert refusal(read, sly).endswith("what the references make here is not plain, short text")


def test_no_environment_reaches_a_sweep(read: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for hidden in (
        "${oc.env:SECRET}",
        "\\${oc.env:SECRET}",
        "${ oc.env:SECRET }",
        "${oc.env:SECRET",
    ):
        for key in ("base.model.revision", "base.engine.args.x", "grid.model.revision", "where"):
            value = json.dumps(hidden)
            override = f"{key}={value if key.startswith('base') else f'[{value}]'}"
            assert "hunter2" not in refusal(read, HEAD, override)


# Mistakes on the command line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.workload.batch=4", "unknown key; did you mean workload.batch_size?"),
        ("base.workload.batch_size=x", "expected a whole number, but found the text 'x'"),
        ("base.workload.batch_size=0", "is 0, but must be at least 1"),
        ("model.top_k=4", "unknown key; did you mean base.model.top_k?"),
        ("gird.model.top_k=[1]", "unknown key; did you mean grid?"),
        ("+base.model.top_k=4", "unknown key; did you mean base?"),
        ("--limit", "expected KEY=VALUE, such as base.workload.batch_size=4"),
        ("", "expected KEY=VALUE, such as base.workload.batch_size=4"),
        ("=4", "unknown key; expected one of name, base, grid, zip, cases, where"),
        ("grid.model.top_k=4", "expected a list, but found the number 4"),
        ("grid.model.top_k=[]", "the list is empty; fill it, or leave the key out"),
        ("grid.model.top_k=[1,x]", "expected a whole number or null, but found the text 'x'"),
        ("grid.layout.data=null", "there is no axis layout.data to take away"),
        ("grid.layout.dat=null", "unknown key; did you mean layout.data?"),
        ("grid.model.top_k=[1", "not valid YAML: did not find expected ',' or ']'"),
        ("base=4", "expected a block of keys, but found the number 4"),
        ("base.model.name=\udcff", "this is not UTF-8 text"),
        ("name=../x", None),
        ("where=model.top_k", "expected a list, but found the text 'model.top_k'"),
        ("where.first=1", "expected where=[…], or one item as in where[0]=…"),
        ("where[1]=true", "where has 1 items, counted from 0"),
        ("cases[0].model.top_k=1", "cases has 0 items, counted from 0"),
        ("where[0]=1+", "'1+': this is not an expression"),
        (
            "profiles.cpu.base.model.top_k=1",
            "a profile is chosen, not overridden; override base, grid and so on",
        ),
        ("zip.model.top_k=[1]", "given twice; first on line 4"),
        (
            "base.engine.args.x=!!python/none",
            "tags such as tag:yaml.org,2002:python/none are not allowed",
        ),
    ],
)
def test_mistakes_on_the_command_line(read: Load, override: str, message: str | None) -> None:
    text = HEAD + "grid: {model.top_k: [1, 2]}\nwhere: [model.top_k < 9]\n"
    found = refusal(read, text, override)
    shown = override.replace("\udcff", "\\udcff")
    if message is None:
        assert found.startswith(f"command line: {shown}: '../x' cannot be the name of a folder")
    else:
        assert found == f"command line: {shown}: {message}"


def test_the_parts_of_an_error(read: Load) -> None:
    with pytest.raises(SweepError) as caught:
        read(HEAD + "grid:\n  model.topk: [1]\n")
    error = caught.value
    assert (error.path, error.line, error.key) == (Path("s.yaml"), 5, "grid.model.topk")
    assert error.message == "unknown key; did you mean model.top_k?"
    with pytest.raises(SweepError) as caught:
        read(HEAD, "base.workload.batch=4")
    assert (caught.value.path, caught.value.line) == (None, None)
    assert caught.value.key == "base.workload.batch=4"


# The rest


def test_every_field_of_a_trial_can_be_found() -> None:
    assert {key for key, field in fields.catalogue().items() if field.kind == "block"} == {
        "model",
        "layout",
        "workload",
        "engine",
        "measure",
        "model.prune",
        "engine.speculative",
    }
    assert fields.catalogue()["model.weights"].choices == ("dummy", "checkpoint")
    assert fields.catalogue()["model.name"].required
    assert "layout.devices" in fields.readable() and "layout" not in fields.readable()
    assert fields.find("engine.args.a.b") is fields.catalogue()["engine.args"]
    assert fields.find("model.top_k.x") is None


def test_the_pure_python_parser_reads_the_same(read: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = read(INTERFACE)
    monkeypatch.setattr(yamltext, "_LOADER", yamltext.yaml.BaseLoader)
    assert read(INTERFACE) == quick
    assert refusal(read, "name: [\n").startswith("s.yaml:2: not valid YAML: ")


def examples() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_every_example_of_the_readme_runs(read: Load, number: int) -> None:
    text = examples()[number]
    own = {"num_experts": 8, "top_k": 2, "ffn_dim": 14336, "num_layers": 32, "hidden_size": 4096}
    for profile in ("cpu", "h100"):
        expansion = expand(read(text, profile=profile), lambda model: own)
        said = re.search(rf"# points on {profile}: (\d+)", text)
        if said is None:
            said = re.search(r"# points: (\d+)", text)
        assert said is not None, "an example says how many points it has"
        assert len(expansion.points) == int(said[1])
