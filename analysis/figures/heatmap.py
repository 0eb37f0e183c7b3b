"""Which experts ran, layer by layer: MoE-Inference-Bench's activation maps.

The paper's Figure 15 shows counts, which grow with the length of the run and the number of
choices. Here the colour is the share of tokens that chose an expert over the share that it
would have if all were equal (k of E), so that models, data sets and phases compare. Prefill
and decode stand apart: they see other tokens.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from analysis.figures.figure import Pivot, RecordsFigure
from analysis.keys import enumeration
from analysis.marks import COLUMNS as MARKED
from analysis.traces import PHASES, SHOWN, VARIED, counts, shares
from workers.moe.activation import chance, distance

if TYPE_CHECKING:
    import altair as alt

_TITLE = "How often each expert is chosen"
_HOT = 2.0
"""Times its even share from which the sentence calls an expert hot."""


def prepare(records: pl.LazyFrame, activations: pl.LazyFrame) -> pl.DataFrame:
    """A row per series, phase, MoE layer and expert.

    `tokens` (that chose the expert), `share` (of the layer's tokens), `times_even` (over
    k/E), and the conditions of the trial.

    Raises:
        SelectionError: see `analysis.traces.counts`.
    """
    frame = shares(counts(records, activations))
    return frame.select(
        "series",
        "phase",
        "layer",
        "expert",
        "tokens",
        "share",
        "times_even",
        *SHOWN,
        "devices_label",
        "memory_limit_gib",
        *MARKED,
        "trial_id",
    )


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """Per series and phase: of each layer the busiest experts and the share of unused ones."""
    tables = []
    for (name, phase), one in frame.group_by("series", "phase", maintain_order=True):
        rows = []
        for (layer,), cells in one.group_by("layer", maintain_order=True):
            first = cells.sort("times_even", descending=True, nulls_last=True).row(0, named=True)
            unused = int((cells.get_column("tokens") == 0).sum())
            if first["times_even"] is None:
                rows.append((f"layer {layer}", "–", "–", "–", str(unused)))
                continue
            rows.append(
                (
                    f"layer {layer}",
                    str(first["expert"]),
                    f"{first['share']:.1%}",
                    f"{first['times_even']:.2f}",
                    str(unused),
                )
            )
        tables.append(
            Pivot(
                title=f"{name}, {phase}",
                corner="layer",
                columns=("busiest expert", "share of tokens", "times even", "unused experts"),
                rows=tuple(rows),
            )
        )
    return tables


def insight(frame: pl.DataFrame) -> str:
    """The busiest expert of each series, how many are hot, how many never ran."""
    sentences = []
    for (name,), one in frame.group_by("series", maintain_order=True):
        words = [_phase(phase, one.filter(pl.col("phase") == phase)) for phase in PHASES]
        if found := list(filter(None, words)):
            sentences.append(f"{name}: {'; '.join(found)}.")
    peaks = [
        (str(name), round(float(peak), 1))
        for name, peak in frame.drop_nulls("times_even")
        .group_by("series", maintain_order=True)
        .agg(pl.col("times_even").max())
        .iter_rows()
    ]
    sentences += _data_sets(frame)
    if len(peaks) > 1 and peaks[0][1] < peaks[-1][1]:
        peaks.sort(key=lambda one: one[1])
        sentences.append(
            f"Most even at its peak is {peaks[0][0]} ({peaks[0][1]:.1f} times an even share), "
            f"least {peaks[-1][0]} ({peaks[-1][1]:.1f} times)."
        )
    return " ".join(sentences) or "No layer saw a token."


def _data_sets(frame: pl.DataFrame) -> list[str]:
    """How far apart the choices on two data sets are, for each model with several.

    Of the two furthest apart: the total-variation distance of their shares of choices in the
    median layer, what chance alone would give independent tokens, and the expert that they
    disagree on most. In prefill, whose tokens are those of the text, where it was counted.
    """
    others = [name for name in VARIED if name != "dataset"]
    sentences = []
    for _, one in frame.group_by(others, maintain_order=True):
        phases = set(one.get_column("phase"))
        phase = next((name for name in PHASES if name in phases), "")
        cells = one.filter(pl.col("phase") == phase)
        names = cells.get_column("dataset").unique(maintain_order=True).to_list()
        if len(names) < 2:
            continue
        found = max(
            (_apart(cells, first, second) for first, second in combinations(names, 2)),
            key=lambda pair: pair[0],
        )
        distance, by_chance, first, second, row = found
        sentences.append(
            f"{cells.get_column('model')[0]}, {phase}: choices on {_data(first)} and "
            f"{_data(second)} differ by a total variation of {distance:.3f} in the median layer "
            f"({by_chance:.3f} by chance"
            + (", the furthest of " + str(len(names)) + " data sets" if len(names) > 2 else "")
            + f"), most in expert {row['expert']} of layer {row['layer']}, which "
            f"{100 * row['share']:.1f} and {100 * row['share_right']:.1f} % of their tokens choose."
        )
    return sentences


def _apart(
    cells: pl.DataFrame, first: str | None, second: str | None
) -> tuple[float, float, str | None, str | None, dict[str, Any]]:
    """Distance in the median layer, that of chance, and the cell with the largest gap."""
    one, other = (
        cells.filter(pl.col("dataset").eq_missing(name)).sort("layer", "expert")
        for name in (first, second)
    )
    layers, top_k = one.get_column("layer").n_unique(), int(one.get_column("top_k")[0])
    counted = [each.get_column("tokens").to_numpy().reshape(layers, -1) for each in (one, other)]
    gap = (pl.col("share") - pl.col("share_right")).abs()
    widest = one.join(other, on=["layer", "expert"]).sort(gap, nulls_last=False).row(-1, named=True)
    apart, noise = distance(*counted), chance(counted[0], counted[1], top_k)
    return float(np.nanmedian(apart)), float(np.nanmedian(noise)), first, second, widest


def _data(name: str | None) -> str:
    return name or "random ids"


def _phase(phase: str, cells: pl.DataFrame) -> str:
    used = cells.drop_nulls("times_even")
    if used.is_empty():
        return ""
    top = used.sort("times_even", descending=True).row(0, named=True)
    hot = int((used.get_column("times_even") >= _HOT).sum())
    unused = int((used.get_column("tokens") == 0).sum())
    tokens = used.group_by("layer").agg(pl.col("tokens").sum()).get_column("tokens").max()
    assert isinstance(tokens, int)
    facts = [
        f"expert {top['expert']} of layer {top['layer']} takes {100 * top['share']:.1f} % of "
        f"tokens, {top['times_even']:.1f} times its even share"
    ]
    if top["num_experts"] > _HOT * top["top_k"]:  # with fewer, none can
        facts.append(
            f"{hot:,} of {len(used):,} take at least {_HOT:g} times it"
            if hot
            else f"none takes {_HOT:g} times it"
        )
    facts.append(f"{unused:,} never ran" if unused else "all ran")
    return f"in {phase} ({tokens // top['top_k']:,} tokens) {enumeration(facts)}"


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.heatmap_chart import draw  # altair is slow to import

    return draw(frame, title=_TITLE, insight=insight(frame))


HEATMAP = RecordsFigure(
    name="activation-heatmap",
    aliases=("fig15",),
    title=_TITLE,
    paper="MoE-Inference-Bench, Figure 15",
    beside=("activations",),
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
