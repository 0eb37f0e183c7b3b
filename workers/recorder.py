"""One terminal row per trial, made in one place for every outcome.

The host of an engine writes the rows of trials it ran; the driver writes those of trials
that never reached an engine and of those whose host died. Both start from the same
columns, so a failure carries as much of its configuration as a success. No row carries a
secret (`workers.secrecy`), whoever wrote the words in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from workers.contract import reading
from workers.contract.engine import StandIn
from workers.contract.errors import OutOfMemory, TrialError
from workers.contract.job import Job, Ticket
from workers.contract.measurement import Measurement, Memory, Pass
from workers.contract.model import Model
from workers.contract.outcome import Outcome
from workers.contract.probed import PHASES, Probed
from workers.contract.record import ACTIVATIONS, RECORDS, SAMPLES, SCHEMA_VERSION, rows
from workers.contract.trial import Trial
from workers.hardware.host import Host
from workers.metrics import figures
from workers.moe.architecture import UnknownModel, Unread, configuration, run_dtype, structure
from workers.moe.partial import Partial, partial
from workers.moe.storage.found import quantization
from workers.moe.structure import Architecture
from workers.secrecy import hide, hide_json, hide_text, known_secrets

_GIB = 2**30


def ok(
    job: Job,
    ticket: Ticket,
    measurement: Measurement,
    architecture: Architecture | Partial,
    utilisations: Mapping[str, Any],
    measured: bool = True,
    **columns: Any,
) -> pa.RecordBatch:
    """The row of a trial that was measured, or predicted by an engine that only predicts.

    Args:
        utilisations: of `workers.usage`.
        measured: false where the passes were predicted.
        columns: further columns of the row.
    """
    derived = figures(measurement, output_tokens=ticket.trial.workload.output_tokens)
    started = min(one.started_at for one in measurement.passes)
    return _row(
        job,
        ticket,
        "ok",
        architecture,
        {
            "measured": measured,
            "started_at": datetime.fromtimestamp(started, UTC),
            **_memory(measurement.memory),
            "preemptions": _preemptions(measurement.of("timed")),
            **derived,
            **utilisations,
            **columns,
        },
    )


def failed(
    job: Job,
    ticket: Ticket,
    error: TrialError,
    architecture: Architecture | Partial | None = None,
    **columns: Any,
) -> pa.RecordBatch:
    """The row of a trial that ended in any other way."""
    if isinstance(error, OutOfMemory):
        columns |= {
            "oom_stage": error.stage,
            "oom_scope": error.scope,
            "oom_bytes": error.requested_bytes,
        }
    return _row(job, ticket, error.outcome, architecture, {"outcome_reason": str(error), **columns})


def skipped(job: Job, ticket: Ticket, witness: str, **columns: Any) -> pa.RecordBatch:
    """The row of a trial that was not run, because it needs no less memory than one that ran
    out of it.

    Args:
        witness: trial_id of that one.
        columns: further columns, among them the device that it stands for: a resumed run
            takes the row for its own only with the witness, and on the same device.
    """
    reason = (
        f"needs at least the memory of trial {witness}, which ran out of it: same engine "
        f"settings, form of model and class of device ({ticket.trial.layout.device or job.profile}"
        "), no dimension smaller"
    )
    return _row(
        job, ticket, "skipped", None, {"outcome_reason": reason, "skipped_by": witness, **columns}
    )


def samples(
    job: Job, ticket: Ticket, measurement: Measurement, probed: Probed | None = None
) -> pa.RecordBatch:
    """Every pass as observed, one row each; after them those whose experts were counted."""
    whose = {"run_id": job.run_id, "trial_id": ticket.trial_id, "attempt": ticket.attempt}
    return rows(
        SAMPLES,
        [
            {
                **whose,
                "kind": one.kind,
                "repeat": one.repeat,
                "started_at": datetime.fromtimestamp(one.started_at, UTC),
                "e2e_s": one.e2e_s,
                "batch_size": one.batch_size,
                "input_tokens": one.input_tokens,
                "output_tokens": one.output_tokens,
                "token_s": one.token_s,
                "step_s": one.step_s,
                "preempted": one.preempted,
                **_drafted(one),
                "counted": None if one.kind == "warmup" else one.counted,
                "disturbed": one.disturbed,
                "disturbed_reason": one.disturbed_reason,
                **reading.columns(one.reading),
            }
            for one in measurement.passes
        ]
        + [
            {
                **whose,
                "kind": "probe",
                "repeat": repeat,
                "batch_size": len(trace.tokens),
                "input_tokens": ticket.trial.workload.input_tokens,
                "output_tokens": sum(len(row) for row in trace.tokens),
                "pass_s": [step.seconds for step in trace.steps],
                "pass_new": [step.new for step in trace.steps],
                "pass_context": [step.context for step in trace.steps],
                "pass_decoding": [step.decoding for step in trace.steps],
                "pass_experts": [step.activated for step in trace.steps],
                "pass_busiest": [step.busiest for step in trace.steps],
            }
            for repeat, trace in (probed.traces if probed is not None else {}).items()
        ],
    )


def activations(job: Job, ticket: Ticket, probed: Probed) -> pa.RecordBatch | None:
    """Tokens by phase, layer and expert, over all passes that were counted; null without one.

    A phase without tokens has no rows; of one that has, every expert of every MoE layer.
    """
    found = []
    for phase in PHASES:
        total = probed.counts(phase)
        if total is None or not total.any():
            continue
        layers, experts = np.indices(total.shape)
        found.append(
            pa.RecordBatch.from_pydict(
                {
                    "run_id": [job.run_id] * total.size,
                    "trial_id": [ticket.trial_id] * total.size,
                    "phase": [phase] * total.size,
                    "layer": np.array(probed.layers)[layers.ravel()],
                    "expert": experts.ravel(),
                    "tokens": total.ravel(),
                },
                schema=ACTIVATIONS,
            )
        )
    return pa.concat_batches(found) if found else None


def where(host: Host, stand_in: StandIn | None = None) -> dict[str, Any]:
    """Columns that name the machine and its software, or what an engine speaks for instead."""
    if stand_in is not None:
        return {
            "engine_version": stand_in.version,
            "device": stand_in.device,
            "host": host.hostname,
        }
    return {
        "engine_version": host.engine_version,
        "torch_version": host.torch_version,
        "device": host.device,
        "device_digest": host.device_digest,
        "device_facts": host.device_facts,
        "host": host.hostname,
    }


def _row(
    job: Job,
    ticket: Ticket,
    outcome: Outcome,
    architecture: Architecture | Partial | None,
    columns: dict[str, Any],
) -> pa.RecordBatch:
    trial = ticket.trial
    speculative = trial.engine.speculative
    prune = trial.model.prune
    row: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "sweep": job.sweep,
        "run_id": job.run_id,
        "trial_id": ticket.trial_id,
        "group_id": job.group_id,
        "attempt": ticket.attempt,
        "axes": json.dumps(ticket.axes, sort_keys=False),
        "outcome": outcome,
        "log": job.log_name,
        "profile": job.profile,
        "measured": False,
        "engine": trial.engine.kind,
        "device_count": trial.layout.devices,
        "side_by_side": job.side_by_side,
        "side_by_side_ratio": job.side_by_side_ratio,
        "finished_at": datetime.now(UTC),
        "model": trial.model.name,
        "revision": trial.model.revision,
        "weights": trial.model.weights,
        "scale": trial.model.scale,
        "dtype": trial.model.dtype,
        "quantization": trial.model.quantization,
        "kv_cache_dtype": _cache_dtype(trial.engine.args),
        "trust_remote_code": trial.model.trust_remote_code,
        "prune_kind": prune.kind if prune else None,
        "prune_ratio": prune.ratio if prune else None,
        "prune_criterion": prune.criterion
        if prune and trial.model.weights == "checkpoint"
        else None,
        "tensor_parallel": trial.layout.tensor,
        "pipeline_parallel": trial.layout.pipeline,
        "data_parallel": trial.layout.data,
        "expert_parallel": trial.layout.expert,
        "routing": trial.engine.routing,
        "moe_backend": trial.engine.moe_backend,
        "eager": trial.engine.eager,
        "speculative": speculative.model if speculative else None,
        "draft_tokens": speculative.tokens if speculative else None,
        "batch_size": trial.workload.batch_size,
        "input_tokens": trial.workload.input_tokens,
        "output_tokens": trial.workload.output_tokens,
        "temperature": trial.workload.temperature,
        "seed": trial.workload.seed,
        "dataset": trial.workload.dataset,
        "memory_limit_gib": trial.engine.memory_limit_gib,
        **ticket.digests,
        **ticket.predicted,
        **_structure(ticket, architecture),
    }
    row |= {k: v for k, v in columns.items() if v is not None}
    return rows(RECORDS, [_publishable(row, trial.engine.args)])


def _publishable(row: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The row without secrets, in the columns that quote what others wrote.

    Args:
        args: the trial's own arguments to the engine, which may hold some.
    """
    known = known_secrets(args)
    row["axes"] = json.dumps(hide(json.loads(row["axes"]), known=known))
    if row.get("engine_args"):
        row["engine_args"] = hide_json(row["engine_args"], known)
    if row.get("outcome_reason"):
        row["outcome_reason"] = hide_text(row["outcome_reason"], known)
    return row


def _structure(ticket: Ticket, architecture: Architecture | Partial | None) -> dict[str, Any]:
    """Dimensions that ran or, where nothing did, would have run."""
    model = ticket.trial.model
    a = architecture or _would_run(ticket.trial)
    if a is None:
        return {}
    if isinstance(a, Partial):
        return {
            "num_layers": a.num_layers,
            "hidden_size": a.hidden_size,
            "num_experts": a.num_experts,
            "top_k": a.top_k,
            "dtype": run_dtype(a, model),
            "quantization": _quantization(a, model),
        }
    return {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_dim": a.ffn_dim,
        "num_experts": a.num_experts,
        "top_k": a.top_k,
        "shared_experts": a.shared_experts,
        "dtype": run_dtype(a, model),
        "quantization": _quantization(a, model),
        "params_total": a.params_total if a.exact else None,
        "params_active": a.params_active if a.exact else None,
    }


def _would_run(trial: Trial) -> Architecture | Partial | None:
    try:
        return structure(trial)
    except Unread as error:
        config = configuration(trial.model.name, trial.model.revision)
        return partial(config, str(error)) if config is not None else None
    except (TrialError, UnknownModel):
        return None


def _quantization(a: Architecture | Partial, model: Model) -> str | None:
    """The one asked for, else the checkpoint's own."""
    try:
        stored = quantization(a.config)
    except ValueError:  # it cannot be read, and so has no name
        stored = None
    return model.quantization or (str(stored["quant_method"]) if stored else None)


def _cache_dtype(args: dict[str, Any]) -> str | None:
    """What a trial asks for by name; what follows from the model is known where it ran."""
    asked = args.get("kv_cache_dtype")
    return asked if isinstance(asked, str) and asked != "auto" else None


def _preemptions(passes: Sequence[Pass]) -> int | None:
    """Of all together; null where one of them does not tell."""
    told = [one.preempted for one in passes if one.preempted is not None]
    return sum(told) if told and len(told) == len(passes) else None


def _drafted(one: Pass) -> dict[str, int]:
    if one.drafted is None:
        return {}
    return {
        "draft_steps": one.drafted.steps,
        "draft_tokens": one.drafted.proposed,
        "draft_accepted": one.drafted.accepted,
    }


def _memory(memory: Memory) -> dict[str, float | None]:
    sizes = {
        "weights_gib": memory.weights,
        "kv_cache_gib": memory.kv_cache,
        "peak_memory_gib": memory.peak,
        "memory_limit_gib": memory.limit,
    }
    return {name: None if size is None else size / _GIB for name, size in sizes.items()}
