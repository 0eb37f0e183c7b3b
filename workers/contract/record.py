"""The Arrow schema of a dataset: one place, one version, every column explained.

A record is one terminal row per trial, failures included. Values that do not apply, or
that the machine cannot tell, are null; zero and NaN are never used for "unknown".
Durations are seconds, sizes GiB. Headline figures are medians over timed repeats.

Columns may be added (readers fill them with null in older files); a column is never
renamed, retyped or given another meaning without raising `SCHEMA_VERSION`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

_STR, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")

_RECORD: tuple[tuple[str, pa.DataType, str], ...] = (
    # identity
    ("schema_version", _INT, "Version of this schema."),
    ("sweep", _STR, "Name of the sweep."),
    ("run_id", _STR, "One invocation of the orchestrator."),
    ("trial_id", _STR, "Hash of the resolved trial: of what its names stand for."),
    ("group_id", _STR, "Trials that shared one engine key."),
    ("attempt", _INT, "Executions of this trial in this run, from 1."),
    ("axes", _STR, "JSON object: the sweep's axes at this point, as written in the sweep."),
    # outcome
    ("outcome", _STR, "ok | oom | infeasible | unsupported | timeout | crashed | skipped."),
    (
        "outcome_reason",
        _STR,
        "Why it is not ok, or what of an ok trial is not known; "
        "in the engine's own words where it had any.",
    ),
    ("oom_stage", _STR, "load | kv_cache | warmup | run."),
    ("oom_scope", _STR, "device | host."),
    ("oom_bytes", _INT, "Bytes of the allocation that failed."),
    ("skipped_by", _STR, "trial_id of the witness that made this trial pointless."),
    ("log", _STR, "File with the engine's output, relative to the dataset."),
    # where and with what
    ("profile", _STR, "Device class that the sweep was resolved for."),
    ("measured", _BOOL, "False where a model, not a machine, produced the figures."),
    ("engine", _STR, "vllm | transformers | endpoint | roofline."),
    ("engine_version", _STR, "Version of the engine."),
    ("engine_args", _STR, "JSON object: the arguments the engine was built with."),
    ("torch_version", _STR, "Version of torch, with its build."),
    ("device", _STR, "Device as the driver or the operating system names it."),
    (
        "device_digest",
        _STR,
        "Stands for device_facts: two devices of one name are one device where it is equal. Null "
        "where nothing was measured, and in records of 0.1.0.",
    ),
    (
        "device_facts",
        _STR,
        "JSON object: what decides the device's speed, as `workers.hardware.facts` reads it: of a "
        "CPU its model, instructions, caches, NUMA nodes and cores as the process may use them; of "
        "a GPU product, memory, power limit, ECC, MIG, links and driver.",
    ),
    ("device_count", _INT, "Devices of the engine."),
    ("threads", _INT, "CPU threads per device; null on GPUs."),
    ("host", _STR, "Host name."),
    ("started_at", _TIME, "When the trial's first pass (or its failing load) began."),
    ("finished_at", _TIME, "When the terminal record was made."),
    ("engine_load_s", _FLOAT, "Building the engine that this trial used."),
    ("side_by_side", _BOOL, "Other engines could run on the machine at the same time."),
    ("side_by_side_ratio", _FLOAT, "Time of a pass beside others over alone, where checked."),
    ("disturbed", _BOOL, "Something else took part in its figures; null: nothing could be read."),
    ("disturbed_reason", _STR, "What did, as far as it can be told."),
    ("passes_disturbed", _INT, "Timed passes that were disturbed, counted or made up for."),
    # model, as it ran
    ("model", _STR, "Model by the name that the sweep gave."),
    ("revision", _STR, "Commit or tag."),
    ("weights", _STR, "dummy | checkpoint."),
    (
        "model_digest",
        _STR,
        "What the name stood for: configuration and, of a checkpoint, weights, or its commit on "
        "the hub; null where that could not be told.",
    ),
    ("scale", _FLOAT, "Factor on every width of a skeleton; 1 is the model itself."),
    ("num_layers", _INT, "Transformer layers."),
    ("hidden_size", _INT, "Width of the residual stream."),
    ("ffn_dim", _INT, "Width of one routed expert."),
    ("num_experts", _INT, "Routed experts per MoE layer."),
    ("top_k", _INT, "Routed experts per token."),
    ("shared_experts", _INT, "Shared experts per MoE layer."),
    ("dtype", _STR, "Data type of weights and activations."),
    ("kv_cache_dtype", _STR, "Data type of the KV cache."),
    ("quantization", _STR, "Weight quantisation."),
    ("trust_remote_code", _BOOL, "Whether the checkpoint's own Python code was allowed to run."),
    ("prune_kind", _STR, "inter | intra."),
    ("prune_ratio", _FLOAT, "Share to remove; what is left stands in num_experts and ffn_dim."),
    ("prune_criterion", _STR, "What decided on what stays; null where weights are random."),
    ("params_total", _INT, "Parameters."),
    ("params_active", _INT, "Parameters that one token uses, input embedding included."),
    # layout
    ("tensor_parallel", _INT, "Tensor-parallel degree."),
    ("pipeline_parallel", _INT, "Pipeline-parallel degree."),
    ("data_parallel", _INT, "Data-parallel degree."),
    ("expert_parallel", _BOOL, "Experts spread over devices."),
    ("routing", _STR, "Routing that was forced on the model; null: its own router's."),
    ("moe_backend", _STR, "Kernel of the MoE layers, where the sweep chose one."),
    ("moe_kernel", _STR, "The kernel that ran there, by the engine's own name."),
    (
        "moe_config",
        _STR,
        "Where vLLM's Triton MoE kernels took their tile sizes from: the name of a tuned file "
        "(with @ and the start of its SHA-256 if of VLLM_TUNED_CONFIG_FOLDER), or `default` "
        "where none fits; several with '; ' between them. Null on CPUs, and for kernels that ask "
        "for no such file.",
    ),
    ("eager", _BOOL, "No graph capture, no compilation."),
    ("speculative", _STR, "Draft model or method of speculative decoding; null: none."),
    ("draft_tokens", _INT, "Tokens that it proposes per step."),
    ("draft_digest", _STR, "Of the draft model, as model_digest."),
    # workload
    ("batch_size", _INT, "Requests in flight together."),
    ("input_tokens", _INT, "Prompt tokens per request."),
    ("output_tokens", _INT, "Generated tokens per request."),
    ("temperature", _FLOAT, "Sampling temperature; 0 is greedy."),
    ("seed", _INT, "Seed of the prompts."),
    ("dataset", _STR, "Text that the prompts are cut from; null: random token ids."),
    ("dataset_digest", _STR, "Of the texts in it."),
    ("repeats", _INT, "Timed passes that the figures are of."),
    # latency and throughput
    ("ttft_s", _FLOAT, "Time to first token, median over requests, from stamps."),
    ("ttft_paper_s", _FLOAT, "End-to-end time of the batch with output capped at one token."),
    (
        "itl_s",
        _FLOAT,
        "Median of the true gaps between tokens of one request; tokens that one step yields "
        "together come as one.",
    ),
    ("itl_p90_s", _FLOAT, "90th percentile of the same."),
    ("itl_p99_s", _FLOAT, "99th percentile of the same."),
    ("itl_paper_s", _FLOAT, "MoE-Inference-Bench Eq 1: (E2E - TTFT)/(batch*output - 1)."),
    ("tpot_s", _FLOAT, "(last - first token)/(output - 1) of a request, median over requests."),
    ("e2e_s", _FLOAT, "End-to-end time of the batch."),
    ("e2e_s_ci_low", _FLOAT, "Lower end of the median's confidence interval."),
    ("e2e_s_ci_high", _FLOAT, "Upper end of it."),
    ("e2e_s_std", _FLOAT, "Sample standard deviation over repeats."),
    ("ci_level", _FLOAT, "Coverage that the intervals really have with this many repeats."),
    ("throughput_tok_s", _FLOAT, "Eq 2: batch*(input + output)/E2E."),
    ("throughput_tok_s_ci_low", _FLOAT, "Lower end of its interval."),
    ("throughput_tok_s_ci_high", _FLOAT, "Upper end of its interval."),
    ("output_throughput_tok_s", _FLOAT, "batch*output/E2E."),
    ("requests_s", _FLOAT, "batch/E2E."),
    ("samples_s", _FLOAT, "Image and text pairs finished per second (vision models)."),
    # memory, per device
    ("weights_gib", _FLOAT, "Parameters of the loaded model, as the engine pads and packs them."),
    ("kv_cache_gib", _FLOAT, "KV cache as allocated."),
    ("peak_memory_gib", _FLOAT, "Highest use above the idle process, since the load began."),
    ("memory_limit_gib", _FLOAT, "What one device may use."),
    (
        "preemptions",
        _INT,
        "Times that a request was put back for want of KV cache and computed anew, timed passes "
        "that count together; null where the engine does not tell, and in records of 0.1.0.",
    ),
    # how fast the machine was just then, on a load of fixed work (`workers.hardware.reference`)
    (
        "reference_bandwidth_gb_s_before",
        _FLOAT,
        "Reading memory with the engine's threads, all ranks together, before the first pass of "
        "the trial's block: median of repeats, 10^9 bytes/s.",
    ),
    ("reference_bandwidth_gb_s_after", _FLOAT, "The same after the round of its last pass."),
    (
        "reference_tflops_before",
        _FLOAT,
        "A matrix product (FP32 on CPUs, BF16 on GPUs) likewise, 10^12 FLOP/s.",
    ),
    ("reference_tflops_after", _FLOAT, "The same after the round of its last pass."),
    (
        "reference_bandwidth_spread",
        _FLOAT,
        "First to third quartile of the repeats over their median, larger of before and after.",
    ),
    ("reference_tflops_spread", _FLOAT, "The same of the matrix product."),
    # utilisation of the devices' peaks while decoding, ratios of sums over passes (Eq 6)
    ("peak_bandwidth_gb_s", _FLOAT, "Peak of one device, 10^9 bytes/s (of a CPU machine, whole)."),
    ("peak_tflops", _FLOAT, "Dense peak of one device in the type computed in, 10^12 FLOP/s."),
    (
        "peak_source",
        _STR,
        "catalogue | calibrated | calibrated-disturbed (no measurement so far was quiet).",
    ),
    ("calibrated_bandwidth_gb_s", _FLOAT, "Read bandwidth as measured on this device."),
    ("calibrated_tflops", _FLOAT, "Largest matrix product as measured, in the run's data type."),
    ("mbu", _FLOAT, "Memory bandwidth utilisation, all weights counted."),
    ("mfu", _FLOAT, "Compute utilisation, all weights counted."),
    ("s_mbu", _FLOAT, "Sparse MBU with every byte that a forward pass reads."),
    ("s_mbu_paper", _FLOAT, "MoE-CAP Eq 4 exactly."),
    ("s_mfu", _FLOAT, "MoE-CAP Eq 5."),
    ("prefill_s_mbu", _FLOAT, "s_mbu of the prefill passes."),
    ("prefill_s_mfu", _FLOAT, "s_mfu of the prefill passes."),
    (
        "activation_source",
        _STR,
        "Experts behind it: uniform | routing (expectations, of the routing that was forced) | "
        "traced | sheet (of an earlier probe) | sheet-interpolated (between two batches) | dense.",
    ),
    ("activation_sheet", _STR, "Probe or probes that the sheet is of: sweep, run and trial."),
    ("s_mbu_uniform", _FLOAT, "s_mbu as uniform routing would have it, beside another one."),
    ("traced_passes", _INT, "Timed passes whose experts were counted, in passes of their own."),
    ("activation_settled", _BOOL, "Whether the counts had settled when counting ended."),
    (
        "activated_experts_decode",
        _FLOAT,
        "Distinct experts per layer and decode pass, mean, by activation_source; null if uniform.",
    ),
    ("activated_experts_prefill", _FLOAT, "The same for prefill passes."),
    # prediction
    ("predicted_device", _STR, "Class of device that the roofline's figures are for."),
    ("predicted_reason", _STR, "Why nothing was predicted; null where it was."),
    ("predicted_e2e_s", _FLOAT, "Roofline, before the run."),
    ("predicted_ttft_s", _FLOAT, "Roofline, before the run."),
    ("predicted_tpot_s", _FLOAT, "Roofline, before the run."),
    ("predicted_load_s", _FLOAT, "Building the engine, before the run."),
    ("predicted_memory_gib", _FLOAT, "All that the fullest device must hold for the batch."),
    ("predicted_weights_gib", _FLOAT, "Its weights."),
    (
        "predicted_kv_cache_gib",
        _FLOAT,
        "Its KV cache of the batch, or of as much as `max_num_seqs` lets run.",
    ),
    ("predicted_oom_stage", _STR, "Where it would run out; null where it fits."),
    (
        "prediction_ignores",
        _STR,
        "Settings of the engine that the prediction does not take into account, by key.",
    ),
    # energy, cost, accuracy
    ("power_w", _FLOAT, "Mean power during timed passes."),
    ("energy_j", _FLOAT, "Energy of one timed pass."),
    ("energy_source", _STR, "Counter that was read, or why there is none."),
    ("cost_usd_per_mtok", _FLOAT, "US dollars per million tokens."),
    ("purchase_cost_usd", _FLOAT, "Price of the devices used."),
    ("accuracy", _FLOAT, "Score of accuracy_task, 0 to 1."),
    ("accuracy_task", _STR, "Task behind accuracy."),
    ("acceptance_rate", _FLOAT, "Accepted share of drafted tokens, timed passes."),
    (
        "accepted_length",
        _FLOAT,
        "Tokens that a request gets per step that checks a draft, the target's own included; "
        "1 where none is accepted. Mean over timed passes.",
    ),
)

_SAMPLE: tuple[tuple[str, pa.DataType, str], ...] = (
    ("run_id", _STR, "One invocation of the orchestrator."),
    ("trial_id", _STR, "Hash of the resolved trial."),
    ("attempt", _INT, "Execution of the trial."),
    ("kind", _STR, "warmup | one_token | timed | probe."),
    ("repeat", _INT, "Position among the passes of its kind."),
    ("started_at", _TIME, "Submission of the first request."),
    ("e2e_s", _FLOAT, "Submission to the last token of the last request."),
    ("batch_size", _INT, "Requests in the pass."),
    ("input_tokens", _INT, "Prompt tokens per request."),
    ("output_tokens", _INT, "Tokens generated by all requests together."),
    ("token_s", pa.list_(pa.list_(pa.float32())), "Per request, the stamp of each token."),
    ("step_s", pa.list_(pa.float32()), "Stamp at the end of each forward pass."),
    ("preempted", _INT, "Times that a request was put back for want of KV cache."),
    ("draft_steps", _INT, "Times that a request's draft was checked; null without speculation."),
    ("draft_tokens", _INT, "Tokens drafted."),
    ("draft_accepted", _INT, "Those accepted."),
    ("counted", _BOOL, "The record's figures are of it; null of warm-ups, and in older files."),
    ("disturbed", _BOOL, "Something else took part in it; null: nothing could be read."),
    ("disturbed_reason", _STR, "The strongest sign of it."),
    # What the machine said from right before to right after it (`workers.contract.reading`).
    ("wall_s", _FLOAT, "Time between the two looks."),
    ("computing_threads", _INT, "Threads of the engine that wanted a core for a tenth of it."),
    ("cores", _INT, "Cores that those may use."),
    ("machine_cores", _INT, "Cores of the machine."),
    ("own_cpu_s", _FLOAT, "Time on a core, all threads of the engine together."),
    ("run_delay_s", _FLOAT, "Time that they were ready to run and did not, all together."),
    ("involuntary_switches", _INT, "Times that one that computes had to leave a core."),
    ("others_cpu_s", _FLOAT, "Time of other programs on the engine's cores."),
    ("elsewhere_cpu_s", _FLOAT, "Time of other programs on the machine's other cores."),
    ("steal_s", _FLOAT, "Time that the hypervisor gave the engine's cores to others."),
    ("pressure_s", _FLOAT, "Time in which any task of the machine waited for a core (PSI)."),
    ("throttled_s", _FLOAT, "Time for which a quota held the engine back; null without one."),
    ("frequency_mhz", _FLOAT, "Clock of the engine's cores at the end, mean."),
    ("check_s", _FLOAT, "What both looks cost, outside the pass."),
    ("gpu_sm_clock_mhz", _FLOAT, "Clock of the multiprocessors; of several GPUs the lowest."),
    ("gpu_sm_clock_asked_mhz", _FLOAT, "What was set for applications, else the highest."),
    ("gpu_memory_clock_mhz", _FLOAT, "Clock of GPU memory; of several GPUs the lowest."),
    ("gpu_memory_clock_asked_mhz", _FLOAT, "What was set for applications, else the highest."),
    ("gpu_throttle_reasons", pa.list_(_STR), "Why clocks are held down, in NVML's words."),
    ("gpu_throttled_s", _FLOAT, "Time for which heat held clocks down."),
    ("gpu_temperature_c", _FLOAT, "Of the hottest."),
    ("gpu_power_limit_w", _FLOAT, "Limit in force; of several GPUs the lowest."),
    ("gpu_power_limit_default_w", _FLOAT, "Limit that they come with."),
    ("gpu_other_processes", _INT, "Processes that compute on them and are none of the engine's."),
    ("gpu_other_memory_gib", _FLOAT, "Memory that those hold."),
    # Of a probe's rows, which have no stamps: the timed pass of that `repeat` once more, with
    # every choice of experts counted.
    ("pass_s", pa.list_(pa.float32()), "Time of each forward pass, with what counting costs."),
    ("pass_new", pa.list_(pa.list_(pa.int32())), "Per forward pass and request, its new tokens."),
    ("pass_context", pa.list_(pa.list_(pa.int32())), "The same, tokens that were there before."),
    ("pass_decoding", pa.list_(pa.list_(pa.bool_())), "The same, whether it was decoding."),
    (
        "pass_experts",
        pa.list_(pa.list_(pa.int16())),
        "Per forward pass and MoE layer, distinct experts.",
    ),
    (
        "pass_busiest",
        pa.list_(pa.list_(pa.int32())),
        "Per forward pass and MoE layer, tokens of the expert with most.",
    ),
)

_ACTIVATION: tuple[tuple[str, pa.DataType, str], ...] = (
    ("run_id", _STR, "One invocation of the orchestrator."),
    ("trial_id", _STR, "Hash of the resolved trial."),
    ("phase", _STR, "prefill | decode."),
    ("layer", _INT, "Transformer layer, from 0."),
    ("expert", _INT, "Routed expert, from 0."),
    ("tokens", _INT, "Tokens that chose it."),
)


def _schema(table: str, columns: Iterable[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in columns],
        metadata={"table": table, "schema_version": str(SCHEMA_VERSION)},
    )


RECORDS: pa.Schema = _schema("records", _RECORD)
SAMPLES: pa.Schema = _schema("samples", _SAMPLE)
ACTIVATIONS: pa.Schema = _schema("activations", _ACTIVATION)
TABLES: Mapping[str, pa.Schema] = {
    "records": RECORDS,
    "samples": SAMPLES,
    "activations": ACTIVATIONS,
}


def rows(schema: pa.Schema, values: Iterable[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows of `schema`; keys that are absent become null.

    Raises:
        KeyError: for a key that is no column of `schema`.
    """
    values = list(values)
    known = set(schema.names)
    for value in values:
        if unknown := value.keys() - known:
            raise KeyError(f"no such column: {', '.join(sorted(unknown))}")
    return pa.RecordBatch.from_pylist([dict(value) for value in values], schema=schema)
