"""Peak bandwidth against power of the devices, with what models need of it.

MoE-CAP §4.3 (its bandwidth and power map): two horizontal lines per model, one for the
experts of a single token and one for all experts, under a limit on the time per output
token (Eq 7). A device above a line is fast enough; whether the model fits into its memory
is another question, which `python -m analysis plan` answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.figures.figure import CatalogueFigure, Pivot
from analysis.keys import enumeration
from analysis.listings import number
from analysis.options import Options
from analysis.planner import S_MBU, decode_cost
from analysis.structures import listed, structure

if TYPE_CHECKING:
    import altair as alt

_TITLE = "Peak bandwidth against power, and what models need"
ONE, ALL = "batch 1", "every expert"
_CLAIM = ("deepseek-r1", "rtx-4090")
"""What the paper calls feasible at batch 1, where its own requirement is 1,040 GB/s."""


def prepare(options: Options) -> pl.DataFrame:
    """A row per device and two per model.

    `kind` (device, model), `name`, `activation` (of models: how many experts),
    `bandwidth_gb_s` (a device's peak; what a model needs, practical), `read_gb` (of models:
    weights and cache per token), `power_w`, `verified`, and the options it holds for.
    """
    assert options.tpot_s and options.s_mbu and options.dtype is not None
    context = options.context or 0
    rows: list[dict[str, Any]] = [
        {
            "kind": "device",
            "name": device.name,
            "bandwidth_gb_s": device.bandwidth_gb_s,
            "power_w": device.power_w,
            "verified": device.verified,
        }
        for device in listed(options.devices)
    ]
    for name in options.models:
        of = structure(name, options.dtype)
        for activation in (ONE, ALL):
            read = decode_cost(of, 1, context, every=activation == ALL).read_bytes
            rows.append(
                {
                    "kind": "model",
                    "name": of.name,
                    "activation": activation,
                    "dtype": of.dtype,
                    "bandwidth_gb_s": read / options.tpot_s / options.s_mbu / 1e9,
                    "read_gb": read / 1e9,
                }
            )
    frame = pl.DataFrame(rows, schema=_SCHEMA)
    return frame.with_columns(
        tpot_s=pl.lit(options.tpot_s), s_mbu=pl.lit(options.s_mbu), context_tokens=pl.lit(context)
    )


_SCHEMA = {
    "kind": pl.String,
    "name": pl.String,
    "activation": pl.String,
    "dtype": pl.String,
    "bandwidth_gb_s": pl.Float64,
    "read_gb": pl.Float64,
    "power_w": pl.Float64,
    "verified": pl.Boolean,
}


def pivots(frame: pl.DataFrame) -> list[Pivot]:
    """What models need, and what devices have."""
    needs = frame.filter(pl.col("kind") == "model")
    have = frame.filter(pl.col("kind") == "device").sort("bandwidth_gb_s", "name")
    models = needs.get_column("name").unique(maintain_order=True).to_list()
    figures = {
        (row["name"], row["activation"]): f"{row['bandwidth_gb_s']:,.0f}"
        for row in needs.iter_rows(named=True)
    }
    return [
        Pivot(
            title=f"Needed within {frame['tpot_s'][0]:g} s per token, GB/s",
            corner="model",
            columns=(ONE, ALL),
            rows=tuple((name, figures[name, ONE], figures[name, ALL]) for name in models),
        ),
        Pivot(
            title="Devices",
            corner="device",
            columns=("GB/s", "W"),
            rows=tuple(
                (row["name"], number(row["bandwidth_gb_s"]), number(row["power_w"]))
                for row in have.iter_rows(named=True)
            ),
        ),
    ]


def insight(frame: pl.DataFrame) -> str:
    """Who has the bandwidth for one token's experts and for all, with the least power."""
    devices = frame.filter(pl.col("kind") == "device")
    needs = frame.filter(pl.col("kind") == "model")
    sentences = []
    for name in needs.get_column("name").unique(maintain_order=True):
        rows = {
            row["activation"]: row for row in needs.iter_rows(named=True) if row["name"] == name
        }
        clauses = [
            f"{rows[one]['bandwidth_gb_s']:,.0f} GB/s {words} ({_who(devices, rows[one])})"
            for one, words in ((ONE, "at batch 1"), (ALL, "once every expert is active"))
        ]
        sentences.append(f"{name} ({rows[ONE]['dtype']}) needs {enumeration(clauses)}.")
    if claim := _claim(frame):
        sentences.append(claim)
    if unplaced := devices.filter(pl.col("power_w").is_null()).get_column("name").to_list():
        has = "has" if len(unplaced) == 1 else "have"
        sentences.append(
            f"{enumeration(unplaced)} {has} no known power, so no place in the picture."
        )
    sentences.append(
        f"Computed from structure and data sheets, not measured: {conditions(frame)}; bandwidth "
        "alone, whether or not the memory holds the model."
    )
    return " ".join(sentences)


def conditions(frame: pl.DataFrame) -> str:
    """`0.1 s per token, S-MBU 0.71, no KV cache`."""
    tokens = frame.get_column("context_tokens")[0]
    cache = f"KV cache of {tokens:,} tokens" if tokens else "no KV cache"
    return f"{frame['tpot_s'][0]:g} s per token, S-MBU {frame['s_mbu'][0]:g}, {cache}"


def _who(devices: pl.DataFrame, need: dict[str, Any]) -> str:
    enough = devices.filter(pl.col("bandwidth_gb_s") >= need["bandwidth_gb_s"])
    if enough.is_empty():
        best = devices.sort("bandwidth_gb_s").row(-1, named=True) if len(devices) else None
        return f"none has it, {best['name']} has most" if best else "no device to compare"
    powered = enough.drop_nulls("power_w").sort("power_w", "name")
    least = powered.row(0, named=True) if len(powered) else None
    watts = f" at {least['power_w']:,.0f} W" if least else ""
    if len(enough) == 1:
        return f"of {len(devices)} devices only {enough['name'][0]}{watts}"
    count = f"{len(enough)} of {len(devices)} devices"
    return f"{count}, with the least power {least['name']}{watts}" if least else count


def _claim(frame: pl.DataFrame) -> str:
    """Whether the device that the paper names for DeepSeek-R1 at batch 1 has the bandwidth."""
    model, device = _CLAIM
    need = frame.filter((pl.col("name") == model) & (pl.col("activation") == ONE))
    has = frame.filter((pl.col("name") == device) & (pl.col("kind") == "device"))
    if need.is_empty() or has.is_empty():
        return ""
    ratio = has["bandwidth_gb_s"][0] / need["bandwidth_gb_s"][0]
    peak = f"The {device}, which the paper calls enough for {model} at batch 1, has"
    if ratio >= 1:
        return f"{peak} {has['bandwidth_gb_s'][0]:,.0f} GB/s, and so it is."
    return f"{peak} {has['bandwidth_gb_s'][0]:,.0f} GB/s: {100 * ratio:.0f} % of the need."


def _chart(frame: pl.DataFrame) -> alt.TopLevelMixin:
    from analysis.figures.power_chart import draw  # altair is slow to import

    return draw(frame, title=_TITLE, conditions=conditions(frame), insight=insight(frame))


POWER = CatalogueFigure(
    name="bandwidth-power",
    aliases=("cap-fig4",),
    title=_TITLE,
    paper="MoE-CAP, Figure 4, called 7 in its text",
    takes=("models", "devices", "tpot_s", "s_mbu", "dtype", "context"),
    defaults=Options(
        models=("deepseek-r1", "mixtral-8x7b", "moonlight-16b-a3b"),
        tpot_s=0.1,
        s_mbu=S_MBU,
        dtype="bf16",
        context=0,
    ),
    prepare=prepare,
    chart=_chart,
    pivots=pivots,
    insight=insight,
)
