"""The stop rule, the order of workloads, second tries and the place for temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from workers.contract.engine import EngineSettings
from workers.contract.errors import OutOfMemory
from workers.contract.job import Job, Ticket
from workers.contract.layout import Layout
from workers.contract.measure import Activation, Measure
from workers.contract.measurement import Pass
from workers.contract.message import Finished, Progress
from workers.contract.model import Model
from workers.contract.trace import Step, Trace
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.roofline_engine import RooflineEngine
from workers.hardware.device import Device, device
from workers.hardware.reference import Rate, Reference
from workers.hardware.watch import Watch
from workers.runner import BLOCK_S, _scratch, _Trial, _turn, run


def _trial(measure: Measure, workload: Workload | None = None) -> _Trial:
    trial = Trial(model=Model(name="m"), measure=measure, workload=workload or Workload())
    return _Trial(Ticket(trial=trial, trial_id="t"))


def _pass(e2e_s: float) -> Pass:
    return Pass(
        kind="timed",
        repeat=0,
        started_at=0.0,
        e2e_s=e2e_s,
        input_tokens=1,
        token_s=((e2e_s,),),
        step_s=(e2e_s,),
    )


@pytest.mark.parametrize(
    ("measure", "times", "passes"),
    [
        (Measure(repeats=3), [1.0] * 9, 3),
        (Measure(repeats=3, ci_width=0.1), [1.0] * 9, 3),
        (Measure(repeats=3, ci_width=0.1), [1.0, 2.0] * 9, 9),
        (Measure(repeats=3, ci_width=0.1, max_repeats=5), [1.0, 2.0] * 9, 5),
        # the outliers leave the interval once there are enough repeats to drop them
        (Measure(repeats=2, ci_width=0.1, max_repeats=20), [1.0, 3.0] + [1.0] * 18, 9),
        (Measure(repeats=1, ci_width=0.1), [1.0] * 9, 2),
    ],
)
def test_stop_rule(measure: Measure, times: list[float], passes: int) -> None:
    trial = _trial(measure)
    made = 0
    while not trial.enough():
        trial.passes.append(_pass(times[made]))
        made += 1
    assert made == passes


def test_the_smallest_top_k_comes_first_then_the_largest_workload() -> None:
    sizes = [Workload(batch_size=b, input_tokens=i) for b, i in [(1, 10), (8, 500), (8, 10)]]
    tickets = [
        Ticket(trial=Trial(model=Model(name="mixtral-8x7b", top_k=k), workload=one), trial_id="t")
        for k in (4, 1, None)
        for one in sizes
    ]
    ordered = sorted(tickets, key=_turn)
    assert [one.trial.model.top_k for one in ordered] == [1] * 3 + [None] * 3 + [4] * 3
    assert [one.trial.workload for one in ordered] == [sizes[1], sizes[2], sizes[0]] * 3


def test_temporary_files_go_where_they_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = tempfile.gettempdir()
    segment = Path("/dev/shm/vllm_dist_test_of_runner-tp")
    with _scratch(str(tmp_path)) as folder:
        assert Path(tempfile.gettempdir()) == folder
        (folder / "vllm_dist_test_of_runner").touch()
        segment.touch()
        assert folder.parent == tmp_path
    assert not folder.exists()
    assert not segment.exists()
    assert tempfile.gettempdir() == before


class _Hoarder(RooflineEngine):
    """Keeps buffers of every top-k that it has run: a second one finds no memory left."""

    built = 0

    def __init__(self, trial: Trial, workloads: Sequence[Workload], site: Site) -> None:
        super().__init__(trial, workloads, site)
        type(self).built += 1
        self._ran: set[int | None] = set()

    def generate(self, *args: Any, **kwargs: Any) -> Pass:
        self._ran.add(self._trial.model.top_k)
        if len(self._ran) > 1 or self._trial.model.top_k == 8:
            raise OutOfMemory("no room for a buffer", stage="run", scope="device")
        return super().generate(*args, **kwargs)


def test_memory_that_runs_out_behind_another_top_k_is_tried_again_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What still fails on an engine of its own is a result; what does not was none."""
    monkeypatch.setattr("workers.runner.engine_class", lambda kind: _Hoarder)
    monkeypatch.setattr(_Hoarder, "built", 0)
    tickets = tuple(
        Ticket(
            trial=Trial(
                model=Model(name="mixtral-8x7b", weights="dummy", top_k=k),
                layout=Layout(tensor=4),
                workload=Workload(batch_size=1, input_tokens=8, output_tokens=4),
                engine=EngineSettings(kind="roofline", eager=True),
            ),
            trial_id=f"k{k}",
        )
        for k in (1, 2, 4, 8)
    )
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100", tickets=tickets)
    outcomes = {one.trial_id: one.outcome for one in run(job) if isinstance(one, Finished)}
    assert outcomes == {"k1": "ok", "k2": "ok", "k4": "ok", "k8": "oom"}
    assert _Hoarder.built == 4


class _Cramped(RooflineEngine):
    """Its cache holds seven requests; beside a larger batch it holds one less."""

    built: ClassVar[list[set[int]]] = []

    def __init__(self, trial: Trial, workloads: Sequence[Workload], site: Site) -> None:
        super().__init__(trial, workloads, site)
        sizes = {one.batch_size for one in workloads}
        self.built.append(sizes)
        room = 7 if max(sizes) <= 7 else 6
        short = {one for one in workloads if one.batch_size > room}
        tight = {one for one in short if one.batch_size < max(sizes) and one.batch_size == 7}
        error = OutOfMemory("the KV cache holds 6", stage="kv_cache", scope="device")
        self.loaded = replace(
            self.loaded, too_large=dict.fromkeys(short - tight, error), too_tight=frozenset(tight)
        )


def test_a_batch_beyond_the_cache_is_oom_and_the_others_of_its_group_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.runner.engine_class", lambda kind: _Cramped)
    monkeypatch.setattr(_Cramped, "built", [])
    tickets = tuple(
        Ticket(
            trial=Trial(
                model=Model(name="mixtral-8x7b", weights="dummy", top_k=k),
                layout=Layout(tensor=4),
                workload=Workload(batch_size=b, input_tokens=8, output_tokens=4),
                engine=EngineSettings(kind="roofline", eager=True),
            ),
            trial_id=f"k{k}b{b}",
        )
        for k, b in [(1, 7), (1, 32), (2, 16), (2, 4), (2, 1)]
    )
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100", tickets=tickets)
    records = {
        one.trial_id: one.record.to_pylist()[0] for one in run(job) if isinstance(one, Finished)
    }
    outcomes = {trial: row["outcome"] for trial, row in records.items()}
    assert outcomes == {"k1b7": "ok", "k1b32": "oom", "k2b16": "oom", "k2b4": "ok", "k2b1": "ok"}
    assert _Cramped.built == [{1, 4, 7, 16, 32}, {7}]
    told = records["k2b16"]
    assert (told["oom_stage"], told["oom_scope"]) == ("kv_cache", "device")
    assert told["engine_args"] and told["top_k"] == 2
    assert records["k2b4"]["top_k"] == 2


class _Real(RooflineEngine):
    """Taken for an engine of this machine: every repeat is made."""

    @classmethod
    def stands_for(cls, device: str) -> Device | None:
        return None


@dataclass
class _Hand:
    device: Device
    calibration: None = None

    def columns(self, dtype: object) -> dict[str, Any]:
        return {}


class _Blind(Watch):
    """Sees nothing: what else runs beside these tests must not add passes."""

    def end(self) -> Any:
        super().end()
        return None


class _Counting(_Real):
    """Counts one pass of the prompts and one of decoding: all experts, then half of them."""

    @classmethod
    def refuses(cls, trial: Trial) -> str | None:
        return None

    def trace(self, prompts: Sequence[Sequence[int]], output_tokens: int, **kwargs: Any) -> Trace:
        a = self.loaded.architecture
        batch, tokens = len(prompts), len(prompts[0])
        every = np.ones((a.num_layers, a.num_experts), np.int64)
        half, nothing = every.copy(), np.zeros_like(every)
        half[:, a.num_experts // 2 :] = 0
        steps = []
        for new, context, prefill, decode in (
            (tokens, 0, every, nothing),
            (1, tokens, nothing, half),
        ):
            steps.append(
                Step(
                    request=np.arange(batch),
                    new=np.full(batch, new),
                    context=np.full(batch, context),
                    decoding=np.full(batch, context > 0),
                    prefill=prefill,
                    decode=decode,
                    seconds=0.1,
                )
            )
        return Trace(
            layers=tuple(range(a.num_layers)),
            top_k=a.top_k,
            steps=tuple(steps),
            tokens=((0,) * output_tokens,) * batch,
        )


def _spoken(
    monkeypatch: pytest.MonkeyPatch,
    seconds: float | None,
    activation: Mapping[int, Activation] | None = None,
    **more: Any,
) -> list[str]:
    """What is said of five workloads with batches of 1 to 5, each predicted to take `seconds`
    with both repeats: a letter for its stage, or an = where it has ended; then where its experts
    come from, if that was asked."""
    monkeypatch.setattr("workers.runner.engine_class", lambda kind: _Counting)
    monkeypatch.setattr("workers.runner.in_hand", lambda host: _Hand(device("h100")))
    monkeypatch.setattr("workers.runner.Watch", _Blind)
    each = {"predicted_e2e_s": 0.4, "predicted_ttft_s": 0.1}
    known = {key: value * seconds for key, value in each.items()} if seconds is not None else {}
    tickets = tuple(
        Ticket(
            trial=Trial(
                model=Model(name="mixtral-8x7b", weights="dummy"),
                layout=Layout(tensor=4),
                workload=Workload(batch_size=size, input_tokens=8, output_tokens=4),
                engine=EngineSettings(kind="roofline", eager=True),
                measure=Measure(repeats=2, activation=(activation or {}).get(size, False)),
            ),
            trial_id=str(size),
            predicted=known,
        )
        for size in range(1, 6)
    )
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100", tickets=tickets, **more)
    said = [one for one in run(job) if getattr(one, "trial_id", None)]
    assert {one.outcome for one in said if isinstance(one, Finished)} == {"ok"}
    return [
        f"={one.trial_id}{_source(one) if activation else ''}"
        if isinstance(one, Finished)
        else f"{one.stage[0]}{one.trial_id}"
        for one in said
        if isinstance(one, Finished | Progress)
    ]


def _source(one: Finished) -> str:
    found = one.record.column("activation_source")[0].as_py()
    return f":{found}" + ("+" if one.sheet is not None else "")


def test_workloads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = "w5 w4 w3 w2 w1 r5 r4 r3 r2 r1 r5 r4 r3 r2 r1 =5 =4 =3 =2 =1".split()
    assert _spoken(monkeypatch, BLOCK_S / 5) == turns
    assert _spoken(monkeypatch, None) == turns, "nothing is predicted"


def test_workloads_that_take_long_take_turns_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of every size, the largest first, and the records of one before the other."""
    turns = "w5 w3 w1 r5 r3 r1 r5 r3 r1 =5 =3 =1 w4 w2 r4 r2 r4 r2 =4 =2".split()
    assert _spoken(monkeypatch, BLOCK_S / 3) == turns
    assert _spoken(monkeypatch, BLOCK_S / 6, slowness=2.0) == turns


def test_a_workload_beyond_a_block_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [f"w{n} r{n} r{n} ={n}".split() for n in (5, 4, 3, 2, 1)]
    assert _spoken(monkeypatch, 9 * BLOCK_S) == [word for one in alone for word in one]


def test_who_asks_for_a_sheet_waits_for_the_probes_of_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[int, Activation] = {5: "sheet", 4: True, 3: "sheet", 2: True}
    turns = "w5 w4 w3 w2 w1 r5 r4 r3 r2 r1 r5 r4 r3 r2 r1 =1:uniform".split()
    probes = "r4 r4 =4:traced+ r2 r2 =2:traced+".split()
    ends = ["=3:sheet-interpolated", "=5:None"]
    assert _spoken(monkeypatch, None, asked) == [*turns, *probes, *ends]


def test_who_asks_waits_for_probes_of_a_later_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, Activation] = {5: "sheet", 4: True, 3: "sheet", 2: True}
    first = "w5 w3 w1 r5 r3 r1 r5 r3 r1 =1:uniform".split()
    later = "w4 w2 r4 r2 r4 r2 r4 r4 =4:traced+ r2 r2 =2:traced+".split()
    ends = ["=5:None", "=3:sheet-interpolated"]
    assert _spoken(monkeypatch, BLOCK_S / 3, asked) == [*first, *later, *ends]


def test_nobody_waits_where_nothing_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = "w5 w4 w3 w2 w1 r5 r4 r3 r2 r1 r5 r4 r3 r2 r1".split()
    ends = "=5:None =4:uniform =3:None =2:uniform =1:uniform".split()
    assert _spoken(monkeypatch, None, {5: "sheet", 3: "sheet"}) == [*turns, *ends]


class _Drifting(_Real):
    """A machine that is slower at every look; the third repeat of batch 1 runs out of memory."""

    looks = 0

    def reference(self) -> Reference:  # type: ignore[override]
        type(self).looks += 1
        one = Rate(median=100.0 / self.looks, spread=0.01 * self.looks)
        return Reference(bandwidth_gb_s=one, tflops=one)

    def generate(self, *args: Any, **kwargs: Any) -> Pass:
        if len(args[0]) == 1 and kwargs["kind"] == "timed" and kwargs["repeat"] == 2:
            raise OutOfMemory("no room", stage="run", scope="device")
        return super().generate(*args, **kwargs)


def test_the_machine_is_looked_at_before_a_block_and_after_each_round_that_ends_a_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batch 3 ends in the first round and batch 2 in the second; of the round that fails only
    what it had ended is told."""
    monkeypatch.setattr("workers.runner.engine_class", lambda kind: _Drifting)
    monkeypatch.setattr("workers.runner.in_hand", lambda host: _Hand(device("h100")))
    monkeypatch.setattr("workers.runner.Watch", _Blind)
    monkeypatch.setattr(_Drifting, "looks", 0)
    tickets = tuple(
        Ticket(
            trial=Trial(
                model=Model(name="mixtral-8x7b", weights="dummy"),
                layout=Layout(tensor=4),
                workload=Workload(batch_size=size, input_tokens=8, output_tokens=4),
                engine=EngineSettings(kind="roofline", eager=True),
                measure=Measure(repeats=repeats),
            ),
            trial_id=str(size),
        )
        for size, repeats in ((4, 3), (3, 1), (2, 2), (1, 3))
    )
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100", tickets=tickets)
    found = {
        one.trial_id: one.record.to_pylist()[0] for one in run(job) if isinstance(one, Finished)
    }
    assert {key: row["outcome"] for key, row in found.items()} == {
        "4": "ok", "3": "ok", "2": "ok", "1": "oom",
    }  # fmt: skip
    names = ("reference_tflops_before", "reference_tflops_after", "reference_bandwidth_spread")
    seen = {key: tuple(row[name] for name in names) for key, row in found.items()}
    assert seen == {
        "3": (100.0, 50.0, 0.02),
        "2": (100.0, 100 / 3, 0.03),
        "4": (100.0, None, 0.01),
        "1": (100.0, None, 0.01),
    }


def _doubting(monkeypatch: pytest.MonkeyPatch, slow: Device, again: Device | None) -> list[Any]:
    """Records of two trials on a CPU whose peaks were measured as `slow`, and then as `again`."""
    monkeypatch.setattr("workers.runner.engine_class", lambda kind: _Real)
    monkeypatch.setattr("workers.runner.in_hand", lambda host: _Hand(slow))
    monkeypatch.setattr("workers.runner.hand_again", lambda host: again and _Hand(again))
    tickets = tuple(
        Ticket(
            trial=Trial(
                model=Model(name="mixtral-8x7b", weights="dummy", num_layers=4),
                workload=Workload(batch_size=size, input_tokens=8, output_tokens=4),
                engine=EngineSettings(kind="roofline", eager=True),
                measure=Measure(repeats=1),
            ),
            trial_id=str(size),
        )
        for size in (2, 1)
    )
    job = Job(sweep="s", run_id="r", group_id="g", profile="h100", tickets=tickets)
    return [one.record.to_pylist()[0] for one in run(job) if isinstance(one, Finished)]


def test_a_peak_that_passes_go_beyond_is_measured_again_or_nothing_is_taken_against_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The passes are those of an H100; the calibrations find a CPU of less, or of more."""
    of_cpu = replace(device("h100"), name="cpu", kind="cpu")
    slow = replace(of_cpu, bandwidth_gb_s=500.0)
    fast = replace(of_cpu, bandwidth_gb_s=5000.0)
    rows = _doubting(monkeypatch, slow, fast)
    for row in rows:
        assert row["peak_bandwidth_gb_s"] == 5000.0 and 0 < row["s_mbu"] <= 1
        assert row["outcome_reason"] is None
    assert capsys.readouterr().out.count("calibrated again") == 1
    for again in (slow, None):
        rows = _doubting(monkeypatch, slow, again)
        for row in rows:
            assert row["outcome"] == "ok" and row["e2e_s"] > 0
            assert row["s_mbu"] is row["mbu"] is row["prefill_s_mbu"] is None
            assert row["s_mfu"] is not None
            assert "of the 500 GB/s measured: such a peak is none" in row["outcome_reason"]
