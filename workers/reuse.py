"""Experts of a trial from activation sheets: a probe makes one, a trial that asks takes one.

What a sheet holds for is known where the engine runs: the structure that it loaded, its
version, the weights and texts on its disk. So the key is made here, on either way. The
driver, whose disk the sheets are on, hands over those that may fit and keeps those that come.

A sheet speaks of passes as they were put together when it was made. Where the same batch goes
through the engine in other passes, under another budget of tokens for instance, its numbers
mean nothing, and the phase is left out with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from workers import usage
from workers.contract.fingerprint import fingerprint
from workers.contract.measurement import Pass
from workers.contract.model import Model
from workers.contract.probed import PHASES, Phase, Probed
from workers.contract.trial import Trial
from workers.moe.architecture import run_dtype
from workers.moe.content import content, tokenizer
from workers.moe.partial import Partial
from workers.moe.sheets import Sheet, SheetKey, alike, find, sheet, structure_of, why_none
from workers.moe.structure import Architecture
from workers.secrecy import hide, known_secrets
from workers.texts import TextError, digest

_COST_ONLY = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "disable_log_stats",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_cudagraph_capture_size",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "safetensors_load_strategy",
        "swap_space",
    }
)
"""Arguments of the engine that move time and memory, or how passes are put together, and not
what is computed. Every other one counts as if it did."""


def key_of(trial: Trial, a: Architecture, version: str) -> SheetKey:
    """What a sheet of this trial holds for.

    The seed of the prompts is no part of it: a sheet is of a source of prompts, not of the very
    prompts. Neither are layout, kernels and graphs, which only round otherwise; but random
    weights are drawn for a layout, by a version of an engine.

    Args:
        trial: what was asked for.
        a: structure that ran.
        version: of the engine.

    Raises:
        TextError: the source of prompts cannot be read.
    """
    model, layout, engine, workload = trial.model, trial.layout, trial.engine, trial.workload
    weights = content(model).digest
    if model.weights == "dummy":
        weights = f"{weights} drawn by {engine.kind} {version} for tensor {layout.tensor}"
        weights += f", data {layout.data}" if layout.data > 1 else ""
        weights += ", experts spread" if layout.expert else ""
    args = {name: value for name, value in engine.args.items() if name not in _COST_ONLY}
    if model.trust_remote_code:
        args["trust_remote_code"] = True
    prune = model.prune
    return SheetKey(
        model=model.name,
        revision=model.revision,
        weights=model.weights,
        content=weights,
        structure=structure_of(a),
        engine=engine.kind,
        dtype=run_dtype(a, model),
        quantization=model.quantization,
        prune=f"{prune.kind} {prune.ratio:g} by {prune.criterion}" if prune else None,
        args=fingerprint(hide(args, known=known_secrets(args))) if args else None,
        dataset=workload.dataset,
        texts=_texts(model, workload.dataset) if workload.dataset is not None else None,
        routing=engine.routing,
        temperature=float(workload.temperature),
        batch_size=workload.batch_size,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
    )


def made(
    trial: Trial, a: Architecture | Partial, version: str, probed: Probed | None, *, source: str
) -> Sheet | None:
    """The sheet of what a probe found; null where it found nothing.

    Args:
        source: dataset, run and trial, for people.
    """
    if probed is None or not probed.traces or isinstance(a, Partial):
        return None
    steps = {name: usage.steps_of(probed.traces.values(), name) for name in PHASES}
    if not any(steps.values()):
        return None
    mean = {
        name: np.mean([one.activated for one in seen], axis=0).tolist() if seen else None
        for name, seen in steps.items()
    }
    tokens = {name: sum(int(one.new.sum()) for one in seen) for name, seen in steps.items()}
    try:
        key = key_of(trial, a, version)
    except TextError:  # gone since its prompts were cut
        return None
    return sheet(
        a,
        key,
        decode=mean["decode"],
        prefill=mean["prefill"],
        decode_passes=len(steps["decode"]),
        decode_tokens=tokens["decode"],
        prefill_passes=len(steps["prefill"]),
        prefill_tokens=tokens["prefill"],
        settled=probed.settled,
        source=source,
    )


def taken(
    trial: Trial,
    a: Architecture | Partial,
    version: str,
    sheets: Sequence[Sheet],
    timed: Sequence[Pass],
) -> tuple[Sheet | None, str | None]:
    """The sheet for a trial, without the phases that it does not hold for, and what of the trial
    is therefore not known; null where all is.

    Args:
        sheets: all that may fit; of several with one key the last stands.
        timed: timed passes of the trial.
    """
    if isinstance(a, Partial):
        return None, f"which experts ran is not known: {a.reason}"
    if a.moe is None or trial.engine.speculative is not None:
        return None, None  # there is nothing to look up, or nothing that it could be used for
    try:
        key = key_of(trial, a, version)
    except TextError as error:
        return None, f"which experts ran is not known: {error}"
    found = find(sheets, key)
    if found is None:
        return None, (
            f"which experts ran is not known, no activation sheet fits: {why_none(sheets, key)}; "
            "probe it with measure.activation: true, then repeat this with --fresh"
        )
    passes = [usage.in_step(one, trial.layout.data) for one in timed]
    reasons = []
    for phase in PHASES:
        theirs, ours = found.tokens_per_pass(phase), usage.tokens_per_pass(passes, phase)
        if theirs is not None and ours is not None and not alike(theirs, ours):
            reasons.append(f"{phase} passes of {theirs:g} tokens, here they have {ours:g}")
            found = _without(found, phase)
    if found.decode is None and found.prefill is None:
        return None, f"which experts ran is not known, the sheet is of {' and '.join(reasons)}"
    return found, f"the activation sheet is of {' and '.join(reasons)}" if reasons else None


def _texts(model: Model, dataset: str) -> str:
    """Digest of the texts and of what makes tokens of them."""
    tokens = tokenizer(model).digest
    return digest(dataset) if tokens is None else f"{digest(dataset)} in tokens of {tokens}"


def _without(one: Sheet, phase: Phase) -> Sheet:
    return replace(one, decode=None) if phase == "decode" else replace(one, prefill=None)
