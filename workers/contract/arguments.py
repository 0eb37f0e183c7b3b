"""`engine.args` beside the fields of a trial: nothing is asked for twice, and differently.

Arguments of vLLM go to the engine as they are. Some name what a trial has a field for (the tensor
degree, the type of the weights), some are needed for measuring at all. An argument that won over a
field would leave plan, prediction and record with the field's value and the engine with another;
so one that contradicts a field is a mistake in the sweep. One that merely repeats it is dropped.
A block that both sides write (`hf_overrides`, `additional_config`, `compilation_config`) is
merged entry by entry. `engine.args.seed` is not among them: it is of the engine's random numbers,
`workload.seed` of the prompts. Nor are `max_num_seqs` and `max_model_len`, which are a trial's own
to choose: the roofline and `workers.moe.positions` take them into account.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workers.contract.engine import UNFUSED
from workers.contract.errors import Contradiction
from workers.contract.trial import Trial

FIELDS: Mapping[str, tuple[str, Callable[[Trial], Any]]] = {
    "model": ("model.name", lambda trial: trial.model.name),
    "revision": ("model.revision", lambda trial: trial.model.revision),
    "dtype": ("model.dtype", lambda trial: trial.model.dtype),
    "quantization": ("model.quantization", lambda trial: trial.model.quantization),
    "tensor_parallel_size": ("layout.tensor", lambda trial: trial.layout.tensor),
    "pipeline_parallel_size": ("layout.pipeline", lambda trial: trial.layout.pipeline),
    "data_parallel_size": ("layout.data", lambda trial: trial.layout.data),
    "enable_expert_parallel": ("layout.expert", lambda trial: trial.layout.expert),
    "enforce_eager": ("engine.eager", lambda trial: trial.engine.eager),
    "moe_backend": ("engine.moe_backend", lambda trial: trial.engine.moe_backend),
}
"""Argument → the field of a trial that says the same."""
_SPECULATION = "write engine.speculative, whose args take the engine's further settings"
REFUSED: Mapping[str, str] = {
    "convert": "a sweep measures generation, and this makes something else of a model",
    "hf_config_path": "the configuration is that of model.name; use hf_overrides to change it",
    "prefill_context_parallel_size": "it takes devices that layout does not ask for",
    "spec_method": _SPECULATION,
    "spec_model": _SPECULATION,
    "spec_tokens": _SPECULATION,
    "speculative_config": _SPECULATION,
    "tokenizer": "prompts are token ids, made with the model's own tokenizer where they are text",
    "worker_cls": "the measurement works through a worker of its own",
    "worker_extension_cls": "the measurement works through an extension of its own",
}
"""Arguments that no trial can carry, and why."""
KINDS = ("vllm", "roofline")
"""Engines whose arguments are vLLM's."""


def check(trial: Trial) -> None:
    """Whether the arguments of a trial's engine go with its fields.

    Raises:
        Contradiction: one says something else than a field, or is none that a trial can carry.
    """
    settings = trial.engine
    args = settings.args
    if settings.kind not in KINDS:
        return
    for name in FIELDS.keys() & args.keys():
        field, value = FIELDS[name][0], FIELDS[name][1](trial)
        if args[name] != value:
            raise _contradiction(name, args[name], f"{field} is {_told(value)}: write {field}")
    for name in REFUSED.keys() & args.keys():
        raise Contradiction(f"engine.args.{name}: not here; {REFUSED[name]}", f"engine.args.{name}")
    dummy = trial.model.weights == "dummy"
    if "load_format" in args and (args["load_format"] == "dummy") is not dummy:
        weights = f"model.weights is {trial.model.weights}: write model.weights"
        raise _contradiction("load_format", args["load_format"], weights)
    if (runner := args.get("runner", "auto")) not in ("auto", "generate"):
        raise _contradiction("runner", runner, "a sweep measures generation")
    overrides = args.get("hf_overrides", {})
    if not isinstance(overrides, Mapping):
        raise _contradiction("hf_overrides", overrides, "it is a block of keys")
    _check_memory(trial)
    _check_graphs(trial)
    _check_speculation(trial)


def given(trial: Trial) -> dict[str, Any]:
    """Arguments of the sweep that no field of the trial says already."""
    return {name: value for name, value in trial.engine.args.items() if name not in FIELDS}


def joined(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the project under those of the sweep; blocks of both are merged.

    Raises:
        Contradiction: both set one entry of a block, and differently.
    """
    result = dict(ours)
    for name, value in given.items():
        mine = ours.get(name)
        if isinstance(mine, Mapping) and mine:
            value = merged(mine, value, f"engine.args.{name}")
        result[name] = value
    return result


def merged(ours: Mapping[str, Any], theirs: Any, key: str) -> dict[str, Any]:
    """A block that the project and the sweep both write, entry by entry.

    Args:
        ours: what the project writes.
        theirs: what stands under `key` in the sweep.
        key: dotted.

    Raises:
        Contradiction: both set one entry, and differently; or `theirs` is no block.
    """
    if not isinstance(theirs, Mapping):
        wanted = ", ".join(ours)
        raise Contradiction(f"{key} is {_told(theirs)}, but the trial sets {wanted} in it", key)
    result = dict(ours)
    for name, value in theirs.items():
        inner, mine = f"{key}.{name}", ours.get(name)
        if name in ours and isinstance(mine, Mapping):
            result[name] = merged(mine, value, inner)
        elif name in ours and mine != value:
            raise Contradiction(
                f"{inner} is {_told(value)}, but the trial's own fields set it to {_told(mine)}",
                inner,
            )
        else:
            result[name] = value
    return result


def _check_memory(trial: Trial) -> None:
    args, limit = trial.engine.args, trial.engine.memory_limit_gib
    if limit is None:
        return
    if "gpu_memory_utilization" in args:
        bound = f"engine.memory_limit_gib is {limit}: both bound one device's memory, keep one"
        raise _contradiction("gpu_memory_utilization", args["gpu_memory_utilization"], bound)
    cache = args.get("kv_cache_memory_bytes")
    if isinstance(cache, int) and cache > limit * 2**30:
        most = f"engine.memory_limit_gib {limit} is {limit * 2**30:,.0f} bytes for all"
        raise _contradiction("kv_cache_memory_bytes", cache, most)


def _check_graphs(trial: Trial) -> None:
    """Experts one by one are run without graphs: their numbers of tokens are read on the host."""
    given = trial.engine.args.get("compilation_config")
    if trial.engine.moe_backend == UNFUSED and not trial.engine.eager and given is not None:
        merged({"cudagraph_mode": "NONE"}, given, "engine.args.compilation_config")


def _check_speculation(trial: Trial) -> None:
    """What a draft's further settings say of its own fields."""
    asked = trial.engine.speculative
    if asked is None:
        return
    said = {"num_speculative_tokens": ("tokens", asked.tokens), "method": ("method", asked.way)}
    said["model"] = ("model", asked.model)
    for name in said.keys() & asked.args.keys():
        field, value = said[name]
        if asked.args[name] != value:
            key = f"engine.speculative.args.{name}"
            raise Contradiction(
                f"{key} is {_told(asked.args[name])}, but engine.speculative.{field} is "
                f"{_told(value)}: write engine.speculative.{field}",
                key,
            )


def _contradiction(name: str, value: Any, but: str) -> Contradiction:
    key = f"engine.args.{name}"
    return Contradiction(f"{key} is {_told(value)}, but {but}", key)


def _told(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
