"""How much of a model a batch activates, and what bandwidth that asks for.

MoE-CAP §4.3 (its sparsity figure) traces routers; here the expectation under uniform
routing stands in, E·(1 - (1 - k/E)^B) of E experts for B tokens with k choices. That is an
upper bound for independent tokens: real routers have favourites, so a batch touches fewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.errors import OptionError
from analysis.figures.figure import CatalogueFigure, Pivot
from analysis.figures.power import conditions
from analysis.keys import enumeration
from analysis.options import Options
from analysis.planner import S_MBU, decode_cost, memory_gb
from analysis.structures import Structure, listed, structure

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Parameters that a batch activates, and the bandwidth that they need"
_MODEL, _DEVICE, _PAPER = "model", "device", "paper"

TRACED_BATCH = 8
TRACED = {"deepseek-v2-lite": 0.5305, "qwen1.5-moe-a2.7b": 0.4679, "deepseek-r1": 0.1844}
"""Shares that MoE-CAP §4.3 traced at that batch, on the MATH data set."""
CLAIMED_TPOT_S = 0.25
CLAIMED = {"m3-max": 32, "agx-orin-64gb": 16, "orin-nx-16gb": 4}
"""Largest batch at which MoE-CAP §4.3 finds that each serves DeepSeek-V2-Lite in that time."""
_CLAIMED_MODEL = "deepseek-v2-lite"


def activated_share(of: Structure, batch: int) -> float:
    """Parameters that a decode pass of `batch` sequences uses, over all of them, 0 to 1.

    Both as MoE-CAP Eq 4 counts: attention, experts, shared experts and dense FFNs. `of` has
    to be stored without quantisation, so that bytes stand for parameters.
    """
    assert of.precision.scheme is None
    some = decode_cost(of, batch, 0).active_bytes_paper
    return some / decode_cost(of, batch, 0, every=True).active_bytes_paper


def prepare(options: Options) -> pl.DataFrame:
    """A row per model and batch, one per device, one per share that the paper traced.

    `kind` (model, device, paper), `name`, `batch`, `share` (of the parameters, 0 to 1),
    `read_gb` (weights and cache per pass), `bandwidth_gb_s` (of a model what it needs,
    practical; of a device its peak), `memory_gb` (of a model its weights; of a device all),
    and the options that it holds for.
    """
    assert options.tpot_s and options.s_mbu and options.dtype is not None
    context = options.context or 0
    rows: list[dict[str, Any]] = []
    for name in options.models:
        plain, of = structure(name, "bf16"), structure(name, options.dtype)
        if plain.architecture.moe is None:
            raise OptionError(f"model {name} is dense: every batch activates all of it")
        for batch in sorted(set(options.batches)):
            read = decode_cost(of, batch, context).read_bytes
            rows.append(
                {
                    "kind": _MODEL,
                    "name": of.name,
                    "dtype": of.dtype,
                    "batch": batch,
                    "share": activated_share(plain, batch),
                    "read_gb": read / 1e9,
                    "bandwidth_gb_s": read / options.tpot_s / options.s_mbu / 1e9,
                    "memory_gb": memory_gb(of),
                }
            )
        if of.name in TRACED and TRACED_BATCH in options.batches:
            rows.append(
                {
                    "kind": _PAPER,
                    "name": of.name,
                    "batch": TRACED_BATCH,
                    "share": TRACED[of.name],
                }
            )
    rows += [
        {
            "kind": _DEVICE,
            "name": device.name,
            "bandwidth_gb_s": device.bandwidth_gb_s,
            "memory_gb": device.memory_gib * 2**30 / 1e9,
        }
        for device in listed(options.devices)
    ]
    return pl.DataFrame(rows, schema=_SCHEMA).with_columns(
        tpot_s=pl.lit(options.tpot_s), s_mbu=pl.lit(options.s_mbu), context_tokens=pl.lit(context)
    )


_SCHEMA = {
    "kind": pl.String,
    "name": pl.String,
    "dtype": pl.String,
    "batch": pl.Int64,
    "share": pl.Float64,
    "read_gb": pl.Float64,
    "bandwidth_gb_s": pl.Float64,
    "memory_gb": pl.Float64,
}


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """Shares and bandwidths with a column per batch; the batch up to which a device does."""
    rows = frame.filter(pl.col("kind") == _MODEL)
    batches = rows.get_column("batch").unique().sort().to_list()
    models = _names(frame, _MODEL)

    def cells(column: str, form: str) -> tuple[tuple[str, ...], ...]:
        found = {
            (name, batch): value
            for name, batch, value in rows.select("name", "batch", column).iter_rows()
        }
        return tuple(
            (name, *(form.format(found[name, batch]) for batch in batches)) for name in models
        )

    columns = tuple(str(batch) for batch in batches)
    reach = _reach(frame)
    return [
        Pivot(
            title="Share of parameters activated, uniform routing (an upper bound)",
            corner="batch",
            columns=columns,
            rows=cells("share", "{:.2%}"),
        ),
        Pivot(
            title=f"Bandwidth needed, GB/s: {conditions(frame)}",
            corner="batch",
            columns=columns,
            rows=cells("bandwidth_gb_s", "{:,.0f}"),
        ),
        Pivot(
            title="Largest batch of these with enough bandwidth",
            corner="device",
            columns=tuple(models),
            rows=tuple(
                (device, *(str(reach[device, model] or "–") for model in models))
                for device in _names(frame, _DEVICE)
            ),
        ),
    ]


def insight(frame: pl.DataFrame) -> str:
    """Shares at one batch beside the paper's, who meets the bandwidth, and who the memory."""
    sentences = [_shares(frame), _traced(frame), *_devices(frame), _claims(frame)]
    sentences.append(
        "Computed from structure and data sheets, not measured; uniform routing is an upper "
        f"bound for independent tokens; {conditions(frame)}."
    )
    return " ".join(filter(None, sentences))


def _shares(frame: pl.DataFrame) -> str:
    rows = frame.filter(pl.col("kind") == _MODEL)
    batches = rows.get_column("batch").unique().sort().to_list()
    batch = TRACED_BATCH if TRACED_BATCH in batches else batches[len(batches) // 2]
    shares = rows.filter(pl.col("batch") == batch).select("name", "share").iter_rows()
    words = [f"{100 * share:.2f} % of {name}" for name, share in shares]
    return f"At batch {batch} uniform routing activates {enumeration(words)}."


def _traced(frame: pl.DataFrame) -> str:
    """The paper's traced shares, and how far above them uniform routing lies."""
    paper = frame.filter(pl.col("kind") == _PAPER).select("name", "batch", traced="share")
    both = paper.join(
        frame.filter(pl.col("kind") == _MODEL), on=["name", "batch"], maintain_order="left"
    ).with_columns(above=pl.col("share") - pl.col("traced"))
    if both.is_empty():
        return ""
    words = [
        f"{100 * traced:.2f} % of {name} ({100 * above:+.1f})"
        for name, traced, above in both.select("name", "traced", "above").iter_rows()
    ]
    least = both.get_column("above").min()
    verdict = (
        "so it bounds them" if isinstance(least, float) and least >= 0 else "so it is no bound"
    )
    return (
        f"The paper traced {enumeration(words)}; in brackets how many points uniform routing "
        f"lies above, {verdict}."
    )


def _devices(frame: pl.DataFrame) -> list[str]:
    """Up to which batch each device has the bandwidth, and whose weights it cannot hold."""
    reach = _reach(frame)
    room = {
        (kind, name): size
        for kind, name, size in frame.select("kind", "name", "memory_gb").iter_rows()
    }
    largest = frame.get_column("batch").max()
    sentences = []
    for device in _names(frame, _DEVICE):
        places: dict[str, list[str]] = {}
        for model in _names(frame, _MODEL):
            batch = reach[device, model]
            upto = "at every batch" if batch == largest else f"up to batch {batch}"
            fits = room[_MODEL, model] <= room[_DEVICE, device]
            if batch is None:
                places.setdefault("at no batch", []).append(model)
            else:
                note = "" if fits else " (whose weights do not fit)"
                places.setdefault(upto, []).append(f"{model}{note}")
        words = [f"for {enumeration(models)} {upto}" for upto, models in places.items()]
        sentences.append(f"{device} has the bandwidth {enumeration(words)}.")
    return sentences


def _claims(frame: pl.DataFrame) -> str:
    """Whether the batches that the paper names for three devices come out here too."""
    if frame["tpot_s"][0] != CLAIMED_TPOT_S or _CLAIMED_MODEL not in _names(frame, _MODEL):
        return ""
    reach = _reach(frame)
    drawn = set(frame.get_column("batch").drop_nulls())
    words = []
    for device, claimed in CLAIMED.items():
        if (device, _CLAIMED_MODEL) not in reach or claimed not in drawn:
            continue
        found = reach[device, _CLAIMED_MODEL]
        if found == claimed:
            verdict = "as here"
        else:
            verdict = f"here {'none' if found is None else 'all' if found == max(drawn) else found}"
        words.append(f"{device} {claimed} ({verdict})")
    if not words:
        return ""
    return f"The paper names as largest batches for {_CLAIMED_MODEL}: {enumeration(words)}."


def _reach(frame: pl.DataFrame) -> dict[tuple[str, str], int | None]:
    """By (device, model): the largest batch drawn that it has the bandwidth for."""
    needs = frame.filter(pl.col("kind") == _MODEL)
    found: dict[tuple[str, str], int | None] = {}
    for device, peak in (
        frame.filter(pl.col("kind") == _DEVICE).select("name", "bandwidth_gb_s").iter_rows()
    ):
        for model in _names(frame, _MODEL):
            met = needs.filter((pl.col("name") == model) & (pl.col("bandwidth_gb_s") <= peak))
            best = met.get_column("batch").max()
            found[device, model] = best if isinstance(best, int) else None
    return found


def _names(frame: pl.DataFrame, kind: str) -> list[str]:
    rows = frame.filter(pl.col("kind") == kind)
    return rows.get_column("name").unique(maintain_order=True).to_list()


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.sparsity_chart import draw  # altair is slow to import

    return draw(frame, title=_TITLE, conditions=conditions(frame), insight=insight(frame))


SPARSITY = CatalogueFigure(
    name="sparsity",
    aliases=("cap-fig5", "cap-fig6"),
    title=_TITLE,
    paper="MoE-CAP, Figures 5 and 6",
    takes=("models", "devices", "batches", "tpot_s", "s_mbu", "dtype", "context"),
    defaults=Options(
        models=tuple(TRACED),
        devices=tuple(CLAIMED),
        batches=tuple(2**power for power in range(10)),
        tpot_s=CLAIMED_TPOT_S,
        s_mbu=S_MBU,
        dtype="bf16",
        context=0,
    ),
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
