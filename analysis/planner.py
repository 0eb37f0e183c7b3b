"""What a model needs of the hardware to answer in time, and which devices have it.

MoE-CAP A.7: a decode pass must read its weights and cache, and do its arithmetic, within one
time per output token. That is the theoretical bandwidth and compute; no engine reaches a
peak, so the practical requirement divides by the share that engines do reach (Eq 7, 8).

Bytes and FLOPs are those of `workers.moe.accounting`. Which experts a batch activates is
the expectation under uniform routing, an upper bound for independent tokens. Transfers
between devices, activations and what an engine keeps for itself are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.options import Options
from analysis.structures import Structure
from workers.contract.errors import Infeasible
from workers.contract.layout import Layout
from workers.hardware.device import Device
from workers.moe.accounting import Cost, decode, forward, kv_cache_bytes, weight_bytes
from workers.moe.architecture import check
from workers.moe.structure import Architecture

COUNTS = (1, 2, 4, 8)
"""Devices of one node that can share a model: tensor degrees."""

S_MBU, S_MFU = 0.71, 0.4
"""Shares of peaks that are assumed where nobody measured them. 0.71 is the one constant that
gives both of MoE-CAP's figures for DeepSeek-R1 (18,901 and 1,040 GB/s at 0.1 s per token in
bf16); for compute the paper states none, and decoding seldom depends on it."""

DEFAULTS = Options(batches=(1,), tpot_s=0.1, context=2048, dtype="auto", s_mbu=S_MBU, s_mfu=S_MFU)
"""What a plan assumes where nothing is asked."""

Bound = Literal["memory", "bandwidth", "compute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What is to be delivered, and how much of a peak counts."""

    batch: int
    """Sequences decoded together."""
    context: int
    """Tokens cached of each sequence when the pass begins."""
    tpot_s: float
    """Longest time of one decode pass, seconds."""
    s_mbu: float = S_MBU
    s_mfu: float = S_MFU

    def practical_gb_s(self, read_bytes: float) -> float:
        """Peak bandwidth needed to read so much per pass (Eq 7), 10⁹ bytes per second."""
        return read_bytes / self.tpot_s / self.s_mbu / 1e9

    def practical_tflops(self, flops: float) -> float:
        """Dense peak needed for so much arithmetic per pass (Eq 8), 10¹² per second."""
        return flops / self.tpot_s / self.s_mfu / 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """What a model needs for a service, on one device or on each of several."""

    service: Service
    weight_bytes: float
    """Weights read per decode pass."""
    kv_bytes: float
    """Cache read per decode pass."""
    flops: float
    """Arithmetic of a decode pass."""
    resident_bytes: int
    """Weights held."""
    cache_bytes: int
    """Cache held when the pass has ended."""

    @property
    def bandwidth_gb_s(self) -> float:
        """Theoretical bandwidth: weights and cache once per output token."""
        return (self.weight_bytes + self.kv_bytes) / self.service.tpot_s / 1e9

    @property
    def practical_bandwidth_gb_s(self) -> float:
        """Peak bandwidth that a device needs (Eq 7)."""
        return self.service.practical_gb_s(self.weight_bytes + self.kv_bytes)

    @property
    def tflops(self) -> float:
        """Theoretical compute."""
        return self.flops / self.service.tpot_s / 1e12

    @property
    def practical_tflops(self) -> float:
        """Dense peak that a device needs (Eq 8)."""
        return self.service.practical_tflops(self.flops)

    @property
    def memory_bytes(self) -> int:
        """Weights and cache."""
        return self.resident_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """So many of one device, which together meet a requirement."""

    device: Device
    count: int
    each: Requirement
    """What every one of them must do, its copies of shared weights included."""
    loads: dict[Bound, float]
    """Need over supply of each of them, 0 to 1."""

    @property
    def bound(self) -> Bound:
        """What is nearest to its limit."""
        return max(self.loads, key=lambda bound: self.loads[bound])

    @property
    def power_w(self) -> float | None:
        """Of all, watts; null where it is not known."""
        return None if self.device.power_w is None else self.count * self.device.power_w

    @property
    def price_usd(self) -> float | None:
        """Of all, US dollars; null where it is not known."""
        return None if self.device.price_usd is None else self.count * self.device.price_usd


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A requirement, and the devices that meet it."""

    structure: Structure
    need: Requirement
    offers: tuple[Offer, ...]
    """Per device the smallest number that does; least power first, unknown power last."""


def decode_cost(
    of: Structure, batch: int, context: int, *, every: bool = False, layout: Layout | None = None
) -> Cost:
    """Cost of one decode pass on each device; with `every`, all experts are activated."""
    return forward(
        of.architecture,
        of.precision,
        decode(batch, context),
        activated=_all_experts(of.architecture) if every else None,
        layout=layout or Layout(),
    ).total


def memory_gb(of: Structure) -> float:
    """Weights held by one device that holds all of them, 10⁹ bytes."""
    return weight_bytes(of.architecture, of.precision) / 1e9


def requirement(of: Structure, service: Service, layout: Layout | None = None) -> Requirement:
    """What each device of `layout` (default: one device) must do for `service`."""
    layout = layout or Layout()
    cost = decode_cost(of, service.batch, service.context, layout=layout)
    return Requirement(
        service=service,
        weight_bytes=cost.weight_bytes,
        kv_bytes=cost.kv_read_bytes,
        flops=cost.flops,
        resident_bytes=weight_bytes(of.architecture, of.precision, layout),
        cache_bytes=kv_cache_bytes(
            of.architecture, of.precision, service.context + 1, service.batch, layout
        ),
    )


def offer(of: Structure, service: Service, device: Device, most: int) -> Offer | None:
    """The smallest number of `device`, up to `most`, that gives `service`; null if none.

    The model is cut by tensor parallelism. A server, and a device without a link to its
    like, stands alone.
    """
    alone = device.kind == "server" or device.link_gb_s is None
    for count in COUNTS:
        if count > most or (count > 1 and alone):
            break
        layout = Layout(tensor=count)
        try:
            check(of.architecture, layout)
        except Infeasible:
            continue
        each = requirement(of, service, layout)
        loads: dict[Bound, float] = {
            "memory": each.memory_bytes / (device.memory_gib * 2**30),
            "bandwidth": each.practical_bandwidth_gb_s / device.bandwidth_gb_s,
            "compute": each.practical_tflops / device.tflops(of.precision.compute),
        }
        if max(loads.values()) <= 1:
            return Offer(device=device, count=count, each=each, loads=loads)
    return None


def plan(of: Structure, service: Service, devices: Iterable[Device], most: int = 8) -> Plan:
    """What `service` needs, and who among `devices` gives it with at most `most` of a kind."""
    found = (offer(of, service, device, most) for device in devices)
    offers = sorted((one for one in found if one is not None), key=_by_power)
    return Plan(structure=of, need=requirement(of, service), offers=tuple(offers))


def plans(
    structures: Sequence[Structure], options: Options, devices: Sequence[Device], most: int
) -> list[Plan]:
    """A plan per model and batch; `options` has every field that a service needs."""
    assert options.context is not None and options.tpot_s and options.s_mbu and options.s_mfu
    return [
        plan(
            of,
            Service(
                batch=batch,
                context=options.context,
                tpot_s=options.tpot_s,
                s_mbu=options.s_mbu,
                s_mfu=options.s_mfu,
            ),
            devices,
            most,
        )
        for of in structures
        for batch in options.batches
    ]


def plan_facts(one: Plan) -> dict[str, object]:
    """A plan for other programs; sizes in 10⁹ bytes, null where a figure is not known."""
    need, service = one.need, one.need.service
    return {
        "model": one.structure.name,
        "dtype": one.structure.dtype,
        "batch_size": service.batch,
        "context_tokens": service.context,
        "tpot_s": service.tpot_s,
        "s_mbu": service.s_mbu,
        "s_mfu": service.s_mfu,
        "weights_read_gb": need.weight_bytes / 1e9,
        "kv_read_gb": need.kv_bytes / 1e9,
        "required_bandwidth_gb_s": need.bandwidth_gb_s,
        "practical_bandwidth_gb_s": need.practical_bandwidth_gb_s,
        "required_tflops": need.tflops,
        "practical_tflops": need.practical_tflops,
        "weights_gb": need.resident_bytes / 1e9,
        "kv_cache_gb": need.cache_bytes / 1e9,
        "memory_gb": need.memory_bytes / 1e9,
        "measured": False,
        "devices": [
            {
                "name": one.device.name,
                "count": one.count,
                "power_w": one.power_w,
                "price_usd": one.price_usd,
                "bound": one.bound,
                **{f"{bound}_share": load for bound, load in one.loads.items()},
                "verified": one.device.verified,
            }
            for one in one.offers
        ],
    }


def sentence(one: Plan) -> str:
    """What is needed and who has it, in words."""
    need, service = one.need, one.need.service
    kv = need.kv_bytes / (need.weight_bytes + need.kv_bytes)
    needs = (
        f"{one.structure.name} ({one.structure.dtype}) at batch {service.batch} with "
        f"{service.context:,} tokens of context within {service.tpot_s:g} s per token needs "
        f"{need.practical_bandwidth_gb_s:,.0f} GB/s of peak bandwidth "
        f"({100 * kv:.0f} % of it for the KV cache), {_figure(need.practical_tflops)} TFLOP/s and "
        f"{need.memory_bytes / 1e9:,.1f} GB of memory"
    )
    if not one.offers:
        return f"{needs}: no device that was considered has it."
    priced = [one for one in one.offers if one.price_usd is not None]
    powered = [one for one in one.offers if one.power_w is not None]
    best = []
    if powered:
        best.append(f"with the least power {_several(powered[0])} ({powered[0].power_w:,.0f} W)")
    if priced:
        cheapest = min(priced, key=lambda one: one.price_usd or 0.0)
        best.append(f"at the lowest known price {_several(cheapest)} (${cheapest.price_usd:,.0f})")
    found = f"{len(one.offers)} {'device has' if len(one.offers) == 1 else 'devices have'} it"
    return f"{needs}. {found}{': ' if best else ''}{', '.join(best)}."


def _figure(value: float) -> str:
    """One decimal; of small numbers two digits."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _several(one: Offer) -> str:
    return f"{one.count} × {one.device.name}"


def _all_experts(a: Architecture) -> tuple[float, ...]:
    return tuple(float(layer.experts.num) if layer.experts else 0.0 for layer in a.layers)


def _by_power(one: Offer) -> tuple[bool, float, float, str]:
    power, price = one.power_w, one.price_usd
    return (power is None, power or 0.0, price or float("inf"), one.device.name)
