"""vLLM, on CPU and on CUDA, stepped by hand.

The engine core runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`, `vllm_stepper`): the
root cause of a failure arrives as itself, a dead engine cannot leave the caller waiting on a
queue, and the next engine is built in seconds because imports are already paid. Tensor- and
pipeline-parallel ranks are processes of vLLM's own, data-parallel replicas of ours
(`vllm_replicas`).

Stepping it ourselves gives a stamp per token and per forward pass at the cost of one
clock reading each. Lengths are exact: token ids in, end-of-sequence ignored, no tokenizer,
no prefix cache. Nothing of vLLM is imported before an engine is built.

Start-up on CUDA is kept short by what the group's own workloads tell: graphs are captured
for the batch sizes that occur and for no others, the token budget of a pass is what the
largest prompt batch fills, checkpoints are read ahead, and compiled code is shared between
engines. Whatever a sweep says in `engine.args` wins over these; what a trial's own fields say, it
must not contradict (`workers.contract.arguments`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from workers import caches, given
from workers.contract import arguments
from workers.contract.engine import DRAFT_MODEL, MODELLESS, UNFUSED, StandIn
from workers.contract.errors import Crashed, Infeasible, OutOfMemory, TrialError, Unsupported
from workers.contract.layout import Layout
from workers.contract.measurement import Memory, Pass, PassKind
from workers.contract.model import Model
from workers.contract.outcome import OomStage
from workers.contract.trace import Trace, per_request
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines import hub_files
from workers.engines.base import Loaded, Site
from workers.engines.pruned import pruned_folder
from workers.engines.vllm_limit import LIMIT_KEY
from workers.engines.vllm_replicas import Replicas
from workers.engines.vllm_stepper import Batch, Done, Output, Stepper, clean, explained
from workers.hardware import host
from workers.hardware.reference import Reference, together
from workers.hardware.roofline import CPU_BLOCK
from workers.moe import drafts, generators, hub, positions
from workers.moe.accounting import kv_cache_bytes
from workers.moe.architecture import (
    SHAPE,
    UnknownModel,
    Unread,
    bend,
    catalogue_name,
    configuration,
    run_dtype,
    structure,
)
from workers.moe.families import read
from workers.moe.overrides import KEY, changes
from workers.moe.overrides import of as overrides_of
from workers.moe.partial import Partial, understood
from workers.moe.precision import Precision, precision, skeleton
from workers.moe.pruning import cache
from workers.moe.skew import parse
from workers.moe.structure import Architecture
from workers.texts import Tokenizer

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set before vLLM is imported."""
RANKS: dict[bool, tuple[str, ...]] = {
    True: ("vllm.v1.worker.cpu_worker",),
    False: (
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu.model_runner",
        "vllm.v1.worker.gpu_model_runner",
        "vllm.distributed.device_communicators.cuda_communicator",
    ),
}
"""On a CPU or not → modules of vLLM that a rank imports when it is built. They must open no device:
a process that has used CUDA cannot fork one that does."""
LEAST_TOKEN_BUDGET = 8192
"""Prompt tokens that vLLM's offline default takes into one pass on any GPU; on large ones it
is twice that. A smaller budget is set only where no workload fills this one."""
_FORMATS = (None, "auto", "safetensors", "pt", "dummy")
"""Load formats that read the files of a folder; of others the engine knows what they need."""
_CACHE_ARGS = ("kv_cache_memory_bytes", "num_gpu_blocks_override")
"""Arguments that set the size of the KV cache: a sweep that gives one asks for what comes of it."""
SPARED = 1 / 8
"""More than the share by which a KV cache grows when larger workloads leave the group: they take
the memory of a larger pass, and of its graphs."""
_GRAPH_ARGS = ("compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size")
"""Arguments that decide on captured sizes; vLLM refuses two of them together."""


class VllmEngine:
    """One vLLM engine; see `workers.engines.base.Engine`."""

    loaded: Loaded
    _refused: ClassVar[TrialError | None] = None
    """Why vLLM could not be imported by this process, or the one that it was forked from. A
    second try finds half of the modules there and says something else."""

    def __init__(self, trial: Trial, workloads: Sequence[Workload], site: Site) -> None:
        self._stage: OomStage = "load"
        self._output = Output()
        self._vllm: Stepper | Replicas | None = None
        self._tokenizer: Tokenizer | None = None
        self._sources: dict[Model, _Source] = {}
        self._trial = trial
        self.prepare()
        from vllm.platforms import current_platform

        self._on_cpu = bool(current_platform.is_cpu())
        if self._on_cpu:
            _bind_threads(trial.layout)
        self._limit_gib = trial.engine.memory_limit_gib
        failure: TrialError | None = None
        try:
            self.loaded = self._build(trial, workloads)
        except Exception as error:  # noqa: BLE001  the edge: whatever comes becomes an outcome
            failure = self._explain(error)
        if failure is not None:
            # Raised out here, without the engine's exception: its traceback holds the
            # frames, and with them the half-built model.
            self.close()
            raise failure.with_traceback(None)

    @classmethod
    def prepare(cls) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("NCCL_DEBUG", "WARN")  # else it says that it failed, and not why
        root = Path(os.environ.get("VLLM_CACHE_ROOT") or caches.home() / "vllm").expanduser()
        # Its default is the place for temporary files, which goes with every engine.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / "inductor"))
        if cls._refused is not None:
            raise cls._refused.with_traceback(None)
        try:
            import_module("vllm.v1.engine.llm_engine")
            from vllm import LLM
            from vllm.platforms import current_platform

            assert LLM, "an import that is not used would be taken for an accident"
            # Otherwise imported by each engine and each of its ranks, and counted in the load.
            for module in RANKS[current_platform.is_cpu()]:
                import_module(module)
        except Exception as error:
            kind = Unsupported if isinstance(error, ImportError) else Crashed
            cls._refused = kind(f"vLLM cannot be imported: {type(error).__name__}: {error}")
            raise cls._refused from error

    @classmethod
    def check_forkable(cls) -> None:
        """Whether forks of this process can use CUDA.

        Raises:
            Crashed: this process has used it. Engines of its forks raise the same.
        """
        import torch

        if torch.cuda.is_initialized():
            cls._refused = Crashed("vLLM cannot be forked: its import has used CUDA")
            raise cls._refused

    @classmethod
    def files(cls, trial: Trial) -> tuple[str, ...]:
        """Folders (or names that the engine alone knows) of the models that a trial loads, which
        are fetched or made where they are not on this machine yet.

        Raises:
            TrialError: they cannot be had.
        """
        named = [_source(trial.model, trial.engine.args.get("load_format")).model]
        if trial.engine.speculative is not None:
            named += filter(None, [_speculative(trial).get("model")])
        return tuple(named)

    @classmethod
    def stands_for(cls, device: str) -> StandIn | None:
        return None

    @classmethod
    def refuses(cls, trial: Trial) -> str | None:
        asked = {
            "workload.arrivals": trial.workload.arrivals,
            "measure.accuracy": trial.measure.accuracy,
            "measure.energy": trial.measure.energy,
        }
        for key, value in asked.items():
            if value:
                return f"engine vllm does not carry {key} in this version"
        if trial.engine.moe_backend == UNFUSED and trial.model.quantization is not None:
            return (
                f"engine.moe_backend {UNFUSED} multiplies by plain weights, and model.quantization "
                f"is {trial.model.quantization}"
            )
        if trial.engine.routing is not None:
            try:
                parse(trial.engine.routing)
            except ValueError as error:
                return f"engine.routing: {error}"
        model = trial.model
        if model.weights == "checkpoint" and (model.ffn_dim or model.num_experts):
            return (
                "a checkpoint's weights have the shape they have: ffn_dim and num_experts "
                "bend skeletons (weights: dummy)"
            )
        try:
            arguments.check(trial)
            generators.check(trial)
            positions.limit(trial).check(trial.workload)
            with suppress(Unread):  # the engine may know what to make of it
                structure(trial)  # which says whether overrides contradict the model's fields
                drafts.check(trial, _file)
        except UnknownModel as error:
            return str(error)
        return None

    def become(self, trial: Trial) -> bool:
        """Changes top-k where `vllm_worker.Report.set_top_k` can, on an eager engine.

        A compiled or captured graph holds top-k as a constant; a draft model has layers of
        its own; pipeline stages and spread experts were not checked.
        """
        before = self._trial
        wanted = _structure(trial)
        if wanted is None or _weights_of(trial) != _weights_of(before):
            return False
        layout = trial.layout
        if layout.devices != layout.tensor or layout.expert or trial.engine.speculative:
            return False
        assert isinstance(self._vllm, Stepper), "several replicas are more devices"
        config = self._vllm.engine.vllm_config
        if config.compilation_config.mode.name != "NONE" or not config.model_config.enforce_eager:
            return False
        try:
            answers = self._vllm.rpc("set_top_k", wanted.top_k)
        except Exception as error:  # noqa: BLE001  the engine goes, a new one will tell
            answers = [str(error)]
        if reasons := [one for one in answers if one is not None]:
            print(f"top-k stays as it was built: {reasons[0]}")
            return False
        runs = self.loaded.architecture.config
        self._trial = trial
        self.loaded = replace(
            self.loaded,
            architecture=read(bend(runs, Model(name=trial.model.name, top_k=wanted.top_k))),
            args=self.loaded.args | {"hf_overrides": _overrides(trial, self._from(trial))},
        )
        return True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        *,
        kind: PassKind,
        repeat: int,
        temperature: float = 0.0,
    ) -> Pass:
        self._stage = "warmup" if kind == "warmup" else "run"
        batch = Batch(
            prompts=prompts, lengths=[output_tokens] * len(prompts), temperature=temperature
        )
        done = self._send(batch)
        return Pass(
            kind=kind,
            repeat=repeat,
            started_at=done.started_at,
            e2e_s=max(row[-1] for row in done.stamps),
            input_tokens=len(prompts[0]),
            token_s=tuple(tuple(row) for row in done.stamps),
            step_s=tuple(done.steps),
            preempted=done.preempted,
            drafted=done.drafted,
        )

    def trace(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int | Sequence[int],
        *,
        routes: bool = False,
        temperature: float = 0.0,
    ) -> Trace:
        self._stage = "run"
        outputs = per_request(output_tokens, len(prompts))
        runs = self.loaded.architecture
        if isinstance(runs, Partial):
            raise Unsupported(runs.reason)
        if runs.moe is None:
            raise Unsupported("a model without experts has no routing to trace")
        batch = Batch(prompts=prompts, lengths=outputs, temperature=temperature)
        with self._failing():
            trace = self._running.trace(batch, runs.num_experts, runs.top_k, routes)
        where = tuple(i for i, layer in enumerate(runs.layers) if layer.experts)
        if trace.layers != where:  # a layer of a kind of its own would go unseen
            raise Unsupported(f"vLLM routes in layers {trace.layers}, not in {where}")
        return trace

    def _send(self, batch: Batch) -> Done:
        with self._failing():
            if isinstance(self._running, Replicas):
                return self._running.send(batch, self._stage)
            return self._running.send(batch)

    @property
    def _running(self) -> Stepper | Replicas:
        assert self._vllm is not None, "it is closed"
        return self._vllm

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Has failures come out as what they stand for."""
        try:
            yield
        except TrialError:
            raise
        except Exception as error:
            raise self._explain(error) from error

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            model = self._trial.model
            source = self._from(self._trial)
            name, hub_id = source.model, drafts.hub_id(model)
            if hub_id is not None and model.weights == "checkpoint" and model.prune is None:
                code = model.trust_remote_code
                name = str(hub_files.folder(hub_id, model.revision, "tokenizer", code=code))
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    name, revision=source.revision, trust_remote_code=model.trust_remote_code
                )
            except (OSError, ValueError, ImportError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise Infeasible(
                    f"workload.dataset needs the tokenizer of {model.name}: {reason[:200]}"
                ) from error
        return self._tokenizer

    def reference(self) -> Reference | None:
        try:
            return together(self._running.rpc("report_reference"))
        except Exception as error:  # noqa: BLE001  a dead engine tells at its next pass
            print(f"the reference load did not run: {error}")
            return None

    def memory(self) -> Memory:
        with self._failing():
            return self._read_memory()

    def close(self) -> None:
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None
        if self._trial.layout.data == 1:  # replicas are processes of their own
            clean()

    def _build(self, trial: Trial, workloads: Sequence[Workload]) -> Loaded:
        from workers.engines import vllm_routing

        replicas = trial.layout.data
        # Each has its share of every batch.
        shares = [replace(one, batch_size=-(-one.batch_size // replicas)) for one in workloads]
        args = self._arguments(trial, shares)
        vllm_routing.force(trial.engine.routing)
        if replicas == 1:
            self._vllm = Stepper(args)
        else:
            known = _structure(trial)
            self._vllm = Replicas(
                args,
                trial.layout,
                together=known is None or known.moe is not None,
                on_cpu=self._on_cpu,
                limited=self._limit_gib is not None,
                output=self._output,
            )
            args["data_parallel_size"] = replicas
        kernels = sorted({one for rank in self._vllm.rpc("report_kernels") for one in rank})
        if trial.engine.moe_backend == UNFUSED and kernels != ["UnfusedExperts"]:
            raise Unsupported(
                f"moe_backend {UNFUSED} is for plain experts; these run {', '.join(kernels)}"
                if kernels
                else f"moe_backend {UNFUSED}: a model without experts"
            )
        configs = sorted({one for rank in self._vllm.rpc("report_moe_configs") for one in rank})
        runs = _ran(self._vllm)
        _check_shape(trial, runs)
        draft = drafts.draft(trial)
        return Loaded(
            version=host.engine_version() or "unknown",
            args=_told(args, trial.model.name, draft.name if draft else None),
            architecture=runs,
            threads=min(self._vllm.rpc("report_threads")) if self._on_cpu else None,
            moe_kernel=", ".join(kernels) or None,
            **self._crowded(trial, workloads),
            moe_config="; ".join(configs) or None,
        )

    def _crowded(self, trial: Trial, workloads: Sequence[Workload]) -> dict[str, Any]:
        """`too_large` and `too_tight` of what is loaded."""
        lacking: dict[Workload, tuple[float, OutOfMemory]] = {}
        if not trial.engine.args.keys() & set(_CACHE_ARGS):
            for one in dict.fromkeys(workloads):
                share = -(-one.batch_size // trial.layout.data)
                asked = max(_waves(share, trial.engine.args))
                held = self._running.holds(one.tokens_per_request)
                if held is not None and held < asked:
                    each = " of each replica" if trial.layout.data > 1 else ""
                    reason = (
                        f"the KV cache holds {held} of the {asked} requests{each} that are to be "
                        f"in flight together, at {one.tokens_per_request} tokens each"
                    )
                    error = OutOfMemory(reason, stage="kv_cache", scope="device")
                    lacking[one] = asked / max(held, 1), error
        worst = max((ratio for ratio, _ in lacking.values()), default=1.0)
        sure = {
            one: told
            for one, told in lacking.items()
            if told[0] in (worst,) or told[0] > 1 + SPARED
        }
        return {
            "too_large": {one: error for one, (_, error) in sure.items()},
            "too_tight": frozenset(lacking.keys() - sure.keys()),
        }

    def _from(self, trial: Trial) -> _Source:
        """Where the model comes from, looked up once: its files may be fetched on the way."""
        known = self._sources.get(trial.model)
        if known is None:
            known = _source(trial.model, trial.engine.args.get("load_format"))
            self._sources[trial.model] = known
        return known

    def _explain(self, error: BaseException) -> TrialError:
        return explained(error, stage=self._stage, output=self._output, on_cpu=self._on_cpu)

    def _read_memory(self) -> Memory:
        ranks: list[dict[str, int]] = self._running.rpc("report_memory")
        return Memory(
            weights=max(rank["weights"] for rank in ranks),
            kv_cache=max(rank["kv_cache"] for rank in ranks),
            peak=max(rank["peak"] for rank in ranks),
            limit=self._limit_bytes(),
        )

    def _limit_bytes(self) -> int:
        there = host.describe().memory_gib
        return int(min(self._limit_gib or there, there) * 2**30)

    def _arguments(self, trial: Trial, workloads: Sequence[Workload]) -> dict[str, Any]:
        model, layout, settings = trial.model, trial.layout, trial.engine
        source = self._from(trial)
        args: dict[str, Any] = {
            "model": source.model,
            "revision": source.revision,
            "load_format": "dummy" if model.weights == "dummy" else "auto",
            "skip_tokenizer_init": True,
            "hf_overrides": _overrides(trial, source),
            "trust_remote_code": model.trust_remote_code,
            "dtype": model.dtype,
            "quantization": None if skeleton(model) else model.quantization,
            "tensor_parallel_size": layout.tensor,
            "pipeline_parallel_size": layout.pipeline,
            "enable_expert_parallel": layout.expert,
            "distributed_executor_backend": _executor(layout, on_cpu=self._on_cpu),
            "worker_extension_cls": "workers.engines.vllm_worker.Report",
            "enforce_eager": settings.eager,
            "enable_prefix_caching": False,
            "max_model_len": max(one.tokens_per_request for one in workloads),
            "max_num_seqs": max(one.batch_size for one in workloads),
        }
        more: dict[str, Any] = {}
        if settings.moe_backend == UNFUSED:
            more["moe_backend"] = UNFUSED  # vLLM's own argument takes vLLM's own kernels only
        elif settings.moe_backend is not None:
            args["moe_backend"] = settings.moe_backend
        if settings.speculative is not None:
            args["speculative_config"] = _speculative(trial)
            args["per_request_spec_decode_metrics"] = "summary"
        if self._on_cpu:
            runs = _structure(trial)
            if runs is not None and runs.exact and _draft_known(trial):
                args["kv_cache_memory_bytes"] = _kv_cache_room(trial, runs, workloads)
            elif "kv_cache_memory_bytes" not in settings.args:
                more["kv_cache_requests"] = args["max_num_seqs"]
            args["worker_cls"] = "workers.engines.vllm_cpu_worker.LimitedCPUWorker"
        else:
            args |= cuda_economy(trial, workloads)
        if self._limit_gib is not None:
            more[LIMIT_KEY] = int(self._limit_gib * 2**30)
        if more:
            args["additional_config"] = more
        return arguments.joined(args, arguments.given(trial))


def cuda_economy(trial: Trial, workloads: Sequence[Workload]) -> dict[str, Any]:
    """Arguments that shorten the start of a CUDA engine and change nothing that is measured.

    `cudagraph_capture_sizes`: tokens of a decode pass of each workload; vLLM's own list has
    up to 51 sizes. A model that drafts has passes of its own. Passes in which some requests
    have begun or ended later than others are padded to the next of them. None around experts
    that run one after the other: how many tokens each has is read on the host.

    `max_num_batched_tokens`: a power of two (so that groups share compiled code) that holds
    the largest batch of prompts, where that is below vLLM's default; every prompt batch is
    then cut into the same passes as with the default, and profiling runs on less.

    `safetensors_load_strategy`: vLLM reads ahead by itself on network file systems alone.
    """
    asked = trial.engine.speculative
    per_request = 1 + (asked.tokens if asked else 0)
    beside = int(asked is not None and asked.way == DRAFT_MODEL)  # a slot that vLLM keeps for it
    given = trial.engine.args
    args: dict[str, Any] = {}
    if trial.engine.eager:
        pass
    elif trial.engine.moe_backend == UNFUSED:
        args["compilation_config"] = {"cudagraph_mode": "NONE"}
    elif not any(name in given for name in _GRAPH_ARGS):
        each = {per_request}
        if asked is not None and asked.way not in MODELLESS:
            # A drafting model's passes: the first feeds what was decided, the others a token.
            each |= {per_request + beside, 1}
        together = {size for one in workloads for size in _waves(one.batch_size, given)}
        sizes = {requests * tokens for requests in together for tokens in each}
        args["cudagraph_capture_sizes"] = sorted(sizes)
    filled = max(
        max(one.batch_size * max(one.input_tokens + beside, per_request), one.tokens_per_request)
        for one in workloads
    )
    if filled <= LEAST_TOKEN_BUDGET:
        args["max_num_batched_tokens"] = 1 << (filled - 1).bit_length()
    if trial.model.weights == "checkpoint":
        args["safetensors_load_strategy"] = "prefetch"
    return args


def _waves(batch: int, args: Mapping[str, Any]) -> set[int]:
    """Requests in flight together, of a batch of which `max_num_seqs` may let fewer run."""
    most = args.get("max_num_seqs")
    if type(most) is not int or not 0 < most < batch:
        return {batch}
    return {most, batch % most or most}


def _overrides(trial: Trial, source: _Source) -> dict[str, Any]:
    """vLLM's `hf_overrides`: what the model's own fields change, and what the sweep does."""
    return arguments.merged(source.overrides, overrides_of(trial.engine), KEY)


def _structure(trial: Trial) -> Architecture | None:
    """The structure that it asks for; null where only the engine can tell."""
    try:
        return structure(trial)
    except (UnknownModel, Infeasible):
        return None


def _check_shape(trial: Trial, runs: Architecture | Partial) -> None:
    """Whether the engine runs the shape that was asked for: records hold what ran, and a point of
    a sweep must not stand for another.

    Raises:
        Unsupported: it does not.
    """
    wanted = _structure(trial)
    for key in SHAPE:
        if wanted is None or getattr(trial.model, key) is None:
            continue
        asked, got = getattr(wanted, key), getattr(runs, key, None)
        if got is not None and asked != got:
            raise Unsupported(f"model.{key} asks for {asked}, but the engine runs {got}")


def _weights_of(trial: Trial) -> tuple[Any, ...]:
    """What two trials must share to run on the same weights."""
    return replace(trial.model, top_k=None), trial.layout, trial.engine


def _told(args: dict[str, Any], name: str, draft: str | None) -> dict[str, Any]:
    """The arguments as JSON data, with models' names in place of folders of caches."""
    caches = (_skeletons(), cache.folder(), hub.cache_folder())

    def cached(model: str) -> bool:
        return any(Path(model).is_relative_to(folder) for folder in caches)

    if cached(args["model"]):
        args = args | {"model": name}
    drafting = args.get("speculative_config") or {}
    if draft and cached(drafting.get("model", "")):
        args = args | {"speculative_config": drafting | {"model": draft}}
    told: dict[str, Any] = json.loads(json.dumps(args, default=str))
    return told


def _skeletons() -> Path:
    return caches.own() / "skeletons"


def _skeleton(config: dict[str, Any], code: Path | None = None) -> Path:
    """A folder with nothing but this configuration, and the Python code in the folder `code`.

    vLLM keys compiled code by the model's path among other things, so equal skeletons lie
    in one place: a folder of its own for every engine would compile each anew.
    """
    text = json.dumps(config, sort_keys=True)
    modules = {one.name: one.read_bytes() for one in sorted(code.glob("*.py"))} if code else {}
    digest = hashlib.sha256(text.encode())
    for name, content in modules.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    folder = _skeletons() / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (*modules.items(), ("config.json", text.encode())):
        whole = folder / f"{os.getpid()}.tmp"
        whole.write_bytes(content)
        whole.replace(folder / name)
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What an engine loads a model from."""

    model: str
    """Folder, or a name of a kind that the engine alone knows."""
    revision: str | None = None
    """Commit where the folder is that of a hub id, else as asked."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What the model's own fields change in the configuration there."""


def _source(model: Model, load_format: str | None = None) -> _Source:
    """Where to load `model` from.

    Args:
        load_format: of `engine.args`, which may need no weights.

    Raises:
        Infeasible: what is asked of its shape has no place.
        TrialError: its files cannot be had.
    """
    if model.prune is not None and model.weights == "checkpoint":
        return _source(replace(model, name=str(pruned_folder(model)), prune=None))
    folder, revision = _folder(model, load_format), model.revision
    config = configuration(model.name, model.revision)
    if folder is not None and (model.weights == "checkpoint" or config is None):
        config = configuration(str(folder))
    if folder is not None and (hub_id := drafts.hub_id(model)):
        revision = hub.commit(hub_id, model.revision) or revision
    if config is None:
        asked = (model.ffn_dim, model.num_experts, model.top_k, model.num_layers)
        if any(one is not None for one in asked):
            raise Infeasible(
                f"the configuration of {model.name} is not on this machine, so its shape "
                "cannot be overridden: name a folder or a catalogue entry"
            )
        return _Source(model=model.name, revision=model.revision)
    bent = bend(config, model)
    if model.weights == "dummy":
        if stored := skeleton(model):
            bent["quantization_config"] = stored
        code = folder if model.trust_remote_code else None
        return _Source(model=str(_skeleton(bent, code)), revision=revision)
    name = str(folder) if folder is not None else drafts.hub_id(model) or model.name
    return _Source(model=name, revision=revision, overrides=changes(config, bent))


def _folder(model: Model, load_format: str | None) -> Path | None:
    """The folder with a model's files, fetched where need be; null where the engine has to find
    them, or a skeleton needs none.

    Raises:
        TrialError: they cannot be had.
    """
    hub_id, dummy = drafts.hub_id(model), model.weights == "dummy"
    if hub_id is None:
        return Path(model.name).expanduser()
    if not hub.is_id(hub_id) or load_format not in _FORMATS:
        return None
    if dummy and catalogue_name(model.name) is not None:
        return None
    need: hub_files.Need = "config" if dummy or load_format == "dummy" else "weights"
    return hub_files.folder(hub_id, model.revision, need, code=model.trust_remote_code)


def _kv_cache_room(trial: Trial, a: Architecture, workloads: Sequence[Workload]) -> int:
    """Bytes of KV cache per rank that the largest workload needs, and a little to spare.

    Spare: one block per request and one that vLLM keeps for itself.
    """
    layout, kv_dtype = trial.layout, trial.engine.args.get("kv_cache_dtype")
    stored = _stored(a, trial.model, kv_dtype)
    model, second = drafts.draft(trial), drafts.structure(trial)

    def room(tokens: int, requests: int) -> int:
        needed = max(
            kv_cache_bytes(a, stored, tokens, requests, layout, stage, CPU_BLOCK)
            for stage in range(layout.pipeline)
        )
        if model is not None and second is not None:
            held = _stored(second, model, kv_dtype)
            single = replace(layout, pipeline=1)
            needed += kv_cache_bytes(second, held, tokens, requests, single, 0, CPU_BLOCK)
        return needed

    args = trial.engine.args
    longest = args.get(positions.MAX_MODEL_LEN) or 0
    together = {one: max(_waves(one.batch_size, args)) for one in workloads}
    needed = max(
        room(one.tokens_per_request, requests) + room(CPU_BLOCK, requests + 1)
        for one, requests in together.items()
    )
    # The engine insists on room for one request of its model length.
    return max(needed, room(longest, 1) + room(CPU_BLOCK, 2)) if longest > 0 else needed


def _stored(a: Architecture, model: Model, cache: str | None) -> Precision:
    """Types of a model and its cache. Of names that are unknown here the engine is the judge: it
    gets room for a cache in the type of the activations."""
    try:
        return precision(a, model, kv_cache_dtype=cache)
    except ValueError:
        dtype = run_dtype(a, model)
        return Precision(dtype=dtype, kv_dtype=dtype)


def _executor(layout: Layout, *, on_cpu: bool) -> str:
    """Of one replica: in this process for one device, processes on this node, or Ray over
    several nodes.

    Raises:
        Unsupported: replicas that do not fit on this node.
    """
    import torch

    here = on_cpu or layout.devices == 1 or torch.cuda.device_count() >= layout.devices
    if not here and layout.data > 1:
        raise Unsupported(
            f"layout.data {layout.data}: replicas are processes of one node, and "
            f"{layout.devices} devices are more than the {torch.cuda.device_count()} of this one"
        )
    if layout.tensor * layout.pipeline == 1:
        return "uni"
    if not here:
        _keep_on_node()
    return "mp" if here else "ray"


def _keep_on_node() -> None:
    """Has vLLM not carry to ranks on other nodes what names a place on this one. It gives them
    every variable of this process that they lack (`v1/executor/ray_env_utils.py`), so they would
    put their temporary files into a folder that only this host has."""
    from vllm.ray import ray_env

    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.update(given.OF_ONE_NODE)


def _speculative(trial: Trial) -> dict[str, Any]:
    """vLLM's `speculative_config`."""
    asked, draft = trial.engine.speculative, drafts.draft(trial)
    assert asked is not None
    config: dict[str, Any] = {"num_speculative_tokens": asked.tokens, "method": asked.way}
    if draft is not None:
        source = _source(draft)
        config["model"] = source.model
        if source.revision is not None:
            config["revision"] = source.revision
    return config | asked.args  # which contradict nothing of it (`arguments.check`)


def _draft_known(trial: Trial) -> bool:
    """Whether the bytes of its draft's cache follow from the draft's structure; so they do
    without a draft."""
    if drafts.draft(trial) is None:
        return True
    try:
        structure = drafts.structure(trial)
    except UnknownModel:
        return False
    return structure is not None and structure.exact


def _ran(vllm: Stepper | Replicas) -> Architecture | Partial:
    """The structure that was loaded; where it cannot be told, what the engine says of it."""
    found = understood(vllm.config)
    if isinstance(found, Architecture):
        return found
    ranks: list[dict[str, Any]] = vllm.rpc("report_dimensions")
    told = {key: value for rank in ranks for key, value in rank.items() if value is not None}
    return replace(found, **told)


@lru_cache(maxsize=64)  # every trial of a group asks
def _file(model: Model, name: str) -> Path | None:
    """A small file of a model, from the hub where it has to be."""
    hub_id = drafts.hub_id(model)
    if hub_id is None:
        return drafts.in_folder(model, name)
    return hub_files.file(hub_id, model.revision, name)


def _bind_threads(layout: Layout) -> None:
    """Gives each CPU rank an equal share of the cores this process may use, or a core that it
    shares with other ranks where there are more of them than cores.

    `OMP_NUM_THREADS` is for ranks that are processes of their own. Here it comes too late: torch
    was imported before the fork, by a process that Ray or the nursery had told one thread.
    """
    import torch

    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // layout.devices)
    parts = [cores[i * share % len(cores) :][:share] for i in range(layout.devices)]
    os.environ["OMP_NUM_THREADS"] = str(share)
    torch.set_num_threads(share)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
        ",".join(str(core) for core in part) for part in parts
    )
