"""How many disturbed records say so, how many quiet ones do, and what asking costs.

    PYTHONPATH=. python tests/bench/bench_disturbance.py [--records 20] [--raw FILE]
    PYTHONPATH=. python tests/bench/bench_disturbance.py --replay FILE

On a machine that is quiet. Two real engines run one after the other: one with a thread on every
core, one with a single thread, on a core of its own. A Ray cluster is up beside them, as it is in
a run. Each makes records of a few passes with the product's own rules, in random order quiet or
beside a real disturber, which is stopped and let go on by signals:

- `one core`, `two cores`: programs that compute all the time;
- `memory`: one that streams through an array that no cache holds; `memory elsewhere` is the same
  on a core that the engine leaves alone (of the engine with one thread);
- `comes and goes`: one that computes for 0.3 s of each second.

Printed are, for each kind, records and passes that were marked; how much slower they were than
quiet ones; the quantiles of what was read; and what the looks cost as a share of a pass. A pass
beside the one that comes and goes counts as disturbed if that ran for a tenth of it. `--raw` keeps
a line of JSON per record with everything that was read, and `--replay` judges such a file again:
to try other thresholds of `workers.disturbance`, no machine is needed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster import Cluster
from workers import disturbance, repeats
from workers.contract.engine import EngineSettings
from workers.contract.measure import Measure
from workers.contract.measurement import Pass, PassKind
from workers.contract.model import Model
from workers.contract.reading import GpuReading, Reading
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.disturbance import Reads
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.hardware.watch import Watch
from workers.prompts import random_ids

QUIET = "quiet"
ALL_CORES, ONE_CORE = "all cores", "one thread"
ON_S, PERIOD_S = 0.3, 1.0
"""Of the disturber that comes and goes, by the system's clock."""
TOUCHED = 0.1
"""Share of a pass that it must run beside to count."""
SETTLE_S = 0.05
"""After a disturber is let go on or stopped."""

SPIN = "while True: pass"
STREAM = """
import numpy as np
one, other = np.ones(2**24), np.ones(2**24)
while True: np.copyto(one, other); np.copyto(other, one)
"""
BLINK = f"""
import time
while True:
    if time.time() % {PERIOD_S} < {ON_S}: pass
    else: time.sleep({PERIOD_S} - time.time() % {PERIOD_S})
"""
DISTURBERS: dict[str, dict[str, tuple[str, ...]]] = {
    ALL_CORES: {
        "one core": (SPIN,),
        "two cores": (SPIN, SPIN),
        "memory": (STREAM,),
        "comes and goes": (BLINK,),
    },
    ONE_CORE: {"memory elsewhere": (STREAM,)},
}
"""Programs by engine and kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record, as it was made."""

    engine: str
    kind: str
    passes: tuple[Pass, ...]
    """Not judged."""
    read_gb_s: tuple[float, float] | None
    """Loads of fixed work before and after."""

    def to_json(self) -> str:
        """A line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, line: str) -> Record:
        """Back from it."""
        data = json.loads(line)
        made = []
        for one in data.pop("passes"):
            reading = one.pop("reading")
            if reading is not None:
                gpu = reading.pop("gpu")
                reading = Reading(**reading, gpu=GpuReading(**gpu) if gpu else None)
            made.append(Pass(**one, reading=reading))
        read = data.pop("read_gb_s")
        return cls(**data, passes=tuple(made), read_gb_s=tuple(read) if read else None)


def main() -> None:
    """Makes records or reads them, and prints counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=20, help="of each kind; quiet: twice that")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--extra-repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--budget-s", type=float, default=360.0, help="of both engines together")
    parser.add_argument("--engine", choices=[ALL_CORES, ONE_CORE], help="this one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", type=Path, help="file for a line of JSON per record")
    parser.add_argument("--replay", type=Path, help="judge such a file; run nothing")
    asked = parser.parse_args()
    if asked.replay is not None:
        records = [Record.of_json(line) for line in asked.replay.read_text().splitlines()]
    else:
        records = []
        with (asked.raw or Path(os.devnull)).open("w", encoding="utf-8") as raw:
            for one in _made(asked):
                records.append(one)
                raw.write(f"{one.to_json()}\n")
                raw.flush()
    report(records, _measure_of(asked))


def _measure_of(asked: argparse.Namespace) -> Measure:
    return Measure(repeats=asked.repeats, extra_repeats=asked.extra_repeats)


def _made(asked: argparse.Namespace) -> Iterator[Record]:
    """Records of both engines, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    share = {ALL_CORES: 0.75, ONE_CORE: 0.25} if asked.engine is None else {asked.engine: 1.0}
    with Cluster.connect("local"):
        for name in [asked.engine] if asked.engine else (ALL_CORES, ONE_CORE):
            if name == ONE_CORE and len(os.sched_getaffinity(0)) < 2:
                print("one core only: there is none that an engine could leave alone")
                continue
            queue: Any = context.Queue()
            process = context.Process(
                target=_measure, args=(name, asked, share[name] * asked.budget_s, queue)
            )
            process.start()
            while (line := queue.get()) is not None:
                yield Record.of_json(line)
            process.join()


def _measure(name: str, asked: argparse.Namespace, budget_s: float, queue: Any) -> None:
    """Builds an engine and makes its records, in random order, while there is time."""
    try:
        for record in _records(name, asked, budget_s):
            queue.put(record.to_json())
    finally:
        queue.put(None)


def _records(name: str, asked: argparse.Namespace, budget_s: float) -> Iterator[Record]:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    cores = sorted(os.sched_getaffinity(0))
    if name == ONE_CORE:
        os.sched_setaffinity(0, cores[:1])
    workload = Workload(
        batch_size=asked.batch_size,
        input_tokens=asked.input_tokens,
        output_tokens=asked.output_tokens,
    )
    model = Model(
        name="mixtral-8x7b", weights="dummy", scale=0.0625, num_layers=2, num_experts=8, top_k=2
    )
    measure = _measure_of(asked)
    trial = Trial(
        model=model, workload=workload, measure=measure, engine=EngineSettings(eager=True)
    )
    kinds = DISTURBERS[name]
    order = [QUIET] * (2 * asked.records) + [kind for kind in kinds for _ in range(asked.records)]
    random.Random(asked.seed).shuffle(order)
    elsewhere = cores[1:] if name == ONE_CORE else cores
    with ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        engine = VllmEngine(trial, [workload], Site(scratch=Path(folder), device="cpu"))
        held.callback(engine.close)
        watch = Watch()
        watch.find()  # before there are disturbers, which are no part of the engine
        held.callback(watch.close)
        programs = {
            kind: [held.enter_context(_program(text, elsewhere)) for text in texts]
            for kind, texts in kinds.items()
        }
        for number in range(3):  # the first passes pay for kernels and allocations
            _pass(engine, watch, workload, number, "warmup")
        end = time.monotonic() + budget_s
        for kind in order:
            if time.monotonic() > end:
                return
            with _running(programs.get(kind, [])):
                before = engine.reference()
                passes: list[Pass] = []
                while not repeats.enough(measure, passes):
                    for which in ("one_token", "timed"):
                        passes.append(_pass(engine, watch, workload, len(passes), which))
                after = engine.reference()
            reads = None
            if before is not None and after is not None:
                reads = before.bandwidth_gb_s.median, after.bandwidth_gb_s.median
            yield Record(engine=name, kind=kind, passes=tuple(passes), read_gb_s=reads)


def _pass(engine: VllmEngine, watch: Watch, workload: Workload, index: int, kind: PassKind) -> Pass:
    prompts = random_ids(workload, vocab_size=engine.loaded.architecture.vocab_size, index=index)
    tokens = 1 if kind == "one_token" else workload.output_tokens
    watch.begin()
    one = engine.generate(prompts, tokens, kind=kind, repeat=index)
    reading = watch.end()
    # Stamps of single tokens say nothing here and would fill the file.
    return Pass(
        kind=one.kind, repeat=index, started_at=one.started_at, e2e_s=one.e2e_s,
        input_tokens=one.input_tokens, token_s=((one.e2e_s,),), step_s=(), reading=reading,
    )  # fmt: skip


@contextmanager
def _program(text: str, cores: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """A disturber that is stopped."""
    bound = (
        "import ctypes, os, signal\n"
        "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # PR_SET_PDEATHSIG: not without the bench
        f"os.sched_setaffinity(0, {set(cores)})\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", bound + text], env=env)
    time.sleep(1.0)  # its imports
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _running(programs: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    for one in programs:
        one.send_signal(signal.SIGCONT)
    time.sleep(SETTLE_S)
    try:
        yield
    finally:
        for one in programs:
            one.send_signal(signal.SIGSTOP)
        time.sleep(SETTLE_S)


def beside(one: Pass, kind: str) -> float:
    """Share of a pass beside which a disturber of that kind ran."""
    if kind == QUIET:
        return 0.0
    if kind != "comes and goes":
        return 1.0

    def on_until(moment: float) -> float:
        return moment // PERIOD_S * ON_S + min(moment % PERIOD_S, ON_S)

    return (on_until(one.started_at + one.e2e_s) - on_until(one.started_at)) / one.e2e_s


def report(records: Sequence[Record], measure: Measure) -> None:
    """Prints counts, slowdowns, what was read, and costs."""
    best: dict[str, float] = {}
    for one in records:
        if one.read_gb_s is not None:
            best[one.engine] = max(best.get(one.engine, 0.0), *one.read_gb_s)
    counts = {True: [0, 0], False: [0, 0]}
    for engine in dict.fromkeys(one.engine for one in records):
        mine = [one for one in records if one.engine == engine]
        usual = _usual([one for one in mine if one.kind == QUIET])
        print(f"engine with {engine}; a quiet pass takes {_ms(usual)}")
        for kind in dict.fromkeys((QUIET, *sorted({one.kind for one in mine}))):
            some = [one for one in mine if one.kind == kind]
            if some:
                _kind(kind, some, measure, best.get(engine), usual, counts)
    for was, words in ((True, "disturbed passes, found"), (False, "quiet passes, wrongly marked")):
        whole, said = counts[was]
        share = f" ({said / whole:.1%})" if whole else ""
        print(f"all records with figures of {words}: {said} of {whole}{share}")
    costs = [
        (one.reading.check_s / one.e2e_s, one.kind)
        for record in records
        for one in record.passes
        if one.reading is not None and record.kind == QUIET
    ]
    print("cost of both looks as a share of a quiet pass, median and 95th percentile")
    for which in ("timed", "one_token"):
        found = sorted(share for share, kind in costs if kind == which)
        if found:
            print(f"  {which:<10} {_at(found, 0.5):8.3%} {_at(found, 0.95):8.3%}")


def _kind(
    kind: str,
    records: Sequence[Record],
    measure: Measure,
    best_gb_s: float | None,
    usual: float | None,
    counts: Mapping[bool, list[int]],
) -> None:
    """What is to be said of the records of one kind; adds to `counts`, by whether figures were
    of disturbed passes, all records and those that were marked."""
    judged = [repeats.settled(measure, one.passes) for one in records]
    verdicts = []
    truly = []
    for record, passes in zip(records, judged, strict=True):
        share = None
        if record.read_gb_s is not None and best_gb_s:
            share = max(record.read_gb_s) / best_gb_s
        verdicts.append(disturbance.of_record(passes, Reads(of_best=share)))
        counted = [one for one in passes if one.counted]
        truly.append(any(beside(one, kind) >= TOUCHED for one in counted))
    marked = [bool(one.disturbed) for one in verdicts]
    right = sum(a and b for a, b in zip(marked, truly, strict=True))
    wrong = sum(a and not b for a, b in zip(marked, truly, strict=True))
    for was, said in zip(truly, marked, strict=True):
        counts[was][0] += 1
        counts[was][1] += said
    print(f"  {kind}: {len(records)} records")
    if any(truly):
        print(f"    figures of disturbed passes: {sum(truly)}, of them marked {right}")
    if not all(truly):
        print(f"    figures of quiet passes:     {truly.count(False)}, of them marked {wrong}")
    passes = [one for some in judged for one in some if one.kind == "timed"]
    hit = [one for one in passes if beside(one, kind) >= TOUCHED]
    clear = [one for one in passes if beside(one, kind) == 0.0]
    for words, some in (("disturbed", hit), ("quiet", clear)):
        if some:
            found = sum(bool(one.disturbed) for one in some)
            print(f"    timed passes that were {words}: {len(some)}, marked {found}")
            _readings(some, usual)
    shares = sorted(
        min(one.read_gb_s) / best_gb_s for one in records if one.read_gb_s and best_gb_s
    )
    if shares:
        print(f"      memory read, of the engine's best  {_spread(shares)}")
    reasons: dict[str, int] = {}
    for verdict in verdicts:
        if verdict.reason is not None:
            words = "".join(" " if letter.isdigit() else letter for letter in verdict.reason)
            reasons[words] = reasons.get(words, 0) + 1
    for words, count in sorted(reasons.items(), key=lambda one: -one[1])[:5]:
        print(f"      {count} x {' '.join(words.split())}")


def _readings(passes: Sequence[Pass], usual: float | None) -> None:
    """Quantiles of what a verdict rests on."""
    readings = [one.reading for one in passes if one.reading is not None]
    lines: dict[str, list[float | None]] = {
        "time, of a quiet pass": [one.e2e_s / usual if usual else None for one in passes],
        "waited behind others, of the pass": [
            None if (waited := disturbance.waited_s(one)) is None else waited / one.wall_s
            for one in readings
        ],
        "run delay, of the pass": [_over(one.run_delay_s, one.wall_s) for one in readings],
        "others, of the machine's cores": [
            _over(
                None if one.others_cpu_s is None else one.others_cpu_s + (one.elsewhere_cpu_s or 0),
                one.wall_s * (one.machine_cores or 1),
            )
            for one in readings
        ],
        "stolen, of its cores": [
            _over(one.steal_s, one.wall_s * (one.cores or 1)) for one in readings
        ],
        "pressure, of the pass": [_over(one.pressure_s, one.wall_s) for one in readings],
        "involuntary switches per second": [
            _over(one.involuntary_switches, one.wall_s) for one in readings
        ],
    }
    for words, values in lines.items():
        found = sorted(one for one in values if one is not None)
        if found:
            print(f"      {words:<34} {_spread(found)}")


def _usual(quiet: Sequence[Record]) -> float | None:
    times = [one.e2e_s for record in quiet for one in record.passes if one.kind == "timed"]
    return statistics.median(times) if times else None


def _over(value: float | None, whole: float) -> float | None:
    return None if value is None else value / whole


def _spread(ordered: Sequence[float]) -> str:
    parts = ", ".join(f"{_at(ordered, q):.3g}" for q in (0.0, 0.05, 0.5, 0.95, 0.98, 1.0))
    return f"0/5/50/95/98/100 %: {parts}"


def _at(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1000 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
