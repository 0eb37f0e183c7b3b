"""The figures by name."""

from __future__ import annotations

from analysis.errors import SelectionError, unknown
from analysis.figures.drift import DRIFT
from analysis.figures.figure import Figure
from analysis.figures.heatmap import HEATMAP
from analysis.figures.imbalance import IMBALANCE, ROUTING_COST
from analysis.figures.latency import LATENCY
from analysis.figures.layer_bytes import LAYER_BYTES
from analysis.figures.layers import LAYERS
from analysis.figures.mbu import S_MBU_BATCH
from analysis.figures.parallelism import PARALLELISM
from analysis.figures.power import POWER
from analysis.figures.pruning import PRUNING
from analysis.figures.quantization import QUANTIZATION, QUANTIZATION_LENGTH
from analysis.figures.scaling import scaling
from analysis.figures.sparsity import SPARSITY
from analysis.figures.sparsity_traced import SPARSITY_TRACED
from analysis.figures.speculative import SPECULATIVE, SPECULATIVE_LENGTH
from analysis.growth import across_lines, advantage, along_x, at_ends
from analysis.insights import absent, memory_boundary, overall, per_panel
from analysis.keys import BATCH, FFN_DIM, LENGTH, MODEL, MOE_PATH, NUM_EXPERTS, TOP_K, Axes

FIGURES: tuple[Figure, ...] = (
    scaling(
        name="hparam-ffn",
        aliases=("fig7",),
        title="Throughput against FFN dimension",
        paper="MoE-Inference-Bench, Figure 7",
        axes=Axes(x=FFN_DIM, panel=NUM_EXPERTS, line=TOP_K),
        parts=(overall, absent),
    ),
    scaling(
        name="hparam-experts",
        aliases=("fig8",),
        title="Throughput against number of experts",
        paper="MoE-Inference-Bench, Figure 8",
        axes=Axes(x=NUM_EXPERTS, panel=FFN_DIM, line=TOP_K),
        parts=(per_panel, memory_boundary, absent),
    ),
    scaling(
        name="hparam-topk",
        aliases=("fig9",),
        title="Throughput against number of active experts",
        paper="MoE-Inference-Bench, Figure 9",
        axes=Axes(x=TOP_K, panel=FFN_DIM, line=NUM_EXPERTS),
        parts=(per_panel, absent),
    ),
    LATENCY,
    scaling(
        name="topk-batch",
        aliases=("fig5",),
        title="Throughput against active experts, by batch size",
        paper="MoE-Inference-Bench, Figure 5",
        axes=Axes(x=TOP_K, panel=MODEL, line=BATCH),
        parts=(per_panel, at_ends, across_lines, absent),
    ),
    scaling(
        name="batch-length",
        aliases=("fig6",),
        title="Throughput against batch size, by length",
        paper="MoE-Inference-Bench, Figure 6",
        axes=Axes(x=BATCH, panel=MODEL, line=LENGTH),
        parts=(along_x, across_lines, absent),
    ),
    PARALLELISM,
    scaling(
        name="fused-moe",
        aliases=("fig14",),
        title="Throughput with fused and unfused experts, by batch size",
        paper="MoE-Inference-Bench, Figure 14 (a)",
        axes=Axes(x=BATCH, panel=LENGTH, line=MOE_PATH),
        parts=(advantage, absent),
    ),
    scaling(
        name="fused-moe-length",
        aliases=("fig14b",),
        title="Throughput with fused and unfused experts, by length",
        paper="MoE-Inference-Bench, Figure 14 (b)",
        axes=Axes(x=LENGTH, panel=BATCH, line=MOE_PATH),
        parts=(advantage, absent),
    ),
    LAYERS,
    POWER,
    SPARSITY,
    SPARSITY_TRACED,
    S_MBU_BATCH,
    LAYER_BYTES,
    HEATMAP,
    IMBALANCE,
    ROUTING_COST,
    PRUNING,
    QUANTIZATION,
    QUANTIZATION_LENGTH,
    SPECULATIVE,
    SPECULATIVE_LENGTH,
    DRIFT,
)


def find(name: str) -> Figure:
    """The figure of that name or alias.

    Raises:
        SelectionError: where there is none; the message has the nearest name.
    """
    known = {word: figure for figure in FIGURES for word in (figure.name, *figure.aliases)}
    if name not in known:
        raise SelectionError(unknown("figure", name, known))
    return known[name]
