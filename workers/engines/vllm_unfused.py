"""Experts one after the other: the reference that fused kernels are compared with.

MoE-Inference-Bench, Figure 14, sets a fused MoE against one whose routing and experts are
separate stages. vLLM has no such path: on every platform it chooses among fused kernels. So
`engine.moe_backend: unfused` puts this one in their place, behind vLLM's own interface for
kernels (`FusedMoEExpertsModular`), and all around it stays what it was: router, shared experts,
reduction over ranks, exchange between them, and with that the probe and the change of top-k.
Only the experts' own work is another: for each expert that has tokens, gather them, multiply,
activate, multiply again, and add to the tokens with the router's weights. Plain torch, so one
code for CPU and CUDA, with the rounding of its matrix products and a sum in 32 bits.

How many tokens an expert has is read on the host, which no CUDA graph can hold, so none is
captured around it (`vllm_engine`). Compiled code meets it as one opaque operator. What asks for
it is in `additional_config`, which reaches every rank and is part of the key of compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import current_platform

from workers.contract.engine import UNFUSED

KEY = "moe_backend"
"""Of vLLM's `additional_config`."""
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU.value: functional.silu,
    MoEActivation.GELU.value: functional.gelu,
    MoEActivation.GELU_TANH.value: partial(functional.gelu, approximate="tanh"),
}
"""Of the gate, whose product with the other half goes into the second matrix."""


@torch.library.custom_op("moe_sweep::unfused_experts", mutates_args=("output",))
def unfused_experts(
    output: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
) -> None:
    """Writes the weighted sum of the chosen experts' outputs of every token to `output`.

    Args:
        output: tokens × hidden; may be the storage of `x`.
        x: tokens × hidden.
        w13: experts × 2 FFN × hidden, the gate first.
        w2: experts × hidden × FFN.
        weights: tokens × top-k.
        ids: tokens × top-k, rows of `w13`; below 0 is an expert of another rank.
        activation: one of `ACTIVATIONS`.
    """
    activate, top_k = ACTIVATIONS[activation], ids.shape[1]
    slots, shares = ids.flatten().long(), weights.flatten().float()
    by_expert = slots.argsort(stable=True)
    elsewhere, *counts = torch.bincount(slots.clamp(min=-1) + 1, minlength=len(w13) + 1).tolist()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    first = elsewhere
    for expert, count in enumerate(counts):
        if not count:
            continue
        chosen = by_expert[first : first + count]
        tokens = chosen // top_k
        gate, up = functional.linear(x[tokens], w13[expert]).chunk(2, dim=-1)
        told = functional.linear(activate(gate) * up, w2[expert])
        total.index_add_(0, tokens, told.float() * shares[chosen, None])
        first += count
    output.copy_(total)


@unfused_experts.register_fake
def _(*_: Any) -> None:
    """Nothing to tell of shapes: `output` is given."""


class UnfusedExperts(mk.FusedMoEExpertsModular):
    """The kernel as vLLM calls it."""

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: Any,
        weight_key: Any,
        activation_key: Any,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if moe_config.has_bias:
            return False, "kernel does not support experts with biases"
        if moe_config.swiglu_limit is not None:
            return False, "kernel does not support gates that are cut off"
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        return supported, reason

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu() or current_platform.is_cuda()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation.value in ACTIVATIONS

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        config = moe_parallel_config
        return not config.use_all2all_kernels or config.use_ag_rs_all2all_kernels

    @staticmethod
    def _supports_routing_method(routing_method: Any, weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: Any) -> bool:
        return True

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        if apply_router_weight_on_input:  # it was, before this is called
            topk_weights = torch.ones_like(topk_weights)
        unfused_experts(output, hidden_states, w1, w2, topk_weights, ids, activation.value)


def take_over() -> None:
    """Has this process build that kernel wherever a model's configuration asks for it."""
    chosen_by_vllm = unquantized_fused_moe_method.select_unquantized_moe_backend
    if isinstance(chosen_by_vllm, _Choice):
        return
    unquantized_fused_moe_method.select_unquantized_moe_backend = _Choice(chosen_by_vllm)


class _Choice:
    """vLLM's choice of a kernel for unquantised experts, and ours where it is asked for."""

    def __init__(self, otherwise: Callable[..., Any]) -> None:
        self._otherwise = otherwise

    def __call__(self, moe_config: Any) -> tuple[UnquantizedMoeBackend, Any]:
        more = get_current_vllm_config().additional_config
        if not isinstance(more, dict) or more.get(KEY) != UNFUSED:
            told: tuple[UnquantizedMoeBackend, Any] = self._otherwise(moe_config=moe_config)
            return told
        standard = mk.FusedMoEActivationFormat.Standard
        supported, reason = UnfusedExperts.is_supported_config(
            UnfusedExperts, moe_config, None, None, standard
        )
        if not supported:
            raise ValueError(f"moe_backend {UNFUSED} is not supported: {reason}")
        # Of these two the weights stay as they were loaded.
        on_cpu = current_platform.is_cpu()
        return UnquantizedMoeBackend.CPU if on_cpu else UnquantizedMoeBackend.TRITON, UnfusedExperts
