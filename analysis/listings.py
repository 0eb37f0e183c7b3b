"""What the catalogues hold, as facts for programs and as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from workers.contract.model import Model
from workers.hardware.device import CPU, Device, provenance
from workers.moe.accounting import weight_bytes
from workers.moe.architecture import catalogue, catalogue_name
from workers.moe.partial import Partial
from workers.moe.precision import precision
from workers.moe.structure import Architecture

_KV_BYTES = 2
"""Of one cached value in bf16."""

Facts = dict[str, Any]


_COUNTED = (
    *("params_total", "params_active", "params_active_no_embedding", "params_vision"),
    *("params_projector", "num_layers", "hidden_size", "ffn_dim", "num_experts", "top_k"),
    *("shared_experts", "expert_params"),
)
"""What a structure says of itself under the same name."""


def model_facts(name: str, a: Architecture | Partial) -> Facts:
    """Dimensions and parameters of a model, and what its weights take as they are stored.

    What does not follow from what is known of it is null, and `note` says why.
    """
    entry = catalogue().get(catalogue_name(name) or "", {})
    told: Facts = {key: getattr(a, key, None) for key in _COUNTED}
    more: Facts
    if isinstance(a, Architecture):
        more = {
            "family": a.family,
            "attention_params_per_layer": a.attention_params,
            "kv_bytes_per_token": a.kv_values_per_token * _KV_BYTES,
            "note": None,
        }
    else:
        more = {
            "family": str(a.config.get("model_type") or "") or None,
            "attention_params_per_layer": None,
            "kv_bytes_per_token": None,
            "note": a.reason,
        }
    return {
        "name": name,
        "hub_id": entry.get("hub_id"),
        **told,
        **more,
        **_storage(name, a),
        "exact": isinstance(a, Architecture),
        "verified": entry.get("verified"),
        "papers": list(entry.get("papers", ())),
    }


def _storage(name: str, a: Architecture | Partial) -> Facts:
    """Weights and cache as the checkpoint stores them; null, with the reason, where that is not
    known."""
    unknown = {"quantization": None, "weight_bytes": None, "kv_cache_dtype": None}
    if isinstance(a, Partial):
        return unknown | {"weight_bytes_reason": a.reason}
    try:
        stored = precision(a, Model(name=name, dtype="auto"))
    except ValueError as error:
        return unknown | {"weight_bytes_reason": str(error)}
    return {
        "quantization": stored.scheme.method if stored.scheme else None,
        "weight_bytes": weight_bytes(a, stored),
        "weight_bytes_reason": None,
        "kv_cache_dtype": stored.kv_dtype,
    }


def stored_line(one: Facts) -> str:
    """The same in a sentence."""
    if one["weight_bytes"] is None:
        return f"Its weights are not counted as stored: {one['weight_bytes_reason']}."
    method = one["quantization"] or "not quantised"
    return f"Weights as stored ({method}): {one['weight_bytes']:,} bytes."


def models_table(facts: Sequence[Facts]) -> Table:
    """One row per model."""
    columns = (
        *("total\nbillion", "active\nbillion", "without\nembed."),
        *("layers", "hidden", "FFN", "experts", "top-k", "shared"),
        *("expert\nmillion", "attention\nmillion\nper layer", "KV bytes\nper token\nbf16"),
    )
    table = _table("model", columns)
    for one in facts:
        table.add_row(
            one["name"] + ("" if one["verified"] is not False else " ?"),
            *(
                _scaled(one[key], 1e9)
                for key in ("params_total", "params_active", "params_active_no_embedding")
            ),
            *(_plain(one[key]) for key in ("num_layers", "hidden_size", "ffn_dim", "num_experts")),
            *(_plain(one[key]) for key in ("top_k", "shared_experts")),
            _scaled(one["expert_params"] or None, 1e6),
            _scaled(one["attention_params_per_layer"], 1e6),
            "–" if one["kv_bytes_per_token"] is None else f"{one['kv_bytes_per_token']:,}",
        )
    return table


def about(name: str, *, whole: bool) -> Iterator[str]:
    """What the papers print otherwise, and with `whole` the entry's source and notes."""
    entry: Mapping[str, Any] = catalogue().get(catalogue_name(name) or "", {})
    if whole and entry:
        yield f"{entry['hub_id']}: {entry['source']}"
    for error in entry.get("papers", ()):
        yield (
            f"{name}: {error['paper']} prints {error['key']} {_short(error['printed'])}, "
            f"the configuration gives {_short(error['true'])}."
        )
    if whole:
        yield from entry.get("notes", ())


def device_facts(one: Device) -> Facts:
    """Figures of a device as the catalogue has them; null where it has none."""
    return {
        "name": one.name,
        "kind": one.kind,
        "bandwidth_gb_s": one.bandwidth_gb_s,
        "bf16_tflops": one.bf16_tflops,
        "fp8_tflops": one.fp8_tflops,
        "fp4_tflops": one.fp4_tflops,
        "int8_tflops": one.int8_tflops,
        "fp32_tflops": one.fp32_tflops,
        "bf16_sparse_tflops": one.bf16_sparse_tflops,
        "fp8_sparse_tflops": one.fp8_sparse_tflops,
        "fp4_sparse_tflops": one.fp4_sparse_tflops,
        "memory_gb": one.memory_gb,
        "power_w": one.power_w,
        "price_usd": one.price_usd,
        "link_gb_s": one.link_gb_s,
        "network_gb_s": one.network_gb_s,
        "verified": one.verified,
        "source": one.source,
        "figures": {
            key: {"source": origin.source, "verified": origin.verified}
            for key, origin in (provenance(one.name) if one.name != CPU else {}).items()
        },
    }


def devices_table(facts: Sequence[Facts]) -> Table:
    """One row per device; sparse peaks in columns of their own."""
    columns = {
        "GB/s": "bandwidth_gb_s",
        "bf16\nTFLOP/s": "bf16_tflops",
        "fp8\nTFLOP/s": "fp8_tflops",
        "fp4\nTFLOP/s": "fp4_tflops",
        "int8\nTOP/s": "int8_tflops",
        "bf16\nsparse": "bf16_sparse_tflops",
        "fp8\nsparse": "fp8_sparse_tflops",
        "fp4\nsparse": "fp4_sparse_tflops",
        "GB": "memory_gb",
        "W": "power_w",
        "USD": "price_usd",
        "link\nGB/s": "link_gb_s",
    }
    table = _table("device", columns)
    table.add_column("peaks", no_wrap=True)
    for one in facts:
        checked = "verified" if one["verified"] else "unverified"
        table.add_row(one["name"], *(number(one[key]) for key in columns.values()), checked)
    return table


def sources_table(facts: Sequence[Facts]) -> Table:
    """One row per device and source: which figures come from there, unverified ones marked."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("device", no_wrap=True)
    for heading in ("source", "figures (? unverified)"):
        table.add_column(heading, max_width=58)
    for one in facts:
        by_source: dict[str, list[str]] = {}
        for key, origin in one["figures"].items():
            mark = "" if origin["verified"] else " ?"
            by_source.setdefault(origin["source"], []).append(f"{key}{mark}")
        for index, (source, keys) in enumerate(by_source.items()):
            table.add_row("" if index else one["name"], source, ", ".join(keys))
    return table


def number(value: float | None) -> str:
    """A figure with thousands marked; a dash where there is none."""
    return "–" if value is None else f"{value:,.6g}"


def _scaled(value: int | None, unit: float) -> str:
    return "–" if value is None else f"{value / unit:,.3f}"


def _plain(value: int | None) -> str:
    return "–" if value is None else str(value)


def _short(value: object) -> str:
    """A dimension as it is; a number of parameters with thousands marked."""
    if isinstance(value, int | float) and value >= 1e6:
        return f"{value:,.0f}"
    return str(value)


def _table(first: str, columns: Sequence[str] | Mapping[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
