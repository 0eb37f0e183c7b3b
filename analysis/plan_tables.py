"""A plan as tables: what is needed, and who has it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from analysis.listings import number
from analysis.planner import Offer, Plan
from analysis.structures import Structure


def needs_table(plans: Sequence[Plan]) -> Table:
    """One row per model and batch."""
    table = Table(
        title="Needed of one device: in theory, and in practice (divided by S-MBU or S-MFU)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for heading in (
        *("batch", "weights\nGB/pass", "KV\nGB/pass", "theory\nGB/s", "practice\nGB/s"),
        *("theory\nTFLOP/s", "practice\nTFLOP/s", "weights\nGB", "KV\nGB", "memory\nGB"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in plans:
        need = one.need
        figures = (
            *(need.weight_bytes / 1e9, need.kv_bytes / 1e9),
            *(need.bandwidth_gb_s, need.practical_bandwidth_gb_s),
            *(need.tflops, need.practical_tflops),
            *(need.resident_bytes / 1e9, need.cache_bytes / 1e9, need.memory_bytes / 1e9),
        )
        table.add_row(
            f"{one.structure.name} ({one.structure.dtype})",
            str(need.service.batch),
            *(f"{figure:,.4g}" if figure < 1e4 else f"{figure:,.0f}" for figure in figures),
        )
    return table


def offers_table(plans: Sequence[Plan], of: Structure) -> Table | None:
    """Devices that meet the plans of one model: a column per batch, a dash where one does not;
    null where no device meets any."""
    mine = [one for one in plans if one.structure is of]
    found = {offer.device.name: offer.device for one in mine for offer in one.offers}
    if not found:
        return None
    table = Table(
        title=f"{of.name}: smallest number of each device that meets it; last, its tightest limit",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
    )
    table.add_column("device", no_wrap=True)
    table.add_column("W\neach", justify="right")
    table.add_column("USD\neach", justify="right")
    for one in mine:
        table.add_column(f"batch {one.need.service.batch}", no_wrap=True)
    for name, device in found.items():
        cells = [
            next((_cell(offer) for offer in one.offers if offer.device.name == name), "–")
            for one in mine
        ]
        mark = "" if device.verified else " (unverified)"
        table.add_row(f"{name}{mark}", number(device.power_w), number(device.price_usd), *cells)
    return table


def _cell(offer: Offer) -> str:
    """`4 × (memory 73 %)`, with power and price of all where they are known."""
    extras = [
        *([f"{offer.power_w:,.0f} W"] if offer.power_w is not None else []),
        *([f"${offer.price_usd:,.0f}"] if offer.price_usd is not None else []),
        f"{offer.bound} {100 * offer.loads[offer.bound]:.0f} %",
    ]
    return f"{offer.count} × ({', '.join(extras)})"
