"""Which experts ran, layer by layer: MoE-Inference-Bench's activation maps.

The paper's Figure 15 shows counts, which grow with the length of the run and the number of
choices. Here the colour is the share of tokens that chose an expert over the share that it
would have if all were equal (k of E), so that models, data sets and phases compare. Prefill
and decode stand apart: they see other tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from analysis.figures.figure import Pivot, TracedFigure
from analysis.keys import enumeration
from analysis.traces import PHASES, SHOWN, counts, shares

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
        (str(name), float(peak))
        for name, peak in frame.drop_nulls("times_even")
        .group_by("series", maintain_order=True)
        .agg(pl.col("times_even").max())
        .iter_rows()
    ]
    if len(peaks) > 1:
        peaks.sort(key=lambda one: one[1])
        sentences.append(
            f"Most even at its peak is {peaks[0][0]} ({peaks[0][1]:.1f} times an even share), "
            f"least {peaks[-1][0]} ({peaks[-1][1]:.1f} times)."
        )
    return " ".join(sentences)


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
        f"tokens, {top['times_even']:.1f} times its even share",
        f"{hot:,} of {len(used):,} take at least {_HOT:g} times it"
        if hot
        else f"none takes {_HOT:g} times it",
        f"{unused:,} never ran" if unused else "all ran",
    ]
    return f"in {phase} ({tokens // top['top_k']:,} tokens) {enumeration(facts)}"


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.heatmap_chart import draw  # altair is slow to import

    return draw(frame, title=_TITLE, insight=insight(frame))


HEATMAP = TracedFigure(
    name="activation-heatmap",
    aliases=("fig15",),
    title=_TITLE,
    paper="MoE-Inference-Bench, Figure 15",
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
