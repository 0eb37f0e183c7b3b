"""What a trial should cost, from structure and peaks alone.

Every part of a forward pass takes as long as the slower of two things: moving its bytes
and doing its arithmetic (Williams et al., "Roofline", CACM 2009). Decode moves the weights
of the experts that the batch activates, and the KV cache; prefill computes. What the
parts need comes from `workers.moe.accounting`, cut as the layout cuts it; which experts a
batch activates is not known before a run, so the expectation under uniform routing stands
in. To that come the devices' talk with one another, and what a pass costs that moves
nothing: launches, scheduling.

No device reaches its peaks: what is assumed of that stands in `workers.hardware.assumptions`,
and the utilisations in a record never use it.

A prediction orders the plan, feeds its ETA, says whether a trial fits, and stands in
`predicted_*` columns beside what was measured. It never replaces a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.contract.errors import Infeasible, OutOfMemory
from workers.contract.outcome import OomStage
from workers.contract.trial import Trial
from workers.hardware.assumptions import assumptions
from workers.hardware.device import CPU, Device
from workers.hardware.host import describe
from workers.moe import accounting
from workers.moe.accounting import Cost
from workers.moe.precision import Precision, precision
from workers.moe.structure import Architecture

VERSION = "1"
"""Of this model; an older prediction is not taken for one of today's."""
GIB = 2**30
CPU_BLOCK, GPU_BLOCK = 128, 16
"""Tokens of one block of vLLM's KV cache, to which a request's cache is rounded up."""
GPU_SHARE = 0.92
"""Share of a GPU's memory that vLLM uses by default (`gpu_memory_utilization`)."""
NODE_DEVICES = 8
"""Devices that talk over the node's own links; beyond it, over the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Time of one batch, and memory of the fullest device."""

    device: str
    """Class of the device that it is for."""
    ttft_s: float
    """Submission to the first token of the median request, seconds."""
    prefill_s: float
    """Prefill of the whole batch, seconds."""
    tpot_s: float | None
    """Mean decode pass, seconds; null for one output token."""
    e2e_s: float
    """Prefill and every decode pass of the whole batch, seconds."""
    load_s: float
    """Building the engine, seconds; where its weights do not fit, until that shows."""
    close_s: float
    """Ending it, seconds."""
    weights_gib: float
    kv_cache_gib: float
    """KV cache of the whole batch at its full length."""
    activations_gib: float
    """Largest intermediate tensors of one forward pass."""
    overhead_gib: float
    """What the engine itself takes: contexts, communication buffers, captured graphs."""
    limit_gib: float
    """What the device may use."""
    prefill_passes: int
    """Forward passes that the prompts need, under the engine's token budget."""
    waves: int
    """Rounds in which the batch runs where its KV cache does not fit whole."""
    oom: OutOfMemory | None
    """Why it does not fit; null if it does."""

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
        }


def predict(a: Architecture, trial: Trial, device: Device) -> Prediction | None:
    """Roofline of `trial` on devices of one class.

    Null where there is no telling: a family whose structure is only estimated, an
    encoder-decoder, a quantisation of unknown form.
    """
    if not a.exact or a.params_encoder:
        return None
    settings = trial.engine
    try:
        stored = precision(
            a, trial.model, kv_cache_dtype=_text(settings.args.get("kv_cache_dtype"))
        )
    except (ValueError, Infeasible):
        return None
    return _Roofline(a, stored, trial, device).prediction()


class _Roofline:
    """One trial on one class of device."""

    def __init__(self, a: Architecture, stored: Precision, trial: Trial, device: Device) -> None:
        self.a, self.stored, self.device = a, stored, device
        self.assumed = assumptions(device)
        self.layout, self.args = trial.layout, trial.engine.args
        self.limit_gib = trial.engine.memory_limit_gib or usable_gib(device, self.args)
        data = self.layout.data
        whole = trial.workload
        # A replica of a data-parallel layout has its share of the batch.
        self.batch = -(-whole.batch_size // data)
        self.workload = whole
        self.stages = range(self.layout.pipeline)
        self.bandwidth = device.bandwidth_gb_s * 1e9 * self.assumed.bandwidth_share
        self.compute = device.tflops(stored.compute) * 1e12 * self.assumed.compute_share

    def prediction(self) -> Prediction:
        weights = [
            accounting.weight_bytes(self.a, self.stored, self.layout, stage)
            for stage in self.stages
        ]
        caches = [self._cache_bytes(self.batch, stage) for stage in self.stages]
        fullest = max(self.stages, key=lambda stage: weights[stage] + caches[stage])
        activations = self._activation_bytes()
        overhead = self.assumed.overhead_gib * GIB
        waves, oom = self._fit(
            weights[fullest], caches[fullest], activations, overhead, self._cache_bytes(1, fullest)
        )
        early = oom is not None and oom.stage == "load"
        batch = -(-self.batch // waves)
        prefill_s, passes = self._prefill(batch)
        decode_s = self._decode(batch)
        steps = self.workload.output_tokens - 1
        e2e = waves * (prefill_s + steps * decode_s)
        median_pass = -(-passes // 2)
        return Prediction(
            device=self.device.name,
            ttft_s=prefill_s * median_pass / passes
            + (waves // 2) * (prefill_s + steps * decode_s if waves > 1 else 0.0),
            prefill_s=prefill_s,
            tpot_s=decode_s if steps else None,
            e2e_s=e2e,
            load_s=self.assumed.rebuild_s
            + (0.0 if early else weights[fullest] / GIB / self.assumed.load_gib_s),
            close_s=self.assumed.close_s,
            weights_gib=weights[fullest] / GIB,
            kv_cache_gib=caches[fullest] / GIB,
            activations_gib=activations / GIB,
            overhead_gib=overhead / GIB,
            limit_gib=self.limit_gib,
            prefill_passes=passes,
            waves=waves,
            oom=oom,
        )

    def _prefill(self, batch: int) -> tuple[float, int]:
        """Seconds and passes of the prompts of `batch` requests."""
        length = self.workload.input_tokens
        passes = max(1, -(-batch * length // self._token_budget()))
        if passes <= 1:
            slices = accounting.prefill(batch, length)
        elif batch >= passes:  # whole prompts, some in each pass
            slices = accounting.prefill(-(-batch // passes), length)
        else:  # long prompts in chunks: the mean chunk sees half of the others
            chunk = -(-length * batch // passes)
            slices = accounting.prefill(1, min(chunk, length), max(0, length - chunk) // 2)
        return passes * self._pass_s(slices) + batch * self.assumed.request_s, passes

    def _decode(self, batch: int) -> float:
        """Seconds of the mean decode pass."""
        steps = self.workload.output_tokens - 1
        if not steps:
            return 0.0
        seconds = self._communication_s(batch) + self.assumed.step_s
        for stage in self.stages:
            total = accounting.decode_total(
                self.a,
                self.stored,
                batch,
                self.workload.input_tokens,
                self.workload.output_tokens,
                layout=self.layout,
                stage=stage,
            )
            seconds += self._cost_s(total) / steps
        return seconds + len(self.a.layers) * self.assumed.layer_s

    def _pass_s(self, slices: tuple[accounting.Slice, ...]) -> float:
        tokens = sum(one.sequences * one.new for one in slices)
        seconds = self._communication_s(tokens) + self.assumed.step_s
        for stage in self.stages:
            cost = accounting.forward(
                self.a, self.stored, slices, layout=self.layout, stage=stage
            ).total
            seconds += self._cost_s(cost)
        return seconds + len(self.a.layers) * self.assumed.layer_s

    def _cost_s(self, c: Cost) -> float:
        """Part by part, the slower of bytes and arithmetic."""
        parts = (
            (c.attention_bytes, c.attention_flops),
            (c.kv_read_bytes + c.kv_write_bytes, c.score_flops),
            (c.router_bytes, c.router_flops),
            (c.expert_bytes, c.expert_flops),
            (c.shared_bytes, c.shared_flops),
            (c.dense_bytes, c.dense_flops),
            (c.head_bytes, c.head_flops),
            (c.norm_bytes + c.embedding_bytes, 0.0),
        )
        return sum(max(size / self.bandwidth, work / self.compute) for size, work in parts)

    def _communication_s(self, tokens: int) -> float:
        """Time in which devices exchange activations during one pass.

        Tensor parallelism sums activations twice per layer (ring all-reduce: 2(t-1)/t of the
        message over each link); expert parallelism over data-parallel replicas sends each
        token to its experts and back; pipeline stages hand activations on.
        """
        layout, device = self.layout, self.device
        if layout.devices == 1:
            return 0.0
        near = layout.devices <= NODE_DEVICES
        link = device.link_gb_s if near else (device.network_gb_s or device.link_gb_s)
        rate = (link or device.bandwidth_gb_s) * 1e9
        latency = device.link_latency_s or 0.0
        message = tokens * self.a.hidden_size * 2
        layers = len(self.a.layers)
        seconds = 0.0
        if layout.tensor > 1:
            share = 2 * (layout.tensor - 1) / layout.tensor
            seconds += 2 * layers * (share * message / rate + latency)
        if layout.expert and layout.data > 1:
            ranks = layout.tensor * layout.data
            sent = message * self.a.top_k * (ranks - 1) / ranks / layout.tensor
            moe = sum(1 for layer in self.a.layers if layer.experts)
            seconds += 2 * moe * (sent / rate + latency)
        return seconds + (layout.pipeline - 1) * (message / rate + latency)

    def _cache_bytes(self, batch: int, stage: int) -> int:
        block = CPU_BLOCK if self.device.name == CPU else GPU_BLOCK
        return accounting.kv_cache_bytes(
            self.a,
            self.stored,
            self.workload.tokens_per_request,
            batch,
            layout=self.layout,
            stage=stage,
            block=block,
        )

    def _activation_bytes(self) -> float:
        """Residual stream, one layer's widest intermediate and the logits of one pass."""
        a = self.a
        tokens = min(self.batch * self.workload.input_tokens, self._token_budget())
        widest = max(a.hidden_size, 2 * a.ffn_dim * a.top_k // self.layout.tensor)
        logits = self.batch * a.vocab_size * 4
        return tokens * (widest + 4 * a.hidden_size) * 2 + logits

    def _token_budget(self) -> int:
        """Most tokens of one pass: as asked, else vLLM's defaults (engine/arg_utils.py)."""
        asked = self.args.get("max_num_batched_tokens")
        if isinstance(asked, int) and asked > 0:
            return asked
        if self.device.name == CPU:
            return 4096 * self.layout.devices
        large = self.device.memory_gib >= 70 and not self.device.name.startswith("a100")
        return 16384 if large else 8192

    def _fit(
        self, weights: float, cache: float, activations: float, overhead: float, one: float
    ) -> tuple[int, OutOfMemory | None]:
        """Rounds that the batch needs, and why it cannot run where it cannot.

        A CPU engine is given room for the whole batch or fails. On a GPU vLLM takes what
        is left for the cache: requests that do not fit wait, and only a cache too small for
        one request is an error.
        """
        limit = self.limit_gib * GIB
        asked = self.args.get("kv_cache_memory_bytes")
        if isinstance(asked, int) and asked < one:
            return 1, _short("kv_cache", "the cache of one request", one, asked)
        fixed = weights + overhead
        if fixed > limit:
            return 1, _short("load", "weights", fixed, limit)
        fixed += activations
        if fixed + one > limit:
            stage: OomStage = "warmup" if fixed > limit else "kv_cache"
            return 1, _short(stage, "weights, activations and the cache of one", fixed + one, limit)
        if fixed + cache <= limit:
            return 1, None
        if self.device.name == CPU:
            return 1, _short("kv_cache", "the whole batch", fixed + cache, limit)
        return -(-self.batch // max(1, int((limit - fixed) // one))), None


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
