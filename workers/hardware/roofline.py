"""What a trial should cost, from structure and peaks alone.

A forward pass takes as long as the slower of two things: reading the bytes it needs
(the weights of the experts that the batch activates, and the KV cache) and doing the
arithmetic. Which experts a batch activates is not known before a run, so the expectation
under uniform routing stands in: of E experts, B tokens with k choices each touch
E·(1 - (1 - k/E)^B).

The figures order the plan, feed its ETA and stand in `predicted_*` columns beside what
was measured. They never replace a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.contract.layout import Layout
from workers.contract.model import Model
from workers.contract.workload import Workload
from workers.hardware.device import Device
from workers.moe.architecture import DTYPE_BYTES, run_dtype
from workers.moe.structure import Architecture

GIB = 2**30
BLOCK_TOKENS = 128
"""Tokens to which the KV cache of a request is rounded up; the coarsest block in use."""
CHUNK_TOKENS = 8192
"""Most prompt tokens of one prefill pass; bounds activation memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Time of one batch and memory of one device."""

    ttft_s: float
    """Prefill of the whole batch, seconds."""
    e2e_s: float
    """Prefill and every decode step, seconds."""
    load_s: float
    """Building the engine, seconds."""
    weights_gib: float
    """Weights on one device."""
    kv_cache_gib: float
    """KV cache of the whole batch on one device."""
    activations_gib: float
    """Largest intermediate tensors of one forward pass on one device."""

    @property
    def memory_gib(self) -> float:
        """All that one device must hold."""
        return self.weights_gib + self.kv_cache_gib + self.activations_gib


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """Expected experts of one layer that `tokens` independent tokens activate.

    Uniform routing: E·(1 - (1 - k/E)^B).
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def kv_cache_bytes(a: Architecture, workload: Workload, dtype: str) -> int:
    """KV cache of the whole batch at its full length, over all devices, in bytes."""
    blocks = -(-workload.tokens_per_request // BLOCK_TOKENS)
    tokens = workload.batch_size * blocks * BLOCK_TOKENS
    return tokens * a.kv_values_per_token * DTYPE_BYTES[dtype]


def predict(
    a: Architecture, model: Model, layout: Layout, workload: Workload, device: Device
) -> Prediction | None:
    """Roofline of one trial; null where the structure's parameters are not spelled out."""
    if not a.exact:
        return None
    total = a.params_total
    dtype = run_dtype(a, model)
    size = DTYPE_BYTES[dtype]
    devices = layout.devices
    bandwidth = device.bandwidth_gb_s * 1e9 * layout.tensor * layout.data
    compute = device.bf16_tflops * 1e12 * layout.tensor * layout.data

    routed = a.num_layers * a.num_experts * a.expert_params
    always = total - routed

    def pass_s(tokens: int, context: float) -> float:
        experts = a.num_layers * distinct_experts(a.num_experts, a.top_k, tokens)
        read = (always + experts * a.expert_params) * size
        read += workload.batch_size * context * a.kv_values_per_token * size
        active = always + a.num_layers * a.top_k * a.expert_params
        attention = 4 * a.num_layers * a.num_heads * a.layers[0].attention.qk_dim * context
        flops = tokens * (2 * active + attention)
        return max(read / bandwidth, flops / compute) + device.step_s

    prompt = workload.batch_size * workload.input_tokens
    ttft = pass_s(prompt, workload.input_tokens / 2)
    steps = workload.output_tokens - 1
    decode = pass_s(workload.batch_size, workload.input_tokens + steps / 2)
    weights = total * size / devices
    chunk = min(prompt, CHUNK_TOKENS)
    widest = max(a.hidden_size, 2 * a.ffn_dim * a.top_k // layout.tensor, a.vocab_size)
    return Prediction(
        ttft_s=ttft,
        e2e_s=ttft + steps * decode,
        load_s=device.rebuild_s + weights / GIB / device.load_gib_s,
        weights_gib=weights / GIB,
        kv_cache_gib=kv_cache_bytes(a, workload, dtype) / devices / GIB,
        activations_gib=chunk * (widest + 4 * a.hidden_size) * size / GIB,
    )
