"""Which settings of an engine the roofline takes into account, and which it does not.

Arguments go to the engine as they are, and many change what a pass costs in ways that no structure
tells: how prompts are cut, what is offloaded, how experts are moved. A prediction that passed them
over in silence would be taken for one of the engine that runs. So every argument of vLLM 0.32's
`EngineArgs` stands below, under what it does to the prediction, and whatever is not below counts as
not covered. `tests/contract/test_coverage.py` goes through the installed `EngineArgs`.

What a sweep sets and the prediction does not cover is named in the dry run and in the column
`prediction_ignores`. A value that switches nothing on (null, or the engine's own default) is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.contract import arguments
from workers.contract.engine import EngineSettings

MODELLED: Mapping[str, tuple[str, ...]] = {
    "a field of the trial says the same": tuple(arguments.FIELDS),
    "bounds the tokens of a pass": ("max_num_batched_tokens",),
    "bounds the requests in flight, so a batch runs in rounds": ("max_num_seqs",),
    "bounds a request, and the cache must hold one of that length": ("max_model_len",),
    "makes the window the longest request, within which it hides nothing": (
        "disable_sliding_window",
    ),
    "type and room of the cache": (
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "block_size",
        "gpu_memory_utilization",
    ),
    "changes the structure, which is read with it": ("hf_overrides",),
    "type of the weights where they are random": ("load_format",),
}
"""By what is done with them."""
WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "of the roofline engine: how long it waits, not what it predicts": ("pace",),
    "names, versions and places of files": (
        "served_model_name",
        "model_weights",
        "code_revision",
        "tokenizer_revision",
        "hf_token",
        "download_dir",
        "config_format",
        "ignore_patterns",
        "trust_remote_code",
        "allow_deprecated_quantization",
    ),
    "text in and out, where prompts are token ids and nothing is turned into text": (
        "tokenizer",
        "skip_tokenizer_init",
        "tokenizer_mode",
        "structured_outputs_config",
        "reasoning_config",
        "reasoning_parser",
        "reasoning_parser_plugin",
        "io_processor_plugin",
        "renderer_num_workers",
        "allowed_local_media_path",
        "allowed_media_domains",
        "enable_prompt_embeds",
    ),
    "defaults of sampling, which every request of a sweep sets itself": (
        "generation_config",
        "override_generation_config",
        "max_logprobs",
        "logprobs_mode",
        "seed",
    ),
    "reading weights: a load is predicted from a rate that is an assumption": (
        "safetensors_load_strategy",
        "safetensors_prefetch_num_threads",
        "safetensors_prefetch_block_size",
        "model_loader_extra_config",
        "max_parallel_loading_workers",
        "pt_load_map_location",
        "use_tqdm_on_load",
        "enable_ep_weight_filter",
    ),
    "every pass begins with an empty cache, and its prompts do not begin alike": (
        "enable_prefix_caching",
        "prefix_caching_hash_algo",
        "prefix_cache_retention_interval",
        "prefix_match_unit",
    ),
    "order among requests that arrive together and are alike": ("scheduling_policy",),
    "queues of a server, which a batch sent at once does not pass": (
        "max_num_queued_reqs",
        "max_num_queued_tokens",
    ),
    "images, sound and video, of which these workloads have none": (
        "limit_mm_per_prompt",
        "enable_mm_embeds",
        "interleave_mm_strings",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_hasher_algorithm",
        "mm_shm_cache_max_object_size_mb",
        "mm_encoder_tp_mode",
        "mm_encoder_attn_backend",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "mm_encoder_fp8_scale_save_path",
        "mm_encoder_fp8_scale_save_margin",
        "video_pruning_rate",
        "video_pruning_method",
        "mm_tensor_ipc",
        "mm_processor_device",
        "mm_device_do_normalize",
        "disable_chunked_mm_input",
        "skip_mm_profiling",
        "enable_mm_processor_stats",
        "ec_transfer_config",
        "ec_manager_config",
    ),
    "pooling models and adapters, which no sweep runs": (
        "pooler_config",
        "runner",
        "convert",
        "default_mm_loras",
        "max_lora_cls_labels",
    ),
    "what it counts and writes down outside the forward pass": (
        "aggregate_engine_logging",
        "disable_log_stats",
        "show_hidden_metrics_for_version",
        "otlp_traces_endpoint",
        "per_request_spec_decode_metrics",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "custom_histogram_buckets",
        "cudagraph_metrics",
        "enable_mfu_metrics",
        "enable_logging_iteration_details",
        "logging_config",
        "log_level",
        "log_config_file",
        "jit_monitor_mode",
        "jit_monitor_verbose",
        "fail_on_environ_validation",
    ),
    "how its processes find each other and end": (
        "master_addr",
        "master_port",
        "node_rank",
        "distributed_timeout_seconds",
        "cpu_distributed_timeout_seconds",
        "data_parallel_rank",
        "data_parallel_start_rank",
        "data_parallel_address",
        "data_parallel_rpc_port",
        "_api_process_count",
        "_api_process_rank",
        "shutdown_timeout",
        "fault_tolerance_config",
        "enable_fault_tolerance",
    ),
}
"""By the ground on which a prediction is the same with them as without."""
NOT_COVERED: Mapping[str, Mapping[str, Any]] = {
    "how prompts are cut and mixed with decoding": {
        "enable_chunked_prefill": None,
        "max_num_scheduled_tokens": None,
        "max_num_active_seqs": None,
        "long_prefill_token_threshold": 0,
        "long_prefill_token_threshold_adaptive": False,
        "scheduler_reserve_full_isl": True,
        "prefill_schedule_interval": 1,
        "scheduler_cls": None,
        "stream_interval": 1,
        "async_scheduling": None,
        "tokens_only": False,
    },
    "how much cache there is, and of what": {
        "num_gpu_blocks_override": None,
        "watermark": 0.0,
        "disable_hybrid_kv_cache_manager": None,
        "kv_cache_dtype_skip_layers": None,
        "kv_sharing_fast_prefill": False,
        "swa_bounded_replay": True,
        "mamba_config": None,
        "mamba_cache_dtype": "auto",
        "mamba_ssm_cache_dtype": "auto",
        "mamba_block_size": None,
        "mamba_cache_mode": "none",
        "enable_mamba_shared_prefix_checkpoint": False,
        "mamba_cache_philox_rounds": 0,
        "enable_mamba_cache_stochastic_rounding": False,
        "replayssm_buffer_len": 16,
        "use_replayssm": False,
    },
    "weights or cache outside the device": {
        "offload_backend": "auto",
        "cpu_offload_gb": 0,
        "cpu_offload_params": None,
        "offload_group_size": 0,
        "offload_num_in_group": 1,
        "offload_prefetch_step": 1,
        "offload_params": None,
        "kv_transfer_config": None,
        "kv_events_config": None,
        "kv_offloading_size": None,
        "kv_offloading_backend": "native",
        "engram_config": None,
    },
    "parallelism and talk that no field of the trial has": {
        "distributed_executor_backend": None,
        "nnodes": 1,
        "numa_bind": False,
        "numa_bind_nodes": None,
        "numa_bind_cpus": None,
        "device_ids": None,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "dcp_comm_backend": None,
        "dcp_q_replicate": None,
        "dcp_kv_cache_interleave_size": 1,
        "cp_kv_cache_interleave_size": None,
        "data_parallel_size_local": None,
        "data_parallel_hybrid_lb": False,
        "data_parallel_external_lb": False,
        "data_parallel_multi_port_external_lb": False,
        "data_parallel_backend": "mp",
        "enable_hc_sp": False,
        "enable_batch_sharded_sampling": None,
        "all2all_backend": "allgather_reducescatter",
        "enable_elastic_ep": False,
        "elastic_ep_max_dp_size": None,
        "enable_dbo": False,
        "ubatch_size": 0,
        "dbo_decode_token_threshold": 32,
        "dbo_prefill_token_threshold": 512,
        "dp_sync_interval": 16,
        "disable_nccl_for_dp_synchronization": None,
        "eplb_config": None,
        "enable_eplb": False,
        "expert_placement_strategy": "linear",
        "disable_custom_all_reduce": False,
        "enable_shm_tensor_arena": False,
        "enable_nccl_comm_suspend": False,
    },
    "kernels, graphs and compiled code": {
        "cudagraph_capture_sizes": None,
        "max_cudagraph_capture_size": None,
        "compilation_config": None,
        "optimization_level": None,
        "performance_mode": "balanced",
        "kernel_config": None,
        "attention_config": None,
        "attention_backend": None,
        "linear_backend": "auto",
        "sparse_indexer_topk_backend": "auto",
        "disable_cascade_attn": None,
        "enable_flashinfer_autotune": None,
        "ir_op_priority": None,
        "mamba_backend": None,
        "mamba_ssu_algorithm": None,
        "gdn_prefill_backend": None,
        "kda_prefill_backend": None,
        "kda_decode_backend": None,
        "use_fp64_gumbel": False,
        "logits_processors": None,
        "model_impl": "auto",
        "model_class_overrides": None,
        "additional_config": None,
    },
    "what else a forward pass or its memory holds": {
        "quantization_config": None,
        "language_model_only": False,
        "mm_encoder_only": False,
        "mm_ipc_gpu_memory_gb": 0,
        "enable_lora": False,
        "max_loras": 1,
        "max_lora_rank": 16,
        "fully_sharded_loras": False,
        "max_cpu_loras": None,
        "lora_dtype": "auto",
        "lora_target_modules": None,
        "enable_tower_connector_lora": False,
        "specialize_active_lora": False,
        "enable_mixed_moe_lora_format": False,
        "enable_moe_shared_loras": False,
        "enable_return_routed_experts": False,
        "return_sampling_mask": False,
        "enable_trace_replay": False,
        "aux_output_config": None,
        "collect_detailed_traces": None,
        "enable_layerwise_nvtx_tracing": False,
        "profiler_config": None,
        "ray_workers_use_nsight": False,
        "watermark_config": None,
        "diffusion_config": None,
        "enable_sleep_mode": False,
        "sleep_mode_offload_cudagraph": False,
        "sleep_preserve_parameter_names": None,
        "enable_cumem_allocator": False,
        "weight_transfer_config": None,
        "speculative_config": None,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "hf_config_path": None,
        "worker_cls": "auto",
        "worker_extension_cls": "",
    },
}
"""By what they change: an argument with the value at which it changes nothing, if there is one."""

_HEEDED = frozenset(
    name for table in (MODELLED, WITHOUT_EFFECT) for names in table.values() for name in names
)
_IDLE = {name: idle for names in NOT_COVERED.values() for name, idle in names.items()}


def ignored(settings: EngineSettings) -> tuple[str, ...]:
    """Dotted keys of a trial's engine that its prediction does not cover."""
    found = [
        f"engine.args.{name}"
        for name, value in settings.args.items()
        if name not in _HEEDED and value is not None and (name not in _IDLE or value != _IDLE[name])
    ]
    if settings.speculative is not None:
        found.append("engine.speculative")
    if settings.routing not in (None, "uniform"):
        found.append("engine.routing")
    if settings.moe_backend is not None:
        found.append("engine.moe_backend")
    return tuple(sorted(found))
