"""Figures of which experts ran, from small datasets of known arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from analysis import load
from analysis.__main__ import main
from analysis.errors import SelectionError
from analysis.figures.figure import Figure, RecordsFigure
from analysis.figures.registry import find
from analysis.figures.write import write as write_figure
from analysis.traces import balances, counts, shares
from tests.unit.test_analysis_dataset import failure, record, write
from workers.contract.record import RECORDS, rows
from workers.moe.accounting import distinct_experts
from workers.moe.skew import curve, draw, parse

TRACED = ("activation-heatmap", "imbalance", "routing-cost")
EXPERTS, TOP_K, LAYERS, TOKENS = 8, 2, (1, 2, 3), 400


def probed(trial_id: str, of: Callable[[int], Iterable[int]], **where: Any) -> list[dict[str, Any]]:
    """Rows of the activations table: layer 0 is dense, `of` gives tokens per expert."""
    return [
        {
            "run_id": "r0",
            "trial_id": trial_id,
            "phase": phase,
            "layer": layer,
            "expert": expert,
            "tokens": int(tokens) * (4 if phase == "prefill" else 1),
        }
        for phase in ("prefill", "decode")
        for layer in LAYERS
        for expert, tokens in enumerate(of(layer))
        if tokens or where.get("zeros")
    ]


def routed(routing: str, experts: int = EXPERTS, top_k: int = TOP_K) -> Callable[[int], Any]:
    """Tokens per expert as a seeded draw gives them."""

    def of(layer: int) -> Any:
        chosen = draw(parse(routing), experts, top_k, TOKENS, seed=layer)
        return np.bincount(chosen.ravel(), minlength=experts)

    return of


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two models, one even and one skewed, and by batch what a probe and MBU said."""
    even = record("even", model="even-moe", throughput_tok_s=1000.0, batch_size=1)
    steep = record("steep", model="steep-moe", throughput_tok_s=700.0, batch_size=1)
    utilised = [
        record(
            f"b{batch}",
            model="even-moe",
            batch_size=batch,
            activation_source="traced",
            activated_experts_decode=0.9 * distinct_experts(EXPERTS, TOP_K, batch),
            mbu=1.5 / batch**0.1,
            s_mbu=0.5,
            s_mbu_paper=0.45,
            seed=1,
        )
        for batch in (1, 2, 4, 8, 16)
    ]
    write(tmp_path, [even, steep, *utilised])
    rows = probed("even", routed("uniform")) + probed("steep", routed("zipf:1.5"))
    write(tmp_path, rows, table="activations")
    return tmp_path


def drawn(name: str, folder: Path) -> tuple[Figure, pl.DataFrame]:
    figure = find(name)
    assert isinstance(figure, RecordsFigure)
    return figure, figure.prepare(load(folder), *(load.table(one, folder) for one in figure.beside))


def texts(figure: Figure, frame: pl.DataFrame, folder: Path) -> list[str]:
    write_figure(figure, frame, folder / "x.svg")
    assert "NaN" not in (folder / "x.svg").read_text()
    root = ElementTree.parse(folder / "x.svg").getroot()
    return [" ".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_counts_have_a_row_for_every_expert_and_none_for_dense_layers(tmp_path: Path) -> None:
    write(tmp_path, [record("a"), record("b", seed=1)])
    write(tmp_path, probed("a", lambda layer: [layer] + [0] * 7), table="activations")
    frame = counts(load(tmp_path), load.activations(tmp_path))
    assert frame.height == 2 * len(LAYERS) * EXPERTS
    assert frame.get_column("trial_id").unique().to_list() == ["a"]
    assert frame.get_column("layer").unique().sort().to_list() == [1, 2, 3]
    decode = frame.filter(pl.col("phase") == "decode", pl.col("layer") == 3)
    assert decode.get_column("tokens").to_list() == [3] + [0] * 7
    assert frame.get_column("phase").unique(maintain_order=True).to_list() == ["prefill", "decode"]


def test_shares_are_of_tokens_and_over_the_even_share(tmp_path: Path) -> None:
    write(tmp_path, [record("a")])
    write(tmp_path, probed("a", lambda _: [10, 5, 5, 0, 0, 0, 0, 0]), table="activations")
    frame = shares(counts(load(tmp_path), load.activations(tmp_path)))
    first = frame.filter(pl.col("phase") == "decode", pl.col("layer") == 1).head(4)
    assert first.get_column("share").to_list() == [1.0, 0.5, 0.5, 0.0]  # 10 tokens, top-2
    assert first.get_column("times_even").to_list() == [4.0, 2.0, 2.0, 0.0]


def test_series_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    write(tmp_path, [record("a"), record("b", top_k=4), record("c", model="other", top_k=1)])
    rows = [row for one in "abc" for row in probed(one, lambda _: [8] * EXPERTS)]
    write(tmp_path, rows, table="activations")
    frame = counts(load(tmp_path), load.activations(tmp_path))
    assert frame.get_column("series").unique().sort().to_list() == [
        "mixtral-8x7b, top-k 2",
        "mixtral-8x7b, top-k 4",
        "other, top-k 1",
    ]


def test_what_does_not_make_one_figure_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [record("a"), failure("b", "oom", batch_size=32)])
    with pytest.raises(SelectionError, match="no record has expert counts"):
        drawn("fig15", tmp_path)
    with pytest.raises(SelectionError, match="no record has traced experts"):
        drawn("sparsity-traced", tmp_path)
    with pytest.raises(SelectionError, match="no records yet that have mbu"):
        drawn("cap-fig8", tmp_path)
    write(tmp_path, [record("c", device="H100")], name="001.arrow")
    rows = probed("a", routed("uniform")) + probed("c", routed("uniform"))
    write(tmp_path, rows, table="activations")
    with pytest.raises(SelectionError, match=r"different conditions.*device"):
        drawn("imbalance", tmp_path)


def test_the_heat_map_names_the_busiest_expert(dataset: Path) -> None:
    figure, frame = drawn("fig15", dataset)
    assert frame.columns[:7] == [
        "series", "phase", "layer", "expert", "tokens", "share", "times_even"
    ]  # fmt: skip
    sums = frame.group_by("series", "phase", "layer").agg(pl.col("share").sum())
    assert sums.get_column("share").to_list() == pytest.approx([TOP_K] * 12)
    sentence = figure.insight(frame)
    assert "steep-moe: in prefill (1,600 tokens) expert 0 of layer" in sentence
    assert "in decode (400 tokens)" in sentence
    assert "Most even at its peak is even-moe" in sentence
    assert "none takes 2 times it and all ran" in sentence
    assert [pivot.title for pivot in figure.pivots(frame)] == [
        "even-moe, prefill",
        "even-moe, decode",
        "steep-moe, prefill",
        "steep-moe, decode",
    ]


def test_data_sets_of_one_model_are_set_against_each_other(tmp_path: Path) -> None:
    few = {"num_experts": 4, "top_k": 2}
    names = ("builtin:code", "builtin:prose", None)
    write(tmp_path, [record(str(at), dataset=name, **few) for at, name in enumerate(names)])
    loads = ([60, 40, 60, 40], [40, 60, 60, 40], [50, 50, 60, 40])
    rows = [
        row
        for at, load in enumerate(loads)
        for row in probed(str(at), [load, load, load, load].__getitem__)
    ]
    write(tmp_path, rows, table="activations")
    figure, frame = drawn("fig15", tmp_path)
    sentence = figure.insight(frame)
    # Shares of choices: 0.3, 0.2 against 0.2, 0.3; prefill has 400 tokens here.
    assert (
        "mixtral-8x7b, prefill: choices on builtin:code and builtin:prose differ by a total "
        "variation of 0.100 in the median layer (0.0" in sentence
    )
    assert "the furthest of 3 data sets" in sentence
    assert "which 40.0 and 60.0 % of their tokens choose" in sentence  # expert 1
    assert "takes 2 times it" not in sentence, "no more than E/k = 2 can be had"
    assert "Most even" not in sentence, "all peak alike"


def test_all_maps_share_one_scale_of_colour(dataset: Path) -> None:
    figure, frame = drawn("activation-heatmap", dataset)
    spec: dict[str, Any] = figure.chart(frame).to_dict()
    rows = spec["vconcat"][0]["vconcat"]
    blocks = [block for row in rows for block in row["hconcat"]]
    maps = [one for block in blocks for one in block["hconcat"]]
    domains = [one["encoding"]["color"]["condition"]["scale"]["domain"] for one in maps]
    assert len(maps) == 4
    assert all(domain == domains[0] for domain in domains)
    assert domains[0][-1] == frame.get_column("times_even").max()
    assert [one["title"]["text"] for one in blocks[0]["hconcat"]] == ["prefill", "decode"]


def test_imbalance_is_that_of_the_counts_and_leaves_dense_layers_out(dataset: Path) -> None:
    figure, frame = drawn("imbalance", dataset)
    assert frame.height == 2 * 2 * len(LAYERS)
    even = frame.filter(pl.col("series") == "even-moe")
    steep = frame.filter(pl.col("series") == "steep-moe")
    assert even.get_column("gini").max() < steep.get_column("gini").min()  # type: ignore[operator]
    tokens = routed("zipf:1.5")(1)
    row = steep.filter(pl.col("layer") == 1, pl.col("phase") == "decode").row(0, named=True)
    assert row["max_over_mean"] == pytest.approx(tokens.max() / tokens.mean())
    assert row["tokens"] == TOKENS
    assert row["ranks"] is None and row["rank_max_over_mean"] is None
    sentence = figure.insight(frame)
    assert "steep-moe: in prefill the fullest expert has" in sentence
    assert "ranks" not in sentence


def test_ranks_are_counted_where_experts_are_spread(tmp_path: Path) -> None:
    spread = {"tensor_parallel": 2, "expert_parallel": True, "device_count": 2}
    write(tmp_path, [record("a", **spread)])
    write(tmp_path, probed("a", lambda _: [4, 4, 4, 4, 0, 0, 0, 0]), table="activations")
    figure, frame = drawn("imbalance", tmp_path)
    assert set(frame.get_column("ranks")) == {2}
    assert set(frame.get_column("rank_max_over_mean")) == {2.0}
    assert "the fullest of 2 ranks 2.00 times" in figure.insight(frame)
    assert len(figure.pivots(frame)[0].columns) == 4 + 3 + 1
    assert set(frame.get_column("if_ranks_2")) == {2.0}
    assert set(frame.get_column("if_ranks_8")) == {2.0}  # a rank for every expert


def test_experts_that_take_turns_are_even_over_all_and_uneven_in_each_pass(tmp_path: Path) -> None:
    write(tmp_path, [record("a", batch_size=4)])
    write(tmp_path, probed("a", lambda _: [1] * EXPERTS), table="activations")
    layers = len(LAYERS)
    probe = {
        "run_id": "r0",
        "trial_id": "a",
        "attempt": 1,
        "kind": "probe",
        "repeat": 0,
        # A prefill of 4 × 8 tokens, one pass of both kinds, two decode passes of 4.
        "pass_new": [[8] * 4, [1, 5], [1] * 4, [1] * 4],
        "pass_decoding": [[False] * 4, [True, False], [True] * 4, [True] * 4],
        "pass_busiest": [[8] * layers, [6] * layers, [4, 2, 1], [4, 4, 1]],
    }
    write(tmp_path, [probe], table="samples")
    figure, frame = drawn("imbalance", tmp_path)
    found = {phase: one for (phase,), one in frame.group_by("phase")}
    assert set(found["prefill"].get_column("pass_max_over_mean")) == {1.0}  # 32·2/8 is 8
    decode = found["decode"].sort("layer").get_column("pass_max_over_mean")
    assert decode.to_list() == [4.0, 3.0, 1.0]
    assert set(frame.get_column("max_over_mean")) == {1.0}
    assert "2.67 times the mean in each pass and 1.00 times the mean over all" in (
        figure.insight(frame)
    )


def test_a_layer_without_tokens_has_no_balance(tmp_path: Path) -> None:
    write(tmp_path, [record("a")])
    rows = probed("a", lambda layer: [0 if layer == 2 else 5] * EXPERTS, zeros=True)
    write(tmp_path, rows, table="activations")
    frame = balances(counts(load(tmp_path), load.activations(tmp_path)))
    gini = frame.filter(pl.col("phase") == "decode").get_column("gini").to_list()
    assert gini == [0.0, None, 0.0]
    figure, drawn_frame = drawn("activation-heatmap", tmp_path)
    assert "NaN" not in str(figure.chart(drawn_frame).to_dict())
    assert figure.pivots(drawn_frame)[0].rows[1][1] == "–"


def test_what_imbalance_costs(tmp_path: Path) -> None:
    values = {"uniform": 1000.0, "zipf:1": 900.0, "all-to-one": 500.0}
    write_with_routing(tmp_path, values)
    figure, frame = drawn("routing-cost", tmp_path)
    assert frame.get_column("routing").to_list() == ["uniform", "zipf:1", "all-to-one"]
    assert set(frame.get_column("series")) == {"mixtral-8x7b"}
    assert frame.get_column("max_over_mean")[-1] == EXPERTS / TOP_K
    sentence = figure.insight(frame)
    assert (
        "to all-to-one (4.00 times): 500, -50.0 %, more than the confidence intervals." in sentence
    )
    assert "counted in decode" in sentence
    spec = str(figure.chart(frame).to_dict())
    assert "imbalance from a probe" in spec
    page = " ".join(texts(figure, frame, tmp_path))
    assert "zipf:1" in page


def write_with_routing(folder: Path, values: dict[str, float]) -> None:
    """A record per routing with its throughput, and what its probe counted."""
    points = [record(name, throughput_tok_s=value) for name, value in values.items()]
    with_routing(folder, points, [*values])
    counted = [row for name in values for row in probed(name, routed(name))]
    write(folder, counted, table="activations")


def with_routing(
    folder: Path, points: list[dict[str, Any]], routings: Sequence[str | None]
) -> None:
    """Records with a `routing` column, which older versions of the schema do not have."""
    frame = pl.DataFrame(pl.from_arrow(rows(RECORDS, points)))
    (folder / "records").mkdir()
    frame = frame.with_columns(routing=pl.Series(routings, dtype=pl.String))
    frame.write_ipc(folder / "records" / "0.arrow")


def test_one_routing_is_no_comparison(tmp_path: Path) -> None:
    write_with_routing(tmp_path, {"uniform": 10.0})
    figure, frame = drawn("routing-cost", tmp_path)
    assert "one routing is no comparison" in figure.insight(frame)


def test_the_traced_share_lies_beside_its_bound(dataset: Path) -> None:
    figure, frame = drawn("sparsity-traced", dataset)
    assert frame.get_column("batch_size").to_list() == [1, 2, 4, 8, 16]
    row = frame.row(0, named=True)
    assert row["experts_uniform"] == TOP_K
    # 4000 parameters, 1000 of them active with 2 of 8 experts: an expert has 500, the rest 0.
    assert row["share_uniform"] == pytest.approx(0.25)
    assert row["share"] == pytest.approx(0.9 * 0.25)
    assert (frame.get_column("share") < frame.get_column("share_uniform")).all()
    sentence = figure.insight(frame)
    assert sentence.startswith("even-moe activates 22.5 % of its parameters at batch 1 and ")
    assert "furthest below uniform routing" in sentence
    assert figure.pivots(frame)[0].rows[3][1] == "2.00"


def test_a_routing_that_was_asked_for_has_its_own_expectation(tmp_path: Path) -> None:
    skew = parse("zipf:1.5")
    told = {"activation_source": "traced", "params_total": 4000, "params_active": 1000}
    points = []
    for batch in (2, 8):
        expected = float(curve(skew, EXPERTS, TOP_K, batch))
        points.append(
            record(f"z{batch}", batch_size=batch, activated_experts_decode=1.02 * expected, **told)
        )
        points.append(record(f"o{batch}", batch_size=batch, activated_experts_decode=2.5, **told))
    with_routing(tmp_path, points, ["zipf:1.5", None, "zipf:1.5", None])
    figure, frame = drawn("sparsity-traced", tmp_path)
    by_routing = frame.filter(pl.col("routing") == "zipf:1.5")
    ratio = by_routing.get_column("experts") / by_routing.get_column("experts_asked")
    assert ratio.to_list() == pytest.approx([1.02, 1.02])
    own = frame.filter(pl.col("routing").is_null())
    assert own.get_column("experts_asked").null_count() == 2
    assert (by_routing.get_column("share_asked") < by_routing.get_column("share_uniform")).all()
    assert "what its law expects, to within 2.0 % (mixtral-8x7b, zipf:1.5 routing" in (
        figure.insight(frame)
    )
    page = " ".join(texts(figure, frame, tmp_path))
    assert "expected of its routing" in page and "own router" in page


def test_mbu_stands_beside_s_mbu_with_what_it_overstates(dataset: Path) -> None:
    figure, frame = drawn("s-mbu-batch", dataset)
    assert frame.get_column("overstated")[0] == pytest.approx(2.0)
    sentence = figure.insight(frame)
    assert (
        "even-moe reaches 50.0 % of the peak by S-MBU and 150.0 % by MBU, 200 % more, at batch 1"
        in (sentence)
    )
    assert "Its MBU at batch 1, 2, 4, 8 and 16 is more than the device can deliver." in sentence
    assert sentence.endswith("Experts as traced by a probe.")
    assert figure.pivots(frame)[0].rows[-1][1] == "+200%"


def test_sources_of_the_experts_are_told_apart(tmp_path: Path) -> None:
    used = {"mbu": 0.6, "s_mbu": 0.6, "s_mbu_paper": 0.5}
    points = [
        record("a", batch_size=1, activation_source="uniform", **used),
        record("b", batch_size=2, activation_source="traced", **used),
    ]
    write(tmp_path, points)
    figure, frame = drawn("s-mbu-batch", tmp_path)
    sentence = figure.insight(frame)
    assert "60.0 % by MBU, the same, at batch 1" in sentence
    assert "(batch 1) and Experts as traced by a probe (batch 2)" in sentence or (
        "(batch 2) and Experts as under uniform routing" in sentence
    )
    assert "can deliver" not in sentence


def test_sheets_are_no_traces_and_say_so(tmp_path: Path) -> None:
    used = {"mbu": 0.6, "s_mbu": 0.6, "s_mbu_paper": 0.5, "activated_experts_decode": 2.0}
    used |= {"params_total": 4000, "params_active": 1000}
    sources = ("traced", "sheet", "sheet-interpolated")
    points = [
        record(name, batch_size=2**place, activation_source=name, **used)
        for place, name in enumerate(sources)
    ]
    write(tmp_path / "apart", points)
    figure, frame = drawn("s-mbu-batch", tmp_path / "apart")
    sentence = figure.insight(frame)
    assert "Experts as traced by a probe (batch 1)" in sentence
    assert "an earlier probe traced them (batch 2)" in sentence
    assert "interpolated between two batches of activation sheets (batch 4)" in sentence
    _, traced = drawn("sparsity-traced", tmp_path / "apart")
    assert traced.get_column("batch_size").unique().to_list() == [1]
    twice = [one | {"batch_size": 1} for one in points]
    write(tmp_path / "mixed", twice)
    with pytest.raises(SelectionError, match="differ in activation_source"):
        drawn("s-mbu-batch", tmp_path / "mixed")


def test_want_of_a_sheet_is_told_where_no_share_is_left(tmp_path: Path) -> None:
    write(tmp_path, [record("a", mbu=0.5, outcome_reason="no activation sheet fits")])
    with pytest.raises(SelectionError, match="s_mbu_paper: no activation sheet fits"):
        drawn("s-mbu-batch", tmp_path)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", [*TRACED, "sparsity-traced", "s-mbu-batch"])
def test_files_hold_the_frame_the_conditions_and_the_sentence(dataset: Path, name: str) -> None:
    figure, frame = drawn(name, dataset)
    write_figure(figure, frame, dataset / "x.csv")
    assert pl.read_csv(dataset / "x.csv", schema=frame.schema).equals(frame)
    page = " ".join(texts(figure, frame, dataset))
    assert figure.title in page
    assert figure.insight(frame) in page
    assert "vllm 0.32.0 on 1 × x86 CPU" in page
    assert "even-moe" in page
    for suffix in ("png", "html"):
        write_figure(figure, frame, dataset / f"x.{suffix}")
    assert (dataset / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.lengthy
def test_predictions_are_labelled(tmp_path: Path) -> None:
    write(tmp_path, [record("a", measured=False, engine="roofline")])
    write(tmp_path, probed("a", routed("uniform")), table="activations")
    for name in ("imbalance", "routing-cost"):
        figure, frame = drawn(name, tmp_path)
        assert "Predicted by a model (roofline), not measured" in str(figure.chart(frame).to_dict())


def test_on_the_command_line(dataset: Path) -> None:
    run = CliRunner().invoke
    out = dataset / "x.csv"
    result = run(main, ["figure", "fig15", str(dataset), "-o", str(out)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "even-moe: in prefill" in result.stdout
    assert pl.read_csv(out).height == 2 * 2 * len(LAYERS) * EXPERTS
    table = run(main, ["table", str(dataset), "--figure", "imbalance", "--only", "model=steep-moe"])
    assert table.exit_code == 0
    assert "steep-moe, decode" in table.stdout and "even-moe" not in table.stdout
    none = run(main, ["figure", "imbalance", "-o", str(out)])
    assert none.exit_code == 2 and "name a DATASET" in none.stderr
