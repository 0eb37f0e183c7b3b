"""What a trial should cost, from structure and peaks alone.

Every part of a forward pass takes as long as the slower of two things: moving its bytes
and doing its arithmetic (Williams et al., "Roofline", CACM 2009). Decode moves the weights
of the experts that the batch activates, and the KV cache; prefill computes. What the
parts need comes from `workers.moe.accounting`, cut as the layout cuts it; which experts a
batch activates is not known before a run, so the expectation under uniform routing stands
in. To that come the devices' talk with one another, and what a pass costs that moves
nothing: launches, scheduling.

A sweep has few engines and many workloads. What depends on the engine alone (coefficients
of its stages, rates, limits) is worked out once, in a `Roofline`; a workload is then a few
dozen products.

No device reaches its peaks: what is assumed of that stands in `workers.hardware.assumptions`,
and the utilisations in a record never use it.

A prediction orders the plan, feeds its ETA, says whether a trial fits, and stands in
`predicted_*` columns beside what was measured. It never replaces a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any

from workers.contract.engine import EngineSettings
from workers.contract.errors import Infeasible, OutOfMemory
from workers.contract.layout import Layout
from workers.contract.outcome import OomStage
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.assumptions import assumptions
from workers.hardware.coverage import ignored
from workers.hardware.device import CPU, Device
from workers.hardware.host import describe
from workers.moe import accounting, drafts
from workers.moe.accounting import Sheet, Work
from workers.moe.families import unspelled
from workers.moe.precision import Precision, precision
from workers.moe.structure import Architecture

VERSION = "2"
"""Of this model; an older prediction is not taken for one of today's."""
GIB = 2**30
CPU_BLOCK, GPU_BLOCK = 128, 16
"""Tokens of one block of vLLM's KV cache, to which a request's cache is rounded up."""
GPU_SHARE = 0.92
"""Share of a GPU's memory that vLLM uses by default (`gpu_memory_utilization`)."""
NODE_DEVICES = 8
"""Devices that talk over the node's own links; beyond it, over the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    """Requests that run together, from their prompts to their last tokens."""

    requests: int
    passes: int
    """Forward passes that the prompts need, under the engine's token budget."""
    prefill_s: float
    """All of those, seconds."""
    step_s: float | None
    """Mean decode pass, seconds; null for one output token."""
    steps: int
    """Decode passes."""

    @property
    def seconds(self) -> float:
        """Prefill and every decode pass."""
        return self.prefill_s + self.steps * (self.step_s or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Time of one batch, and memory of the fullest device.

    Requests beyond those that a sweep lets run together (`max_num_seqs`, `kv_cache_memory_bytes`)
    wait. They are alike, so those in flight end together and the next take their places: a batch
    runs in waves, all of them full but the last.
    """

    device: str
    """Class of the device that it is for."""
    wave: Wave
    """The first."""
    last: Wave
    """The last, which may be smaller."""
    waves: int
    """How many there are."""
    e2e_s: float
    """Prefill and every decode pass of the whole batch, seconds."""
    load_s: float
    """Building the engine, seconds; where its weights do not fit, until that shows."""
    close_s: float
    """Ending it, seconds."""
    weights_gib: float
    kv_cache_gib: float
    """KV cache of the batch at its full length, or of as much of it as `max_num_seqs` lets run."""
    activations_gib: float
    """Largest intermediate tensors of one forward pass."""
    overhead_gib: float
    """What the engine itself takes: contexts, communication buffers, captured graphs."""
    limit_gib: float
    """What the device may use."""
    ignores: tuple[str, ...]
    """Dotted keys of the engine's settings that it does not take into account."""
    oom: OutOfMemory | None
    """Why it does not fit; null if it does."""

    @property
    def requests(self) -> int:
        """Of one replica."""
        return (self.waves - 1) * self.wave.requests + self.last.requests

    @property
    def ttft_s(self) -> float:
        """Submission to the first token of the median request, seconds; waiting included."""
        last = self.requests - 1
        return (self.first_token_s(last // 2) + self.first_token_s(-(-last // 2))) / 2

    def first_token_s(self, request: int) -> float:
        """Submission to the first token of one of a replica's requests, from 0, in seconds."""
        before, place = divmod(request, self.wave.requests)
        one = self.last if before == self.waves - 1 else self.wave
        passes = place * one.passes // one.requests + 1
        return before * self.wave.seconds + one.prefill_s * passes / one.passes

    @property
    def prefill_s(self) -> float:
        """All prompts of the batch, seconds."""
        return (self.waves - 1) * self.wave.prefill_s + self.last.prefill_s

    @property
    def tpot_s(self) -> float | None:
        """Mean decode pass of a full wave, seconds; null for one output token."""
        return self.wave.step_s

    @property
    def prefill_passes(self) -> int:
        """Forward passes that the prompts of a full wave need."""
        return self.wave.passes

    @property
    def memory_gib(self) -> float:
        """All that one device must hold for the whole batch at once."""
        return self.weights_gib + self.kv_cache_gib + self.activations_gib + self.overhead_gib

    def columns(self) -> dict[str, Any]:
        """As columns of a record."""
        return {
            "predicted_device": self.device,
            "predicted_e2e_s": self.e2e_s,
            "predicted_ttft_s": self.ttft_s,
            "predicted_tpot_s": self.tpot_s,
            "predicted_load_s": self.load_s,
            "predicted_memory_gib": self.memory_gib,
            "predicted_weights_gib": self.weights_gib,
            "predicted_kv_cache_gib": self.kv_cache_gib,
            "predicted_oom_stage": self.oom.stage if self.oom else None,
            "prediction_ignores": ", ".join(self.ignores) or None,
        }


def predict(a: Architecture, trial: Trial, device: Device) -> Prediction | None:
    """Roofline of `trial` on devices of one class; null as for `roofline`."""
    engine = roofline(a, trial, device)
    return engine.predict(trial.workload) if engine is not None else None


def roofline(
    a: Architecture, trial: Trial, device: Device, draft: Architecture | None = None
) -> Roofline | None:
    """The engine of `trial` on devices of one class.

    A draft model takes its memory. Times are those without it: how many drafted tokens a target
    accepts follows from no structure.

    Null where there is no telling: a family whose structure is only estimated, an
    encoder-decoder, a quantisation of unknown form.
    """
    stored = _stored(a, trial)
    if isinstance(stored, str):
        return None
    return Roofline(a, stored, trial.layout, trial.engine, device, _drafted(trial, draft))


def unpredictable(a: Architecture, trial: Trial) -> str | None:
    """Why `roofline` is null, in one line; null where it is not."""
    stored = _stored(a, trial)
    return stored if isinstance(stored, str) else None


def _stored(a: Architecture, trial: Trial) -> Precision | str:
    """How its weights and cache are stored, or why no cost follows from it."""
    if not a.exact:
        return f"{unspelled(a.config)}: its costs would be a guess"
    if a.params_encoder:
        return "the costs of an encoder-decoder are not known here"
    kv_cache_dtype = _text(trial.engine.args.get("kv_cache_dtype"))
    try:
        return precision(a, trial.model, kv_cache_dtype=kv_cache_dtype)
    except (ValueError, Infeasible) as error:
        return f"how it is stored is not known: {error}"


def _drafted(trial: Trial, draft: Architecture | None) -> accounting.Stage | None:
    """A draft model that runs beside the target, on its last pipeline stage; null without one."""
    model = drafts.draft(trial)
    if model is None or draft is None or not draft.exact:
        return None
    try:
        cache = _text(trial.engine.args.get("kv_cache_dtype"))
        stored = precision(draft, model, kv_cache_dtype=cache)
    except (ValueError, Infeasible):
        return None
    return accounting.stage_of(draft, stored, replace(trial.layout, pipeline=1), 0)


class Roofline:
    """One engine on one class of device: predicts any workload of it."""

    def __init__(
        self,
        a: Architecture,
        stored: Precision,
        layout: Layout,
        engine: EngineSettings,
        device: Device,
        draft: accounting.Stage | None = None,
    ) -> None:
        self._device, self._args = device, engine.args
        self._assumed = assumptions(device)
        self._layout = layout
        self._limit_gib = engine.memory_limit_gib or usable_gib(device, engine.args)
        if device.name != CPU:  # CPU machines of a class differ in their memory
            self._limit_gib = min(self._limit_gib, device.memory_gib)
        default = CPU_BLOCK if device.name == CPU else GPU_BLOCK
        self._block = _count(engine.args, "block_size") or default
        self._most = _count(engine.args, "max_num_seqs")
        self._length = _count(engine.args, "max_model_len") or 0
        self._ignores = ignored(engine)
        self._budget = self._token_budget()
        self._bandwidth = device.bandwidth_gb_s * 1e9 * self._assumed.bandwidth_share
        self._compute = device.tflops(stored.compute) * 1e12 * self._assumed.compute_share
        stages = [accounting.stage_of(a, stored, layout, i) for i in range(layout.pipeline)]
        self._weights = [stage.weight_bytes for stage in stages]
        self._sheets = [stage.sheet for stage in stages]
        self._draft = draft.sheet if draft is not None else None
        if draft is not None:
            self._weights[-1] += draft.weight_bytes
        talk_s, self._token_s = self._communication(a)
        self._pass_s = talk_s + self._assumed.step_s + len(a.layers) * self._assumed.layer_s
        widest = max(a.hidden_size, 2 * a.ffn_dim * a.top_k // layout.tensor)
        self._residual = (widest + 4 * a.hidden_size) * 2
        self._logits = a.vocab_size * 4

    def predict(self, workload: Workload) -> Prediction:
        """Time of one batch of `workload`, and memory of the fullest device."""
        assumed = self._assumed
        # A replica of a data-parallel layout has its share of the batch.
        whole = -(-workload.batch_size // self._layout.data)
        running = min(whole, self._most or whole)
        weights, one, longest = self._fullest(running, workload.tokens_per_request)
        cache = max(ceil(running * one), longest)
        tokens = min(running * workload.input_tokens, self._budget)
        activations = tokens * self._residual + running * self._logits
        overhead = assumed.overhead_gib * GIB
        running, oom = self._fit(running, weights, activations, overhead, one, longest)
        waves = -(-whole // running)
        wave = last = self._wave(running, workload)
        if rest := whole % running:
            last = self._wave(rest, workload)
        early = oom is not None and oom.stage == "load"
        return Prediction(
            device=self._device.name,
            wave=wave,
            last=last,
            waves=waves,
            e2e_s=(waves - 1) * wave.seconds + last.seconds,
            load_s=assumed.rebuild_s + (0.0 if early else weights / GIB / assumed.load_gib_s),
            close_s=assumed.close_s,
            weights_gib=weights / GIB,
            kv_cache_gib=cache / GIB,
            activations_gib=activations / GIB,
            overhead_gib=assumed.overhead_gib,
            limit_gib=self._limit_gib,
            ignores=self._ignores,
            oom=oom,
        )

    def _wave(self, requests: int, workload: Workload) -> Wave:
        """`requests` of `workload`, together."""
        passes, prompts = _prompts(requests, workload.input_tokens, self._budget)
        steps = workload.output_tokens - 1
        step_s = None
        if steps:
            step_s = self._seconds(_decoding(requests, workload.input_tokens, steps + 1))
        return Wave(
            requests=requests,
            passes=passes,
            prefill_s=passes * self._seconds(prompts) + requests * self._assumed.request_s,
            step_s=step_s,
            steps=steps,
        )

    def _seconds(self, work: Work) -> float:
        """Mean pass of `work`, on all stages one after another."""
        n = work.passes
        seconds = self._pass_s + work.tokens / n * self._token_s
        for sheet in self._sheets:
            seconds += self._slowest(sheet, work) / n
        return seconds

    def _slowest(self, sheet: Sheet, work: Work) -> float:
        """Part by part, the slower of bytes and arithmetic."""
        (
            attention,
            router,
            expert,
            shared,
            dense,
            norm,
            embedding,
            head,
            kv_read,
            kv_write,
            attention_flops,
            score_flops,
            router_flops,
            expert_flops,
            shared_flops,
            dense_flops,
            head_flops,
            _,
        ) = sheet.figures(work)
        rate, ratio = self._bandwidth, self._bandwidth / self._compute
        # Written out: this line runs twice for every trial of a sweep.
        return (
            max(attention, attention_flops * ratio)
            + max(kv_read + kv_write, score_flops * ratio)
            + max(router, router_flops * ratio)
            + max(expert, expert_flops * ratio)
            + max(shared, shared_flops * ratio)
            + max(dense, dense_flops * ratio)
            + max(head, head_flops * ratio)
            + norm
            + embedding
        ) / rate

    def _communication(self, a: Architecture) -> tuple[float, float]:
        """Seconds in which devices exchange activations: per pass, and per token in it.

        Tensor parallelism sums activations twice per layer (ring all-reduce: 2(t-1)/t of the
        message over each link); replicas that share experts gather each other's tokens before
        a layer of them and scatter the sums behind it, whatever the experts chosen (vLLM's
        default, `allgather_reducescatter`); pipeline stages hand activations on.
        """
        layout, device = self._layout, self._device
        if layout.devices == 1:
            return 0.0, 0.0
        near = layout.devices <= NODE_DEVICES
        link = device.link_gb_s if near else (device.network_gb_s or device.link_gb_s)
        rate = (link or device.bandwidth_gb_s) * 1e9
        exchanges, messages = layout.pipeline - 1, float(layout.pipeline - 1)
        if layout.tensor > 1:
            exchanges += 2 * len(a.layers)
            messages += 2 * len(a.layers) * 2 * (layout.tensor - 1) / layout.tensor
        moe = sum(1 for layer in a.layers if layer.experts)
        if moe and layout.data > 1:
            exchanges += 2 * moe
            messages += 2 * moe * (layout.data - 1)
        return exchanges * (device.link_latency_s or 0.0), messages * a.hidden_size * 2 / rate

    def _fullest(self, batch: int, tokens: int) -> tuple[int, float, int]:
        """On the fullest device, in bytes: weights, cache of one request, and of the longest that
        the engine serves."""
        each = self._caches(tokens)
        full = [w + ceil(batch * one) for w, one in zip(self._weights, each, strict=True)]
        at = full.index(max(full))
        longest = each if tokens >= self._length else self._caches(self._length)
        return self._weights[at], each[at], ceil(longest[at])

    def _caches(self, tokens: int) -> list[float]:
        """Cache of one request of that length on each stage, in bytes."""
        each: list[float] = [sheet.cache_bytes(tokens, self._block) for sheet in self._sheets]
        if self._draft is not None:
            each[-1] += self._draft.cache_bytes(tokens, self._block)
        return each

    def _token_budget(self) -> int:
        """Most tokens of one pass: as asked, else vLLM's defaults (engine/arg_utils.py)."""
        if asked := _count(self._args, "max_num_batched_tokens"):
            return asked
        if self._device.name == CPU:
            return 4096 * self._layout.devices
        large = self._device.memory_gib >= 70 and not self._device.name.startswith("a100")
        return 16384 if large else 8192

    def _fit(
        self,
        batch: int,
        weights: float,
        activations: float,
        overhead: float,
        one: float,
        longest: float,
    ) -> tuple[int, OutOfMemory | None]:
        """Requests that run together, and why none can where that is so.

        The cache has room for the whole batch, which is what is in flight together, or the trial is
        out of memory; unless a sweep asks for a cache of some size, which then bounds it.
        """
        limit = self._limit_gib * GIB
        asked = self._args.get("kv_cache_memory_bytes")
        room = asked if isinstance(asked, int) else None
        if room is not None and room < longest:
            return batch, _short("kv_cache", "the cache of one request", longest, room)
        fixed = weights + overhead
        if fixed > limit:
            return batch, _short("load", "weights", fixed, limit)
        fixed += activations
        if fixed + longest > limit:
            stage: OomStage = "warmup" if fixed > limit else "kv_cache"
            needed = fixed + longest
            return batch, _short(stage, "weights, activations and the cache of one", needed, limit)
        if room is not None:
            batch = min(batch, max(1, int(room // one)))
        if fixed + ceil(batch * one) <= limit:
            return batch, None
        return batch, _short("kv_cache", "the whole batch", fixed + ceil(batch * one), limit)


@lru_cache(maxsize=65536)
def _prompts(batch: int, length: int, budget: int) -> tuple[int, Work]:
    """Passes that the prompts of `batch` requests need, and the mean one of them."""
    passes = max(1, -(-batch * length // budget))
    if passes <= 1:
        slices = accounting.prefill(batch, length)
    elif batch >= passes:  # whole prompts, some in each pass
        slices = accounting.prefill(-(-batch // passes), length)
    else:  # long prompts in chunks: the mean chunk sees half of the others
        chunk = -(-length * batch // passes)
        slices = accounting.prefill(1, min(chunk, length), max(0, length - chunk) // 2)
    return passes, accounting.one_pass(slices)


_decoding = lru_cache(maxsize=65536)(accounting.decoding)
"""Workloads come back with every engine of a sweep."""


def usable_gib(device: Device, args: Mapping[str, Any]) -> float:
    """Memory that an engine takes of a device, as its arguments ask or by default."""
    share = args.get("gpu_memory_utilization", 1.0 if device.name == CPU else GPU_SHARE)
    return device.memory_gib * (share if isinstance(share, int | float) else 1.0)


def device_name(profile: str) -> str:
    """A class of device as a predicted record names it."""
    return describe().device if profile == CPU else profile


def _short(stage: OomStage, what: str, needed: float, limit: float) -> OutOfMemory:
    return OutOfMemory(
        f"predicted: {what} need {needed / GIB:.2f} GiB of a device, {limit / GIB:.2f} are there",
        stage=stage,
        scope="device",
        requested_bytes=int(needed),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(args: Mapping[str, Any], name: str) -> int | None:
    """A whole number above 0 that is asked for."""
    value = args.get(name)
    return value if type(value) is int and value > 0 else None
