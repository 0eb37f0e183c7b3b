"""Memory that a decode pass reads of one layer, by batch: accounted, counted, and truly read.

    PYTHONPATH=. python tests/bench/bench_bytes.py --model FOLDER [--batches 1 2 4 …] [--layers …]
        [--dataset builtin | random] [--json FILE]

MoE-CAP A.4 (its Figure 8) sets the memory that S-MBU accounts for against a profile of one
layer, with less than 1 % between them, and vanilla MBU beside it. Here four ways to the same
number, over the same decode passes of the vLLM CPU engine:

- accounted: Eq 4 (attention, activated and shared experts) and every weight of the layer (router
  and norms too), by `workers.moe.accounting` from the configuration and the probe's trace;
- counted: bytes of the running model's own tensors, an expert's share of `w13` and `w2` for every
  expert that this file's own ear heard a router choose, and all else of the layer in full;
- read: pages of the layer's tensors that the processor marked as accessed during the pass, in
  vLLM's own fused kernels (`touched.py`); no count, and no knowledge of routing;
- beside them what vanilla MBU takes (all experts), and the expectation under uniform routing.

One thing is not as usual: linear layers use torch's own kernel instead of a packed copy
of oneDNN's, so that their weights stay where they can be watched. Experts are packed as ever.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.touched import Touched, works
from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.moe.accounting import Cost, forward
from workers.moe.precision import precision
from workers.moe.sheets import spread
from workers.moe.utilisation import slices_of
from workers.prompts import random_ids
from workers.texts import text_ids

BATCHES = (1, 2, 4, 8, 16, 32, 64)
EXPERTS = ("w13_weight", "w2_weight")
"""vLLM's names of the routed experts' tensors, experts first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One layer at one batch, bytes per decode pass in the mean over passes."""

    layer: int
    batch: int
    passes: int
    experts: float
    """Distinct ones per pass."""
    eq4: float
    accounted: float
    counted: float
    read: float | None
    """Null where the kernel does not tell."""
    all_experts: float
    """Eq 4 with every expert: what vanilla MBU takes."""
    uniform: float
    """Eq 4 with the expectation under uniform routing."""

    @property
    def truth(self) -> float:
        """What was read; where that is not told, what was counted."""
        return self.counted if self.read is None else self.read

    def error(self, name: str) -> float:
        """Of `eq4`, `accounted` and so on, against the truth; 0.01 is 1 % too much."""
        return float(getattr(self, name)) / self.truth - 1


@contextmanager
def weights_stay() -> Iterator[None]:
    """Engines that are built meanwhile keep the weights of linear layers as they were loaded."""
    from vllm.model_executor.layers import utils

    kept = utils.dispatch_cpu_unquantized_gemm

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = kept


@contextmanager
def built(model: Model, largest: Workload) -> Iterator[VllmEngine]:
    """An engine for every batch up to that of `largest`."""
    trial = Trial(model=model, workload=largest, engine=EngineSettings(eager=True))
    with tempfile.TemporaryDirectory(prefix="bench-") as name, weights_stay():
        engine = VllmEngine(trial, [largest], Site(scratch=Path(name), device="cpu"))
        try:
            yield engine
        finally:
            engine.close()


class Ear:
    """Hears what routers choose and what passes read, beside and apart from the probe."""

    def __init__(self, engine: VllmEngine, layers: Sequence[int]) -> None:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        worker = engine._vllm.llm.llm_engine.model_executor.driver_worker.worker
        self._runner = worker.model_runner
        self.tensors: dict[int, dict[str, torch.nn.Parameter]] = {
            layer: {
                name: one
                for name, one in worker.get_model().named_parameters()
                if f".layers.{layer}." in name
            }
            for layer in layers
        }
        self._routers = {
            one.layer_id: one.router
            for one in worker.get_model().modules()
            if isinstance(one, MoERunner) and one.layer_id in self.tensors
        }
        every = {name: one for of in self.tensors.values() for name, one in of.items()}
        self._touched = Touched(every) if works() else None
        self.chosen: list[dict[int, set[int]]] = []
        """Per pass and layer, the experts."""
        self.read: list[dict[str, int]] = []
        """Per pass and tensor, the bytes."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For the passes made meanwhile."""
        self.chosen, self.read = [], []
        execute = self._runner.execute_model

        def heard(scheduled: Any, *args: Any, **kw: Any) -> Any:
            self.chosen.append({layer: set() for layer in self.tensors})
            if self._touched is not None:
                self._touched.clear()
            result = execute(scheduled, *args, **kw)
            if self._touched is not None:
                self.read.append(self._touched.bytes())
            if not scheduled.total_num_scheduled_tokens:
                self.chosen.pop()
                del self.read[len(self.chosen) :]
            return result

        def ids(layer: int, chosen: torch.Tensor) -> None:
            self.chosen[-1][layer] |= set(chosen.flatten().tolist())

        self._runner.execute_model = heard
        for layer, router in self._routers.items():
            router.set_capture_fn(partial(ids, layer))
        try:
            yield
        finally:
            del self._runner.execute_model
            for router in self._routers.values():
                router.set_capture_fn(None)

    def counted(self, layer: int, number: int) -> int:
        """Bytes of the tensors that pass `number` needs of a layer."""
        total = 0
        for name, tensor in self.tensors[layer].items():
            if name.endswith(EXPERTS):
                total += sum(tensor[expert].nbytes for expert in self.chosen[number][layer])
            else:
                total += tensor.nbytes
        return total

    def touched(self, layer: int, number: int) -> int | None:
        """Bytes of a layer that pass `number` read."""
        if self._touched is None:
            return None
        return sum(self.read[number][name] for name in self.tensors[layer])


def points(
    engine: VllmEngine, ear: Ear, prompts: Sequence[Sequence[int]], output_tokens: int
) -> list[Point]:
    """All layers that `ear` hears, over the decode passes of one batch."""
    a = engine.loaded.architecture
    stored = precision(a, engine._trial.model)
    trace = engine.trace(prompts, output_tokens)
    with ear.listening():
        engine.generate(prompts, output_tokens, kind="timed", repeat=0)
    assert len(ear.chosen) == len(trace.steps), "the same prompts make the same passes"
    numbers = [number for number, step in enumerate(trace.steps) if step.decoding.all()]
    found = []
    for layer in ear.tensors:
        moe = a.layers[layer].experts
        assert moe is not None, f"layer {layer} has no experts"

        def mean(activated: Any, layer: int = layer) -> tuple[float, float]:
            costs: list[Cost] = [
                forward(
                    a, stored, slices_of(trace.steps[number]), activated=activated(number)
                ).layers[layer]
                for number in numbers
            ]
            return (
                float(np.mean([one.active_bytes_paper for one in costs])),
                float(np.mean([one.weight_bytes for one in costs])),
            )

        traced = {number: spread(a, trace.steps[number].activated.tolist()) for number in numbers}
        eq4, accounted = mean(lambda number, traced=traced: traced[number])
        full, _ = mean(lambda _: [one.experts.num if one.experts else 0 for one in a.layers])
        uniform, _ = mean(lambda _: None)
        read = [ear.touched(layer, number) for number in numbers]
        found.append(
            Point(
                layer=layer,
                batch=len(prompts),
                passes=len(numbers),
                experts=float(np.mean([traced[number][layer] for number in numbers])),
                eq4=eq4,
                accounted=accounted,
                counted=float(np.mean([ear.counted(layer, number) for number in numbers])),
                read=None if None in read else float(np.mean(np.array(read, dtype=np.int64))),
                all_experts=full,
                uniform=uniform,
            )
        )
    return found


def header() -> str:
    """Over the lines of a table; MB of 10⁶ bytes."""
    return (
        f"{'layer':>5} {'batch':>5} {'passes':>6} {'experts':>7} {'Eq 4':>9} {'every':>9} "
        f"{'counted':>9} {'read':>9} {'Eq 4 err':>9} {'every err':>9} "
        f"{'all exp.':>9} {'over':>7} {'uniform':>9} {'over':>7}"
    )


def line(one: Point) -> str:
    """For people, under `header`."""
    read = "-" if one.read is None else f"{one.read / 1e6:.3f}"
    return (
        f"{one.layer:>5} {one.batch:>5} {one.passes:>6} {one.experts:>7.2f} "
        f"{one.eq4 / 1e6:>9.3f} {one.accounted / 1e6:>9.3f} {one.counted / 1e6:>9.3f} "
        f"{read:>9} {one.error('eq4'):>9.3%} {one.error('accounted'):>9.3%} "
        f"{one.all_experts / 1e6:>9.3f} {one.error('all_experts'):>7.1%} "
        f"{one.uniform / 1e6:>9.3f} {one.error('uniform'):>7.1%}"
    )


def main() -> None:
    """Measures every batch on one engine and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with a checkpoint")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--layers", type=int, nargs="+", help="first, middle and last if not given")
    parser.add_argument("--dataset", default="builtin", help="source of prompts, or `random`")
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file for the same as JSON")
    options = parser.parse_args()

    def workload(batch: int) -> Workload:
        return Workload(
            batch_size=batch,
            input_tokens=options.input_tokens,
            output_tokens=options.output_tokens,
            dataset=None if options.dataset == "random" else options.dataset,
        )

    print({name: str(value) for name, value in vars(options).items()}, header(), sep="\n")
    found: list[Point] = []
    with built(Model(name=options.model), workload(max(options.batches))) as engine:
        a = engine.loaded.architecture
        moe = [index for index, layer in enumerate(a.layers) if layer.experts]
        ear = Ear(engine, options.layers or sorted({moe[0], moe[len(moe) // 2], moe[-1]}))
        for batch in options.batches:
            if options.dataset == "random":
                prompts = random_ids(workload(batch), vocab_size=a.vocab_size, index=0)
            else:
                prompts = text_ids(workload(batch), engine.tokenizer(), index=0)
            of_batch = points(engine, ear, prompts, options.output_tokens)
            print(*map(line, of_batch), sep="\n", flush=True)
            found += of_batch
    worst = {name: max(abs(one.error(name)) for one in found) for name in ("eq4", "accounted")}
    print(f"largest error: Eq 4 {worst['eq4']:.3%}, every weight {worst['accounted']:.3%}")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
