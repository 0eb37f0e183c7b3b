"""The verdict on a pass and on a record, from readings written down by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from workers import disturbance, repeats
from workers.contract.measure import Measure
from workers.contract.measurement import Drafted, Measurement, Pass, PassKind
from workers.contract.reading import GpuReading, Reading, columns, total
from workers.contract.record import SAMPLES
from workers.disturbance import Reads

QUIET = Reading(
    wall_s=1.0,
    computing_threads=2,
    cores=2,
    machine_cores=2,
    own_cpu_s=1.95,
    run_delay_s=0.02,
    involuntary_switches=12,
    others_cpu_s=0.03,
    elsewhere_cpu_s=0.0,
    steal_s=0.0,
    pressure_s=0.03,
)
BUSY = replace(QUIET, own_cpu_s=1.4, run_delay_s=0.5, others_cpu_s=0.6)


def _pass(
    reading: Reading | None = QUIET,
    kind: PassKind = "timed",
    e2e_s: float = 1.0,
    drafted: Drafted | None = None,
) -> Pass:
    return Pass(
        kind=kind,
        repeat=0,
        started_at=0.0,
        e2e_s=e2e_s,
        input_tokens=1,
        token_s=((e2e_s,),),
        step_s=(e2e_s,),
        reading=reading,
        drafted=drafted,
    )


def _scaled(reading: Reading, factor: float) -> Reading:
    names = ("wall_s", "own_cpu_s", "run_delay_s", "others_cpu_s", "elsewhere_cpu_s", "steal_s")
    return replace(reading, **{name: factor * getattr(reading, name) for name in names})


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({}, None),
        ({"run_delay_s": 0.5, "own_cpu_s": 1.4, "others_cpu_s": 0.6}, "waited for a core"),
        # three ranks of its own on two cores: others had nothing of them
        ({"run_delay_s": 1.0, "own_cpu_s": 1.99}, None),
        # helper threads of its own behind one another, on cores that are not full
        ({"run_delay_s": 0.6, "own_cpu_s": 1.2, "others_cpu_s": 0.02}, None),
        # a program on a core that the engine leaves alone
        (
            {"cores": 1, "own_cpu_s": 0.98, "run_delay_s": 0.0, "elsewhere_cpu_s": 1.0},
            "other programs had 52% of the machine's cores",
        ),
        # one of 64 cores
        ({"machine_cores": 64, "elsewhere_cpu_s": 1.0}, None),
        ({"steal_s": 0.2}, "the hypervisor took 10% of its cores' time"),
        ({"run_delay_s": None, "others_cpu_s": None, "steal_s": 0.0}, None),
    ],
)
def test_signs_on_cores(changes: dict[str, Any], sign: str | None) -> None:
    found = disturbance.of_reading(replace(QUIET, **changes))
    assert found.disturbed is (sign is not None)
    assert (sign or "") in (found.reason or "")


def test_a_tick_marks_no_short_pass_and_many_of_them_add_up() -> None:
    """5 ms in which a program had a millisecond; of 5 ms half taken; and forty such together."""
    tick = Reading(
        wall_s=0.005, cores=2, machine_cores=2, own_cpu_s=0.009, run_delay_s=0.001,
        others_cpu_s=0.01, elsewhere_cpu_s=0.0, steal_s=0.01,
    )  # fmt: skip
    assert disturbance.of_reading(tick).disturbed is False
    taken = replace(tick, run_delay_s=0.0035, own_cpu_s=0.006)
    assert disturbance.of_reading(taken).disturbed is True
    # Four ranks on two cores: 2 ms behind one another, while the cores were not full.
    ranks = replace(tick, computing_threads=4, run_delay_s=0.004, own_cpu_s=0.007, others_cpu_s=0.0)
    ranks = replace(ranks, steal_s=0.0)
    assert disturbance.of_reading(ranks).disturbed is False
    some = total([replace(tick, steal_s=0.0, others_cpu_s=0.004)] * 40)
    assert some is not None and some.wall_s == pytest.approx(0.2)
    assert disturbance.of_reading(some).disturbed is True
    passes = [_pass(replace(tick, steal_s=0.0, others_cpu_s=0.004), e2e_s=0.005)] * 40
    judged = repeats.settled(Measure(repeats=40), passes)
    assert {one.disturbed for one in judged} == {False}
    record = disturbance.of_record(judged)
    assert record.disturbed and (record.reason or "").startswith("all timed passes together: ")


def test_where_nothing_can_be_read_nothing_is_said() -> None:
    assert disturbance.of_reading(None).disturbed is None
    assert disturbance.of_reading(Reading(wall_s=1.0)).disturbed is None
    passes = repeats.settled(Measure(repeats=2), [_pass(None), _pass(None)])
    assert disturbance.of_record(passes) == disturbance.UNKNOWN
    assert disturbance.number(passes) is None
    assert all(one.counted for one in passes)
    assert total([QUIET, None]) is None


def test_memory_read_slowly_around_a_record_is_a_sign_of_its_own() -> None:
    passes = repeats.settled(Measure(repeats=2), [_pass(), _pass()])
    assert disturbance.of_record(passes, Reads(of_best=0.95, of_peak=0.8)).disturbed is False
    slow = disturbance.of_record(passes, Reads(of_best=0.5, of_peak=0.5))
    assert slow.disturbed and slow.reason == "around it memory was read at 50% of its engine's best"
    always = disturbance.of_record(passes, Reads(of_best=1.0, of_peak=0.3))
    assert always.reason == "around it memory was read at 30% of the calibrated peak"


def test_passes_of_a_trial_are_held_against_each_other() -> None:
    """What no counter shows; never where drafts make passes as long as they get lucky."""
    slow = [_pass(e2e_s=one) for one in (1.0, 1.1, 0.9, 1.0, 2.0)]
    verdicts = disturbance.of_passes(slow)
    assert [one.disturbed for one in verdicts] == [False] * 4 + [True]
    assert verdicts[-1].reason == "took 2.00 times the median of its trial's passes"
    lucky = [replace(one, drafted=Drafted(steps=1, proposed=1, accepted=1)) for one in slow]
    assert not any(one.disturbed for one in disturbance.of_passes(lucky))
    assert not any(one.disturbed for one in disturbance.of_passes(slow[2:])), "three are few"
    short = [_pass(e2e_s=one / 100) for one in (1.0, 1.1, 0.9, 1.0, 2.0)]
    assert not any(one.disturbed for one in disturbance.of_passes(short)), "10 ms may be a tick"


COLD = GpuReading(throttle_reasons=(), throttled_s=0.0, other_processes=0)


@pytest.mark.parametrize(
    ("gpu", "sign"),
    [
        (COLD, None),
        (replace(COLD, throttle_reasons=("SwPowerCap", "GpuIdle")), None),
        (
            replace(COLD, throttle_reasons=("HwThermalSlowdown", "SwPowerCap")),
            "GPU clocks are held down: HwThermalSlowdown",
        ),
        (replace(COLD, throttled_s=0.2), "heat held GPU clocks down for 20% of the time"),
        (
            replace(COLD, other_processes=1, other_memory_bytes=3 * 2**30),
            "1 other process on the GPU with 3.0 GiB",
        ),
        (replace(COLD, other_processes=2), "2 other processes on the GPU"),
    ],
)
def test_signs_on_gpus(gpu: GpuReading, sign: str | None) -> None:
    # What others have of the host's many cores says nothing of a GPU.
    found = disturbance.of_reading(replace(QUIET, gpu=gpu, elsewhere_cpu_s=1.0))
    assert (found.disturbed, found.reason) == (sign is not None, sign)


def _script(measure: Measure, readings: list[Reading | None], e2e_s: float = 1.0) -> list[Pass]:
    """Passes of a trial whose pairs are read like that, until it has enough."""
    made: list[Pass] = []
    left = iter(readings)
    while not repeats.enough(measure, made):
        made.append(_pass(_scaled(QUIET, 0.2), "one_token", e2e_s=0.2))
        made.append(_pass(next(left), e2e_s=e2e_s))
    return made


@pytest.mark.parametrize(
    ("measure", "noisy", "timed", "counted_noisy"),
    [
        (Measure(repeats=3), "", 3, 0),
        (Measure(repeats=3), "X", 4, 0),
        (Measure(repeats=3), "X.X", 5, 0),
        (Measure(repeats=3), "XXX", 6, 0),
        (Measure(repeats=3), "XXXX", 6, 1),
        (Measure(repeats=3), "XXXXXXXX", 6, 3),
        (Measure(repeats=3, extra_repeats=0), "XXX", 3, 3),
        (Measure(repeats=3, extra_repeats=1), "X.X", 4, 1),
        (Measure(repeats=3, timeout_s=4.9), "XXX", 4, 2),  # 1.2 s a pair
        (Measure(repeats=3, ci_width=0.1), "X", 4, 0),
        (Measure(repeats=3, ci_width=0.1, max_repeats=4), "XXXX", 6, 1),
    ],
)
def test_disturbed_passes_are_made_up_for_within_a_budget(
    measure: Measure, noisy: str, timed: int, counted_noisy: int
) -> None:
    readings: list[Reading | None] = [BUSY if one == "X" else QUIET for one in noisy]
    made = _script(measure, readings + [QUIET] * 20)
    judged = repeats.settled(measure, made)
    of = Measurement(passes=judged).of("timed")
    assert sum(one.kind == "timed" for one in judged) == timed
    assert len(of) == measure.repeats
    assert sum(bool(one.disturbed) for one in of) == counted_noisy
    assert disturbance.number(judged) == min(noisy.count("X"), timed)
    record = disturbance.of_record(judged)
    assert record.disturbed is (counted_noisy > 0)
    if counted_noisy:
        whole = f"{counted_noisy} of {measure.repeats} timed passes: its threads waited for a core"
        assert (record.reason or "").startswith(whole)


def test_a_disturbed_warm_up_changes_nothing() -> None:
    measure = Measure(repeats=2, timeout_s=2.0)
    made = [_pass(BUSY, "warmup", 5.0)]
    for _ in range(2):
        assert not repeats.enough(measure, made)
        made += [_pass(_scaled(QUIET, 0.2), "one_token", 0.2), _pass()]
    assert repeats.enough(measure, made)
    judged = repeats.settled(measure, made)
    assert judged[0].disturbed and disturbance.of_record(judged).disturbed is False


def test_the_stop_rule_sees_quiet_passes_alone() -> None:
    """Two disturbed passes of twice the time would keep the interval wide for ever."""
    measure = Measure(repeats=3, ci_width=0.05)
    made: list[Pass] = []
    for seconds, reading in [(2.0, BUSY), (1.0, QUIET), (2.0, BUSY), (1.01, QUIET), (1.0, QUIET)]:
        assert not repeats.enough(measure, made)
        made += [_pass(_scaled(QUIET, 0.2), "one_token", 0.2), _pass(reading, e2e_s=seconds)]
    assert repeats.enough(measure, made)
    times = [one.e2e_s for one in Measurement(passes=repeats.settled(measure, made)).of("timed")]
    assert times == [1.0, 1.01, 1.0]


def test_a_disturbed_pass_of_one_token_is_made_up_for_too() -> None:
    measure = Measure(repeats=2)
    noisy = _pass(_scaled(BUSY, 0.2), "one_token", 0.3)
    made = [noisy, _pass(), _pass(_scaled(QUIET, 0.2), "one_token", 0.2), _pass()]
    assert not repeats.enough(measure, made)
    made += [_pass(_scaled(QUIET, 0.2), "one_token", 0.2), _pass()]
    assert repeats.enough(measure, made)
    judged = Measurement(passes=repeats.settled(measure, made))
    assert [one.e2e_s for one in judged.of("one_token")] == [0.2, 0.2]
    assert len(judged.of("timed")) == 3, "they were quiet, so none is thrown away"


@pytest.mark.parametrize(
    ("measure", "noisy", "timed"),
    [
        (Measure(repeats=3), "XXXXXXXXX", 12),  # 36 ms a pair: 12 more take less than 0.5 s
        (Measure(repeats=3), "X" * 40, 16),
        (Measure(repeats=3, extra_repeats=3), "X" * 40, 6),
        (Measure(repeats=3), "", 3),
    ],
)
def test_short_passes_are_made_up_for_while_that_costs_nothing(
    measure: Measure, noisy: str, timed: int
) -> None:
    readings: list[Reading | None] = [_scaled(BUSY, 0.03) for _ in noisy]
    made: list[Pass] = []
    left = iter(readings + [_scaled(QUIET, 0.03)] * 20)
    while not repeats.enough(measure, made):
        made.append(_pass(_scaled(QUIET, 0.006), "one_token", e2e_s=0.006))
        made.append(_pass(next(left), e2e_s=0.03))
    assert sum(one.kind == "timed" for one in made) == timed
    quiet = disturbance.of_record(repeats.settled(measure, made)).disturbed is False
    assert quiet is (timed - len(noisy) >= measure.repeats)


def test_short_passes_that_are_disturbed_together_are_diluted() -> None:
    """Each waited for less than a time slice; of all of them it was a quarter of the time."""
    measure = Measure(repeats=3)
    hurried = replace(_scaled(QUIET, 0.008), own_cpu_s=0.012, run_delay_s=0.002, others_cpu_s=0.01)
    made: list[Pass] = []
    while not repeats.enough(measure, made):
        reading = hurried if len(made) < 6 else _scaled(QUIET, 0.008)
        made += [
            _pass(_scaled(QUIET, 0.006), "one_token", e2e_s=0.006),
            _pass(reading, e2e_s=0.008),
        ]
    assert not any(one.disturbed for one in disturbance.of_passes(made))
    assert sum(one.kind == "timed" for one in made) > measure.repeats
    assert disturbance.of_record(repeats.settled(measure, made)).disturbed is False


def test_raw_values_are_columns_of_samples() -> None:
    told = columns(replace(QUIET, gpu=replace(COLD, other_memory_bytes=2**30)))
    assert told.keys() <= set(SAMPLES.names)
    assert (told["run_delay_s"], told["gpu_other_memory_gib"]) == (0.02, 1.0)
    assert columns(None) == {}


def test_extra_repeats_is_checked_and_leaves_identities_alone() -> None:
    assert (Measure(repeats=4).most_extra, Measure(extra_repeats=0).most_extra) == (4, 0)
    with pytest.raises(ValueError, match="extra_repeats is -1"):
        Measure(extra_repeats=-1)
