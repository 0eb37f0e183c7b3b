"""From a sweep to its points: order, values, constraints, contradictions, duplicates."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SweepError
from orchestrator.grid import Expansion, Resolve, expand
from orchestrator.sweep import load
from workers.contract.engine import Speculative
from workers.contract.model import Model, Prune

HEAD = "name: study\nbase:\n  model: {name: olmoe, weights: dummy}\n"

Lay = Callable[..., Expansion]


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Expands `HEAD` and a text, as the file `s.yaml`."""
    monkeypatch.chdir(tmp_path)

    def lay(text: str, *overrides: str, resolve: Resolve | None = None) -> Expansion:
        path = Path("s.yaml")
        path.write_text(HEAD + text)
        return expand(load(path, overrides), resolve)

    return lay


def refusal(lay: Lay, text: str, **more: Any) -> str:
    with pytest.raises(SweepError) as caught:
        lay(text, **more)
    return str(caught.value)


def test_no_axis_is_one_point(lay: Lay) -> None:
    expansion = lay("")
    assert expansion.size == 1 and expansion.dropped == {}
    assert expansion.points[0].trial.model == Model(name="olmoe", weights="dummy")
    assert expansion.points[0].axes == {}


def test_the_first_axis_is_the_slowest_then_zip_then_cases(lay: Lay) -> None:
    expansion = lay(
        "cases: [{layout.expert: true}, {}]\n"
        "zip: {workload.input_tokens: [5, 6], workload.output_tokens: [7, 8]}\n"
        "grid: {model.top_k: [2, 1], layout.tensor: [4, 8]}\n"
    )
    points = [
        (
            point.trial.model.top_k,
            point.trial.layout.tensor,
            point.trial.workload.input_tokens,
            point.trial.workload.output_tokens,
            point.trial.layout.expert,
        )
        for point in expansion.points
    ]
    assert points == [
        (k, tensor, *lengths, expert)
        for k, tensor, lengths, expert in itertools.product(
            (2, 1), (4, 8), ((5, 7), (6, 8)), (True, False)
        )
    ]
    assert expansion.size == 16
    assert expansion.points[0].axes == {
        "model.top_k": 2,
        "layout.tensor": 4,
        "workload.input_tokens": 5,
        "workload.output_tokens": 7,
        "layout.expert": True,
    }
    assert "layout.expert" not in expansion.points[1].axes


def test_points_are_the_trials_that_plain_construction_gives(lay: Lay) -> None:
    expansion = lay(
        "grid: {model.top_k: [1, 2], workload.batch_size: [3, 4], measure.timeout_s: [9, 9.5]}\n"
    )
    trials = [point.trial for point in expansion.points]
    assert len({trial.named_id for trial in trials}) == 8
    assert all(isinstance(trial.measure.timeout_s, float) for trial in trials)
    first = trials[0]
    assert first.model == Model(name="olmoe", weights="dummy", top_k=1)
    assert first.workload.batch_size == 3 and first.measure.timeout_s == 9.0
    assert trials[0].engine_key == trials[1].engine_key != trials[4].engine_key


def test_axes_hold_values_as_written(lay: Lay) -> None:
    expansion = lay("grid: {model.scale: [1, 0.5], model.prune: [null, {ratio: 0.25}]}\n")
    assert [point.axes for point in expansion.points] == [
        {"model.scale": scale, "model.prune": prune}
        for scale in (1, 0.5)
        for prune in (None, {"ratio": 0.25})
    ]
    assert [point.trial.model.prune for point in expansion.points[:2]] == [None, Prune(ratio=0.25)]


def test_a_block_value_is_the_whole_block(lay: Lay) -> None:
    expansion = lay(
        "  model.prune: {kind: intra, ratio: 0.75}\n"
        "grid: {model.prune: [{ratio: 0.25}], engine.speculative: [{model: ngram}]}\n"
    )
    assert expansion.points[0].trial.model.prune == Prune(kind="inter", ratio=0.25)
    assert expansion.points[0].trial.engine.speculative == Speculative(model="ngram", tokens=4)


def test_a_key_in_a_block_keeps_the_rest_of_the_block(lay: Lay) -> None:
    over_base = lay("  model.prune: {kind: intra}\ngrid: {model.prune.ratio: [0.25, 0.75]}\n")
    assert [point.trial.model.prune for point in over_base.points] == [
        Prune(kind="intra", ratio=0.25),
        Prune(kind="intra", ratio=0.75),
    ]
    over_nothing = lay("grid: {model.prune.ratio: [0.25, 0.75]}\n")
    assert [point.trial.model.prune for point in over_nothing.points] == [
        Prune(ratio=0.25),
        Prune(ratio=0.75),
    ]
    together = lay("grid: {engine.speculative.tokens: [2, 3], engine.speculative.model: [ngram]}\n")
    assert [point.trial.engine.speculative for point in together.points] == [
        Speculative(model="ngram", tokens=2),
        Speculative(model="ngram", tokens=3),
    ]


def test_cases_may_set_a_block_or_a_key_in_it(lay: Lay) -> None:
    expansion = lay(
        "  model.prune: {kind: intra}\n"
        "cases:\n- {}\n- model.prune: null\n- model: {prune: {ratio: 0.25}}\n- model.prune: {}\n"
    )
    assert [point.trial.model.prune for point in expansion.points] == [
        Prune(kind="intra"),
        None,
        Prune(kind="intra", ratio=0.25),
        Prune(),
    ]


def test_engine_arguments_are_set_inside_those_of_the_base(lay: Lay) -> None:
    expansion = lay(
        "  engine.args: {a: 1, b: {c: 2, d: 3}}\n"
        "grid: {engine.args.b.c: [4, null], engine.args.a.z: [true], engine.args.e: [{f: [1]}]}\n"
    )
    assert [point.trial.engine.args for point in expansion.points] == [
        {"a": {"z": True}, "b": {"c": 4, "d": 3}, "e": {"f": [1]}},
        {"a": {"z": True}, "b": {"c": None, "d": 3}, "e": {"f": [1]}},
    ]
    assert len({point.trial_id for point in expansion.points}) == 2


def test_a_point_is_dropped_by_the_first_constraint_that_fails(lay: Lay) -> None:
    expansion = lay(
        "grid: {model.top_k: [1, 2, 4], layout.tensor: [1, 2]}\n"
        "where: [model.top_k < 4, layout.devices < 2, model.top_k == 1, layout.tensor > 0]\n"
    )
    assert [point.axes for point in expansion.points] == [{"model.top_k": 1, "layout.tensor": 1}]
    assert expansion.size == 6
    assert expansion.dropped == {
        "model.top_k < 4": 2,
        "layout.devices < 2": 2,
        "model.top_k == 1": 1,
        "layout.tensor > 0": 0,
    }


def test_top_k_above_experts_is_not_the_grids_business(lay: Lay) -> None:
    expansion = lay("  model.num_experts: 8\ngrid: {model.top_k: [8, 16]}\n")
    assert [point.trial.model.top_k for point in expansion.points] == [8, 16]


def test_null_dimensions_are_the_models_own(lay: Lay) -> None:
    asked: list[Model] = []

    def own(model: Model) -> Mapping[str, Any]:
        asked.append(model)
        return {"num_experts": {"olmoe": 64, "mixtral": 8}[model.name], "hidden_size": 4096}

    expansion = lay(
        "grid: {model.name: [olmoe, mixtral], model.top_k: [8, 16], workload.seed: [1, 2, 3]}\n"
        "where: [model.top_k <= model.num_experts, model.hidden_size == 4096]\n",
        resolve=own,
    )
    kept = {(point.trial.model.name, point.trial.model.top_k) for point in expansion.points}
    assert kept == {("olmoe", 8), ("olmoe", 16), ("mixtral", 8)}
    assert all(point.trial.model.num_experts is None for point in expansion.points)
    assert len(asked) < expansion.size


def test_a_dimension_of_the_trial_wins_over_the_models_own(lay: Lay) -> None:
    expansion = lay(
        "grid: {model.num_experts: [null, 4]}\nwhere: [model.num_experts == 4]\n",
        resolve=lambda model: {"num_experts": 64},
    )
    assert [point.trial.model.num_experts for point in expansion.points] == [4]


def test_derived_names_and_free_names(lay: Lay) -> None:
    expansion = lay(
        "grid: {layout.data: [1, 2], measure.ci_width: [null, 0.1], engine.args.x: [1, 2]}\n"
        "where:\n"
        "- layout.devices == 2 and workload.tokens_per_request == 256\n"
        "- measure.most_repeats == 15\n"
        "- engine.args.x == 1 and engine.args.y == null and engine.speculative.tokens == null\n"
    )
    assert [point.axes for point in expansion.points] == [
        {"layout.data": 2, "measure.ci_width": 0.1, "engine.args.x": 1}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "grid: {model.top_k: [1, 2]}\nwhere: [model.top_k <= model.num_experts]\n",
            "s.yaml:5: where[0]: 'model.top_k <= model.num_experts': model.num_experts is null "
            "here, and null has no order (at model.top_k=1)",
        ),
        (
            "grid: {layout.tensor: [1, 2]}\nwhere:\n- 1 < 2\n- 4 / (layout.tensor - 2) < 0\n",
            "s.yaml:7: where[1]: '4 / (layout.tensor - 2) < 0': division by zero "
            "(at layout.tensor=2)",
        ),
        (
            "grid: {layout.tensor: [1, 2]}\nwhere: [layout.tensor > 8, layout.tensor > 9]\n",
            "s.yaml:5: where[0]: no point is left of 2: 'layout.tensor > 8' dropped 2",
        ),
        (
            "grid:\n  model.scale: [1, 0.5]\n  model.weights: [dummy, checkpoint]\n",
            's.yaml:5: grid.model.scale[1]: with model.scale=0.5, model.weights="checkpoint": '
            "model.scale 0.5 shrinks a skeleton: it needs model.weights: dummy",
        ),
        (
            "  measure.repeats: 5\ngrid:\n  measure.max_repeats: [9, 3]\n",
            "s.yaml:6: grid.measure.max_repeats[1]: with measure.max_repeats=3: "
            "measure.max_repeats is 3, below measure.repeats 5",
        ),
        (
            "  measure.max_repeats: 5\ngrid:\n  measure.repeats: [3, 9]\n",
            "s.yaml:6: grid.measure.repeats[1]: with measure.repeats=9: "
            "measure.max_repeats is 5, below measure.repeats 9",
        ),
        (
            "  model.scale: 0.5\ngrid: {model.weights: [dummy, checkpoint]}\n",
            's.yaml:5: grid.model.weights[1]: with model.weights="checkpoint": '
            "model.scale 0.5 shrinks a skeleton: it needs model.weights: dummy",
        ),
        (
            "grid:\n  engine.speculative.tokens: [2, 4]\n",
            "s.yaml:5: grid.engine.speculative.tokens[0]: with engine.speculative.tokens=2: "
            "engine.speculative.model is missing",
        ),
        (
            "cases:\n- layout.tensor: 2\n- layout: {tensor: 2}\n",
            "s.yaml:6: cases[1].layout.tensor: two points are the same trial: "
            "layout.tensor=2 and layout.tensor=2",
        ),
        (
            "cases: [{}, {}]\n",
            "s.yaml: cases: two points are the same trial: the base and the base",
        ),
        (
            "  layout.tensor: 2\ngrid: {model.top_k: [1, 2]}\ncases:\n- {}\n- layout.tensor: 2\n",
            "s.yaml:8: cases[1].layout.tensor: two points are the same trial: "
            "model.top_k=1 and model.top_k=1, layout.tensor=2",
        ),
        (
            "zip:\n  workload.seed: [1, 2, 1]\n  workload.batch_size:\n  - 1\n  - 1\n  - 1\n",
            "s.yaml:9: zip.workload.batch_size[2]: two points are the same trial: "
            "workload.seed=1, workload.batch_size=1 and workload.seed=1, workload.batch_size=1",
        ),
        (
            "cases:\n- engine.args: {a: 1}\n- engine.args.a: 1\n",
            "s.yaml:6: cases[1].engine.args.a: two points are the same trial: "
            "engine.args.a=1 and engine.args.a=1",
        ),
    ],
)
def test_points_that_are_refused(lay: Lay, text: str, message: str) -> None:
    assert refusal(lay, text) == message


def test_a_constraint_may_drop_what_contradicts_itself(lay: Lay) -> None:
    expansion = lay(
        "grid: {model.scale: [1, 0.5], model.weights: [dummy, checkpoint]}\n"
        "where: ['model.scale == 1 or model.weights == \"dummy\"']\n"
    )
    assert len(expansion.points) == 3


def test_a_dropped_duplicate_is_none(lay: Lay) -> None:
    expansion = lay(
        "  layout.tensor: 2\ncases: [{}, {layout.tensor: 2, model.top_k: 1}]\n",
        "where=['model.top_k == null']",
    )
    assert len(expansion.points) == 1


def test_a_mistake_from_the_command_line_says_so(lay: Lay) -> None:
    with pytest.raises(SweepError) as caught:
        lay("grid: {model.weights: [dummy, checkpoint]}\n", "base.model.scale=0.5")
    assert "model.scale 0.5 shrinks a skeleton" in str(caught.value)
    with pytest.raises(SweepError) as caught:
        lay("", "cases=[{}, {model.name: olmoe}]")
    assert str(caught.value) == (
        "command line: cases=[{}, {model.name: olmoe}]: two points are the same trial: "
        'the base and model.name="olmoe"'
    )


@pytest.mark.lengthy
def test_a_hundred_thousand_points_are_laid_out_while_the_user_waits(lay: Lay) -> None:
    ten = list(range(1, 11))
    keys = ("model.ffn_dim", "model.num_experts", "workload.seed", "layout.tensor", "layout.data")
    text = "grid:\n" + "".join(f"  {key}: {ten}\n" for key in keys)
    start = time.process_time()
    expansion = lay(text + "where: [model.ffn_dim * layout.devices >= model.num_experts]\n")
    assert time.process_time() - start < 5
    assert expansion.size == 100_000
    assert len(expansion.points) + sum(expansion.dropped.values()) == 100_000


def test_setting_an_argument_copies_the_block_around_it(lay: Lay) -> None:
    expansion = lay("  engine.args: {a: {b: 1}}\ngrid: {engine.args.a.c: [1, 2]}\n")
    first, second = (point.trial.engine.args for point in expansion.points)
    first["a"]["b"] = 9
    assert second["a"]["b"] == 1
