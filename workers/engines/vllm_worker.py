"""What only the process that holds the model can tell.

vLLM mixes this class into its worker (`worker_extension_cls`), so the methods run in
every rank, in-process or not, on CPU and on CUDA, and answer through `collective_rpc` by
name: no code travels between processes.

The number of experts per token is no weight: the router of each MoE layer holds it as a
plain number, and on an eager engine every kernel takes it from the ids that the router
hands over. So it can be changed between passes. It is changed only where each object that
could hold a copy is of a kind whose source was read (vLLM 0.32); anything else is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from workers import memory
from workers.engines import (
    vllm_limit,
    vllm_routing,
    vllm_skeleton,
    vllm_tuning,
    vllm_unfused,
)
from workers.engines.reference_load import ReferenceLoad, on_cuda
from workers.engines.vllm_probe import Account, Probe
from workers.hardware.reference import Reference

# vLLM imports this in every rank, before it builds a model there.
vllm_limit.take_over()
vllm_routing.take_over()
vllm_unfused.take_over()
vllm_skeleton.take_over()
vllm_tuning.take_over()

ROUTERS = ("CPURouter", "FusedTopKRouter", "RoutingSimulatorRouter")
"""Routers that pick the k largest of a softmax, or of what a sweep forces, and keep nothing else
that depends on k."""
EXPERTS = (
    "X86CPUUnquantizedExperts",
    "ArmCPUUnquantizedExperts",
    "PowerCPUUnquantizedExperts",
    "CPUUnquantizedExperts",
    "TritonExperts",
    "UnfusedExperts",
)
"""Kernels that take k from the shape of the chosen ids."""
NAMES = ("top_k", "topk", "experts_per_token", "experts_per_tok")
"""How an attribute is called that may hold a copy of k."""


class Report:
    """Mixed into `vllm.v1.worker.*Worker`."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    idle_bytes: int
    """Of `LimitedCPUWorker`: resident size before the first weight."""
    probe: Probe | None = None
    reference_load: ReferenceLoad
    """Of `LimitedCPUWorker`: made before the first weight."""
    peak_before_reference: int = 0
    """Most bytes that were reserved on a GPU before a reference load ran there."""

    def report_memory(self) -> dict[str, int]:
        """Bytes of this rank: `weights`, `kv_cache` and `peak`."""
        counted_as_loaded: int | None = getattr(self, "weights_bytes", None)
        if counted_as_loaded is None:
            models = [self.model_runner.get_model()]
            draft = self.model_runner.get_draft_model()
            if isinstance(draft, torch.nn.Module):
                models.append(draft)
            weights = [one for model in models for one in model.parameters()]
            counted_as_loaded = distinct_bytes(weights)
        return {
            "weights": counted_as_loaded,
            "kv_cache": distinct_bytes(_flatten(self.model_runner.kv_caches)),
            "peak": (
                max(self.peak_before_reference, torch.cuda.max_memory_reserved(self.device))
                if self.device.type == "cuda"
                else max(0, memory.status("VmHWM") - self.idle_bytes)
            ),
        }

    def report_reference(self) -> Reference | None:
        """What this rank's device does just now; null where it has no room to show it."""
        try:
            if self.device.type == "cuda":
                return self._reference_on_cuda()
            load: ReferenceLoad | None = getattr(self, "reference_load", None)
            return load.run() if load is not None else None
        except (RuntimeError, MemoryError) as error:
            print(f"the reference load did not run: {error}")
            return None

    def _reference_on_cuda(self) -> Reference:
        """With the peak kept free of what the load takes."""
        peak = torch.cuda.max_memory_reserved(self.device)
        self.peak_before_reference = max(self.peak_before_reference, peak)
        try:
            return on_cuda(self.device)
        finally:
            torch.cuda.reset_peak_memory_stats(self.device)

    def report_threads(self) -> int:
        """Threads that this rank's kernels compute on."""
        return torch.get_num_threads()

    def report_kernels(self) -> list[str]:
        """Kinds of kernels that this rank's MoE layers run, each once."""
        model = self.model_runner.get_model()
        layers = [one for one in model.modules() if isinstance(one, MoERunner)]
        return sorted({_kernel(one.routed_experts.quant_method) for one in layers})

    def report_moe_configs(self) -> list[str]:
        """What this rank's MoE kernels were tuned by, each once; see `vllm_tuning`."""
        return sorted(vllm_tuning.taken())

    def report_dimensions(self) -> dict[str, int | None]:
        """What this rank's model is made of, as far as vLLM tells; null where it does not.

        Returns:
            `num_layers`, `hidden_size` and `vocab_size` of the whole language model, and
            `num_experts` and `top_k` of its MoE layers, where all have the same.
        """
        config = self.vllm_config.model_config
        model = self.model_runner.get_model()
        layers = [one for one in model.modules() if isinstance(one, MoERunner)]
        experts = {one.moe_config.num_logical_experts for one in layers}
        chosen = {one.moe_config.experts_per_token for one in layers}
        return {
            "num_layers": config.get_total_num_hidden_layers(),
            "hidden_size": config.get_hidden_size(),
            "vocab_size": config.get_vocab_size(),
            "num_experts": experts.pop() if len(experts) == 1 else None,
            "top_k": chosen.pop() if len(chosen) == 1 else None,
        }

    def set_top_k(self, top_k: int) -> str | None:
        """Routes every token to `top_k` experts of each MoE layer from the next pass on.

        Returns:
            Why that cannot be done, before anything is changed; null when every MoE layer of
            this rank has been read back with the new number.
        """
        model = self.model_runner.get_model()
        layers = [one for one in model.modules() if isinstance(one, MoERunner)]
        if not layers:
            return "no MoE layer"
        if unknown := _copies(model, layers):
            return f"{unknown} may hold a top-k of its own"
        for layer in layers:
            if reason := _fixed(layer, top_k):
                return f"{layer.layer_name}: {reason}"
        for layer in layers:
            for holder, name in _holders(layer):
                setattr(holder, name, top_k)
        held = {getattr(holder, name) for layer in layers for holder, name in _holders(layer)}
        return None if held == {top_k} else f"read back {held} instead of {top_k}"

    def start_probe(self, num_experts: int, top_k: int, routes: bool) -> str | None:
        """Has every pass from now on counted; see `vllm_probe`.

        Returns:
            Why that cannot be done; then nothing has changed in this rank.
        """
        self.stop_probe()
        built = Probe.build(self.model_runner, num_experts=num_experts, top_k=top_k, routes=routes)
        if isinstance(built, str):
            return built
        self.probe = built
        built.install()
        return None

    def read_probe(self) -> Account | None:
        """What this rank saw; null where another one counts."""
        return self.probe.account() if self.probe is not None else None

    def stop_probe(self) -> None:
        """Leaves no trace of the probe; may be called without one."""
        if self.probe is not None:
            self.probe.remove()
            self.probe = None


def _kernel(method: Any) -> str:
    """The class that multiplies by the experts, or the method that hides it."""
    kernel = method.moe_kernel
    return type(method if kernel is None else kernel.fused_experts).__name__


def _holders(layer: MoERunner) -> list[tuple[Any, str]]:
    """Every place of one MoE layer that holds top-k, as (object, attribute)."""
    experts = layer.routed_experts
    method = experts.quant_method
    kernel = method.moe_kernel.fused_experts
    configs = (layer.moe_config, experts.moe_config, method.moe, kernel.moe_config)
    places = [(layer.router, "top_k"), (experts, "top_k"), (experts.expert_map_manager, "top_k")]
    return [*places, *((config, "experts_per_token") for config in configs)]


def _fixed(layer: MoERunner, top_k: int) -> str | None:
    """Why this layer's top-k cannot be changed; null where it can."""
    router, experts = layer.router, layer.routed_experts
    kernel = experts.quant_method.moe_kernel
    if type(layer) is not MoERunner or not isinstance(router, BaseRouter):
        return f"a layer of kind {type(layer).__name__} with a {type(router).__name__}"
    if type(router).__name__ not in ROUTERS or router.eplb_state is not None:
        return f"router {type(router).__name__}"
    if experts.use_grouped_topk or experts.custom_routing_function is not None:
        return "experts chosen in groups, or by a function of the model"
    if experts.scoring_func != "softmax" or experts.e_score_correction_bias is not None:
        return "scores that are no plain softmax"
    if experts.apply_router_weight_on_input:
        return "router weights on the input, which fixes top-k at 1"
    if type(experts.quant_method).__name__ != "UnquantizedFusedMoEMethod":
        return f"weights under {type(experts.quant_method).__name__}"
    if kernel is None or kernel.is_monolithic:
        return "routing inside the kernel"
    if type(kernel.fused_experts).__name__ not in EXPERTS:
        return f"kernel {type(kernel.fused_experts).__name__}"
    if layer.moe_config.moe_parallel_config.use_ep:
        return "experts spread over devices"
    if top_k > layer.moe_config.num_logical_experts:
        return f"only {layer.moe_config.num_logical_experts} experts"
    return None


def _copies(model: torch.nn.Module, layers: list[MoERunner]) -> str | None:
    """A module outside the layers' known places that may hold a copy of top-k."""
    known = {id(holder) for layer in layers for holder in (layer.router, layer.routed_experts)}
    for path, module in model.named_modules():
        if id(module) in known:
            continue
        for name, value in vars(module).items():
            if type(value) is int and any(word in name for word in NAMES):
                return f"{path}.{name}"
    return None


def _flatten(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        return [caches]
    members = caches.values() if isinstance(caches, dict) else caches
    return [tensor for one in members for tensor in _flatten(one)]


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
