"""Whether a pass, and the record made of passes, was disturbed by something else.

Pure functions of what was read (`workers.contract.reading`); `docs/design/disturbance.md` has
the grounds of every threshold. Each sign is a share of the pass, and counts only above an
absolute least, so that a timer's tick in a pass of five milliseconds is no sign. Short passes
are therefore judged once more together, where the sums are large enough to tell.

Time that the engine's threads waited for a core is charged to others only as far as others can
have caused it: not more than the time that the cores did other things than compute for the
engine. An engine with more threads than cores waits for itself, and that is a property of what
is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from workers.contract.measurement import Pass, PassKind
from workers.contract.reading import GpuReading, Reading, total

WAITED, LEAST_WAITED_S = 0.18, 0.003
"""Share of a pass that the engine's threads waited for a core behind others, and the least."""
OTHERS, LEAST_OTHERS_S = 0.12, 0.05
"""Share of the machine's cores that others had (of engines on CPUs), and the least: five of the
ticks in which the system counts it."""
COARSE_S = 0.02
"""Two ticks: how far the system's count of what others had may be off. An engine that has more
threads than cores, and so waits for itself, is not charged with it."""
STOLEN, LEAST_STOLEN_S = 0.05, 0.03
"""Share of the engine's cores that the hypervisor took, and the least."""
THROTTLED, LEAST_THROTTLED_S = 0.02, 0.005
"""Share of a pass for which heat held a GPU's clocks down, and the least."""
SLOWER, LEAST_SLOWER_S = 1.5, 0.02
"""Time of a pass over the median of its trial's, and the least difference."""
FEWEST = 4
"""Passes of a kind from which on they are held against each other."""
SLOW_READ, SLOW_READ_OF_PEAK = 0.55, 0.40
"""Memory bandwidth of the short load of fixed work around a trial, over the best that the same
load reached on this engine, and over the calibrated peak of the device."""
HOLDING_DOWN = frozenset(
    {"HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown"}
)
"""Reasons to hold clocks down that are not the work's own: a GPU at its power limit is at its
own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is to be thought of a pass."""

    disturbed: bool | None
    """Null where nothing could be read."""
    reason: str | None = None
    """The strongest sign, in words."""
    weight: float = 0.0
    """The strongest sign over its threshold; above 1 is disturbed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sign:
    weight: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """Memory bandwidth of the loads of fixed work around a trial, the higher one (see
    `workers.hardware.reference`): a burst beside one of them need not have met a pass. Null where
    there is nothing to hold it against."""

    of_best: float | None = None
    """Over the best that the same load reached on this engine."""
    of_peak: float | None = None
    """Over the calibrated peak of the device, of an engine that computes on all of it."""


UNKNOWN = Verdict(disturbed=None)
_WORDS: dict[PassKind, str] = {"timed": "timed passes", "one_token": "passes of one token"}


def of_reading(reading: Reading | None) -> Verdict:
    """The verdict on one pass, or on several added up."""
    if reading is None or not _tells(reading):
        return UNKNOWN
    signs = [*_of_cores(reading), *_of_gpu(reading)]
    worst = max(signs, key=lambda sign: sign.weight, default=None)
    if worst is None:
        return Verdict(disturbed=False)
    beyond = worst.weight > 1
    return Verdict(disturbed=beyond, reason=worst.reason if beyond else None, weight=worst.weight)


def of_passes(passes: Sequence[Pass]) -> list[Verdict]:
    """The verdict on each pass of a trial, also against the others of its kind."""
    usual = {kind: _usual(passes, kind) for kind in _WORDS}
    return [_against(one, usual.get(one.kind)) for one in passes]


def of_record(passes: Sequence[Pass], reads: Reads = Reads()) -> Verdict:
    """The verdict on a record.

    Args:
        passes: its passes, judged; those that do not count, and warm-ups, are left out.
        reads: what the loads around it reached.
    """
    kinds: dict[str, list[Pass]] = {
        words: [one for one in passes if one.kind == kind and one.counted]
        for kind, words in _WORDS.items()
    }
    for words, some in kinds.items():
        if found := [one for one in some if one.disturbed]:
            reason = f"{len(found)} of {len(some)} {words}: {found[0].disturbed_reason}"
            return Verdict(disturbed=True, reason=reason)
    for share, least, best in (
        (reads.of_best, SLOW_READ, "its engine's best"),
        (reads.of_peak, SLOW_READ_OF_PEAK, "the calibrated peak"),
    ):
        if share is not None and share < least:
            reason = f"around it memory was read at {share:.0%} of {best}"
            return Verdict(disturbed=True, reason=reason)
    for words, some in kinds.items():
        together = of_reading(total(one.reading for one in some))
        if together.disturbed:
            return replace(together, reason=f"all {words} together: {together.reason}")
    known = any(one.disturbed is not None for some in kinds.values() for one in some)
    return Verdict(disturbed=False) if known else UNKNOWN


def number(passes: Sequence[Pass]) -> int | None:
    """Timed passes that were disturbed, whether they count or not; null where none is known."""
    told = [one.disturbed for one in passes if one.kind == "timed" and one.disturbed is not None]
    return sum(told) if told else None


def waited_s(reading: Reading) -> float | None:
    """Time that the engine's threads waited for a core and that others can have caused; null
    where it is not told."""
    if reading.run_delay_s is None:
        return None
    bounds = [reading.run_delay_s]
    if reading.own_cpu_s is not None and reading.cores is not None:
        bounds.append(max(0.0, reading.cores * reading.wall_s - reading.own_cpu_s))
    if reading.others_cpu_s is not None:
        wait_for_each_other = (reading.computing_threads or 0) > (reading.cores or 0)
        coarse = 0.0 if wait_for_each_other else COARSE_S
        bounds.append(reading.others_cpu_s + (reading.steal_s or 0.0) + coarse)
    return min(bounds)


def _tells(reading: Reading) -> bool:
    """Whether anything is read that a verdict could follow from."""
    told = (reading.run_delay_s, reading.others_cpu_s, reading.steal_s)
    gpu = reading.gpu
    of_gpu = () if gpu is None else (gpu.throttle_reasons, gpu.throttled_s, gpu.other_processes)
    return any(one is not None for one in (*told, *of_gpu))


def _sign(amount_s: float, whole_s: float, share: float, least_s: float, words: str) -> _Sign:
    """`words` has a place for the share."""
    found = amount_s / whole_s if whole_s > 0 else 0.0
    return _Sign(
        weight=min(found / share, amount_s / least_s),
        reason=words.format(f"{min(found, 1.0):.0%}"),  # threads that wait together add up
    )


def _of_cores(reading: Reading) -> Iterator[_Sign]:
    wall = reading.wall_s
    if (waited := waited_s(reading)) is not None:
        words = "its threads waited for a core behind others for {} of the time"
        yield _sign(waited, wall, WAITED, LEAST_WAITED_S, words)
    if reading.steal_s is not None and reading.cores:
        words = "the hypervisor took {} of its cores' time"
        yield _sign(reading.steal_s, reading.cores * wall, STOLEN, LEAST_STOLEN_S, words)
    if reading.gpu is None and reading.others_cpu_s is not None and reading.machine_cores:
        others = reading.others_cpu_s + (reading.elsewhere_cpu_s or 0.0)
        words = "other programs had {} of the machine's cores"
        yield _sign(others, reading.machine_cores * wall, OTHERS, LEAST_OTHERS_S, words)


def _of_gpu(reading: Reading) -> Iterator[_Sign]:
    gpu: GpuReading | None = reading.gpu
    if gpu is None:
        return
    if held := sorted(HOLDING_DOWN.intersection(gpu.throttle_reasons or ())):
        yield _Sign(weight=2.0, reason=f"GPU clocks are held down: {', '.join(held)}")
    if gpu.throttled_s is not None:
        words = "heat held GPU clocks down for {} of the time"
        yield _sign(gpu.throttled_s, reading.wall_s, THROTTLED, LEAST_THROTTLED_S, words)
    if count := gpu.other_processes:
        size = gpu.other_memory_bytes
        many = f"{count} other process{'es' if count > 1 else ''} on the GPU"
        yield _Sign(weight=2.0, reason=many + (f" with {size / 2**30:.1f} GiB" if size else ""))


def _usual(passes: Sequence[Pass], kind: PassKind) -> float | None:
    """Median time of a trial's passes of a kind; null where that says nothing of any of them:
    they are few, or drafts make each as long as it gets lucky."""
    found = [one for one in passes if one.kind == kind]
    if len(found) < FEWEST or any(one.drafted is not None for one in found):
        return None
    return statistics.median(one.e2e_s for one in found)


def _against(one: Pass, usual: float | None) -> Verdict:
    """The verdict on a pass beside others that took `usual` seconds."""
    own = of_reading(one.reading)
    if usual is None or own.disturbed is not False:
        return own
    slower = _Sign(
        weight=min(one.e2e_s / usual / SLOWER, (one.e2e_s - usual) / LEAST_SLOWER_S),
        reason=f"took {one.e2e_s / usual:.2f} times the median of its trial's passes",
    )
    if slower.weight <= 1:
        return own
    return Verdict(disturbed=True, reason=slower.reason, weight=slower.weight)
