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

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import current_platform

from workers.contract.engine import UNFUSED
from workers.engines.unfused_kernel import ACTIVATIONS, unfused_experts

KEY = "moe_backend"
"""Of vLLM's `additional_config`."""


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
