"""Records that every figure of records can be drawn from, in memory and with every column filled.

A figure is asked here with what it was made for, and elsewhere with the same records after
columns were emptied, rows taken away or outcomes changed. Values are plausible and of known
order, no more: what figures say is tested where each figure is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import polars as pl
import pyarrow as pa

from analysis.columns import derived
from workers.contract.record import ACTIVATIONS, RECORDS, SAMPLES, SCHEMA_VERSION, rows

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
EXPERTS, TOP_K, LAYERS = 8, 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The tables of a small dataset."""

    records: pl.DataFrame
    """As in the files: without derived columns."""
    samples: pl.DataFrame
    activations: pl.DataFrame

    def loaded(self) -> pl.LazyFrame:
        """The records as `load` gives them."""
        return derived(self.records)

    def table(self, name: str) -> pl.LazyFrame:
        """A table beside the records."""
        return {"samples": self.samples, "activations": self.activations}[name].lazy()


def full(trial_id: str, **columns: Any) -> dict[str, Any]:
    """A measured trial with a value in every column that an `ok` record can have."""
    value = columns.pop("throughput_tok_s", 1000.0)
    batch, fed, made = (columns.get(name, 32) for name in ("batch_size", "input_tokens", "output"))
    e2e = batch * (fed + made) / value
    return {
        **_WHERE,
        **_MODEL,
        "trial_id": trial_id,
        "batch_size": 32,
        "input_tokens": 32,
        "output_tokens": 32,
        "temperature": 0.0,
        "seed": 0,
        "repeats": 5,
        "ttft_s": 0.2 * e2e,
        "ttft_paper_s": 0.21 * e2e,
        "itl_s": 0.02 * e2e,
        "itl_p90_s": 0.03 * e2e,
        "itl_p99_s": 0.04 * e2e,
        "itl_paper_s": 0.001 * e2e,
        "tpot_s": 0.025 * e2e,
        "e2e_s": e2e,
        "e2e_s_ci_low": 0.99 * e2e,
        "e2e_s_ci_high": 1.01 * e2e,
        "e2e_s_std": 0.01 * e2e,
        "ci_level": 0.9375,
        "throughput_tok_s": value,
        "throughput_tok_s_ci_low": 0.99 * value,
        "throughput_tok_s_ci_high": 1.01 * value,
        "output_throughput_tok_s": value / 2,
        "requests_s": batch / e2e,
        "predicted_e2e_s": 0.8 * e2e,
        "predicted_ttft_s": 0.15 * e2e,
        "predicted_tpot_s": 0.02 * e2e,
        **columns,
    }


_WHERE: Mapping[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "sweep": "study",
    "run_id": "r0",
    "group_id": "g0",
    "attempt": 1,
    "axes": "{}",
    "outcome": "ok",
    "log": "logs/g0.log",
    "profile": "cpu",
    "measured": True,
    "engine": "vllm",
    "engine_version": "0.32.0",
    "engine_args": json.dumps({"max_model_len": 64}),
    "torch_version": "2.13.0+cpu",
    "device": "x86 CPU",
    "device_count": 1,
    "device_digest": "0123456789ab",
    "device_facts": json.dumps({"amx_tile": False, "cores": 2}),
    "threads": 2,
    "reference_bandwidth_gb_s_before": 20.0,
    "reference_bandwidth_gb_s_after": 20.5,
    "reference_bandwidth_spread": 0.02,
    "reference_tflops_before": 0.1,
    "reference_tflops_after": 0.1,
    "reference_tflops_spread": 0.03,
    "host": "host",
    "started_at": NOON,
    "finished_at": NOON,
    "engine_load_s": 2.0,
    "side_by_side": False,
    "side_by_side_ratio": 1.0,
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "data_parallel": 1,
    "expert_parallel": False,
    "eager": True,
    "weights_gib": 0.5,
    "kv_cache_gib": 0.1,
    "peak_memory_gib": 0.7,
    "memory_limit_gib": 0.75,
    "peak_bandwidth_gb_s": 30.0,
    "peak_tflops": 0.2,
    "peak_source": "calibrated",
    "calibrated_bandwidth_gb_s": 30.0,
    "calibrated_tflops": 0.2,
    "predicted_device": "cpu",
    "predicted_load_s": 1.0,
    "predicted_memory_gib": 0.7,
    "predicted_weights_gib": 0.5,
    "predicted_kv_cache_gib": 0.1,
}
_MODEL: Mapping[str, Any] = {
    "model": "small-moe",
    "revision": "main",
    "weights": "dummy",
    "scale": 0.125,
    "num_layers": 4,
    "hidden_size": 512,
    "ffn_dim": 224,
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "shared_experts": 1,
    "dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "trust_remote_code": False,
    "params_total": 4_000_000,
    "params_active": 1_000_000,
    "moe_kernel": "fused",
    "moe_config": "E=8,N=224,device_name=NVIDIA_H100_80GB_HBM3.json",
    "mbu": 0.9,
    "mfu": 0.4,
    "s_mbu": 0.5,
    "s_mbu_paper": 0.45,
    "s_mfu": 0.2,
    "prefill_s_mbu": 0.2,
    "prefill_s_mfu": 0.6,
    "activation_source": "traced",
    "activation_sheet": "study r0 t0",
    "s_mbu_uniform": 0.55,
    "traced_passes": 2,
    "activation_settled": True,
    "activated_experts_decode": 6.5,
    "activated_experts_prefill": 8.0,
}


def _shapes() -> list[dict[str, Any]]:
    """FFN width × experts × top-k, as Figures 7 to 9 draw them."""
    return [
        full(
            f"f{ffn}e{experts}k{top_k}",
            ffn_dim=ffn,
            num_experts=experts,
            top_k=top_k,
            throughput_tok_s=1e6 / ffn / experts / top_k,
        )
        for ffn, experts, top_k in product((224, 448), (8, 16), (1, 2, 4))
    ]


def _batches() -> list[dict[str, Any]]:
    """Two models by batch, length and top-k in turn: Figures 3, 5 and 6, CAP's 6, 8 and 9."""
    return [
        full(
            f"{model}b{batch}n{length}k{top_k}",
            model=model,
            batch_size=batch,
            input_tokens=length,
            output_tokens=length,
            top_k=top_k,
            throughput_tok_s=share * 100.0 * batch / top_k,
        )
        for model, share in (("small-moe", 1.0), ("other-moe", 0.7), ("third-moe", 0.5))
        for batch, length, top_k in product((1, 16), (32, 64), (1, 2))
    ]


def _chosen(**wanted: Any) -> list[dict[str, Any]]:
    return [one for one in _batches() if all(one[key] == value for key, value in wanted.items())]


def _kernels() -> list[dict[str, Any]]:
    return [
        full(
            f"{backend}b{batch}n{length}",
            moe_backend=backend,
            batch_size=batch,
            input_tokens=length,
            output_tokens=length,
            throughput_tok_s=share * 100.0 * batch,
        )
        for backend, share in ((None, 1.0), ("unfused", 0.5))
        for batch, length in product((1, 16), (32, 64))
    ]


def _layouts() -> list[dict[str, Any]]:
    degrees: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("one", 1, {}),
        ("tp2", 2, {"tensor_parallel": 2}),
        ("tp4", 4, {"tensor_parallel": 4}),
        ("pp2", 2, {"pipeline_parallel": 2}),
        ("ep2", 2, {"tensor_parallel": 2, "expert_parallel": True}),
    )
    return [
        full(name, device_count=count, throughput_tok_s=900.0 * count**0.8, **layout)
        for name, count, layout in degrees
    ]


def _pruned() -> list[dict[str, Any]]:
    cuts: tuple[tuple[str | None, float | None], ...] = (
        (None, None),
        ("inter", 0.25),
        ("inter", 0.5),
        ("intra", 0.5),
    )
    return [
        full(
            f"{kind}{ratio}k{top_k}",
            top_k=top_k,
            prune_kind=kind,
            prune_ratio=ratio,
            num_experts=round(EXPERTS * (1 - (ratio or 0))) if kind == "inter" else EXPERTS,
            throughput_tok_s=1000.0 / top_k * (1 + (ratio or 0)),
        )
        for (kind, ratio), top_k in product(cuts, (1, 2))
    ]


def _precisions() -> list[dict[str, Any]]:
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"quantization": "fp8", "weights_gib": 0.25},
        {"kv_cache_dtype": "fp8"},
    )
    return [
        full(
            f"{place}b{batch}n{length}",
            batch_size=batch,
            input_tokens=length,
            output_tokens=length,
            throughput_tok_s=100.0 * batch * (1 + place / 10),
            **kind,
        )
        for (place, kind), batch, length in product(enumerate(kinds), (1, 16), (32, 64))
    ]


def _drafts() -> list[dict[str, Any]]:
    alone = [full(f"alone{fed}", input_tokens=fed, throughput_tok_s=3.0 * fed) for fed in (32, 128)]
    return alone + [
        full(
            f"draft{fed}x{tokens}",
            input_tokens=fed,
            speculative="models/draft",
            draft_tokens=tokens,
            acceptance_rate=0.9 / tokens,
            accepted_length=1.9,
            throughput_tok_s=4.0 * fed,
        )
        for fed, tokens in product((32, 128), (1, 4))
    ]


def _runs() -> list[dict[str, Any]]:
    """Two runs of three groups each; the second on a machine that is slower, and grows so."""
    return [
        full(
            f"{run}{group}",
            run_id=run,
            group_id=f"g{group}",
            started_at=NOON + timedelta(minutes=5 * group),
            finished_at=NOON + timedelta(minutes=5 * group + 4),
            reference_bandwidth_gb_s_before=speed * (20 - group),
            reference_bandwidth_gb_s_after=speed * (19.5 - group),
            reference_tflops_before=speed * 0.1,
            reference_tflops_after=speed * 0.1,
        )
        for run, speed in (("r0", 1.0), ("r1", 0.5))
        for group in range(3)
    ]


def _probed(trials: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], ...]:
    """Samples and activations of probes of these trials: a prompt pass and two decode passes."""
    samples, counted = [], []
    for row in trials:
        batch, experts, top_k = row["batch_size"], row["num_experts"], row["top_k"]
        whose = {"run_id": row["run_id"], "trial_id": row["trial_id"]}
        ran = min(experts, batch * top_k)
        samples.append(
            {
                **whose,
                "attempt": 1,
                "kind": "probe",
                "repeat": 0,
                "batch_size": batch,
                "pass_s": [0.1] * 3,
                "pass_new": [[row["input_tokens"]] * batch, [1] * batch, [1] * batch],
                "pass_context": [[0] * batch, [32] * batch, [33] * batch],
                "pass_decoding": [[False] * batch, [True] * batch, [True] * batch],
                "pass_experts": [
                    [experts] * LAYERS,
                    [ran] * LAYERS,
                    [max(ran - 1, top_k)] * LAYERS,
                ],
                "pass_busiest": [[batch * 4] * LAYERS, [batch] * LAYERS, [batch] * LAYERS],
            }
        )
        counted += [
            {**whose, "phase": phase, "layer": layer, "expert": expert, "tokens": expert + weight}
            for phase, weight in (("prefill", 4), ("decode", 1))
            for layer in range(1, LAYERS + 1)
            for expert in range(experts)
        ]
    return samples, counted


def _of(trials: list[dict[str, Any]], *, probed: bool = False) -> Scene:
    samples, counted = _probed(trials) if probed else ([], [])
    return Scene(
        records=_frame(RECORDS, trials),
        samples=_frame(SAMPLES, samples),
        activations=_frame(ACTIVATIONS, counted),
    )


def _frame(schema: pa.Schema, values: list[dict[str, Any]]) -> pl.DataFrame:
    frame = pl.from_arrow(rows(schema, values))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _scenes() -> dict[str, Scene]:
    shapes, kernels, precisions, drafts = _shapes(), _kernels(), _precisions(), _drafts()
    by_batch = _of(_chosen(input_tokens=32, top_k=2), probed=True)
    routings = [
        full(f"r{n}", throughput_tok_s=1000.0 - n, routing=routing)
        for n, routing in enumerate(("uniform", "zipf:1", None))
    ]
    return {
        **dict.fromkeys(("hparam-ffn", "hparam-experts", "hparam-topk"), _of(shapes)),
        "latency": _of(_chosen(batch_size=16, input_tokens=32, top_k=2)),
        "topk-batch": _of(_chosen(input_tokens=32)),
        "batch-length": _of(_chosen(top_k=2)),
        "parallelism": _of(_layouts()),
        **dict.fromkeys(("fused-moe", "fused-moe-length"), _of(kernels)),
        **dict.fromkeys(("sparsity-traced", "s-mbu-batch", "layer-bytes"), by_batch),
        **dict.fromkeys(("activation-heatmap", "imbalance"), by_batch),
        "activation-heatmap": _of(_chosen(batch_size=16, input_tokens=32, top_k=2), probed=True),
        "routing-cost": _of(routings, probed=True),
        "pruning": _of(_pruned()),
        **dict.fromkeys(("quantization", "quantization-length"), _of(precisions)),
        **dict.fromkeys(("speculative", "speculative-length"), _of(drafts)),
        "drift": _of(_runs()),
    }


SCENES: Mapping[str, Scene] = _scenes()
"""By the name of the figure."""
