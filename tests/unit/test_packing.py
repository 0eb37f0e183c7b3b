"""The verdict on engines side by side, from given times."""

from __future__ import annotations

from random import Random

from workers.packing import LEAST_TURNS, MOST_TURNS, compare


def _verdict(factor: float, noise: float, engines: int = 4) -> tuple[bool, int, float]:
    """Times of passes that take `factor` as long side by side, with noise and drift."""
    chance = Random(1)
    drift = [1.0]
    asked: list[int] = []

    def one() -> float:
        drift[0] *= 1.0001
        return drift[0] * (1 + chance.uniform(-noise, noise))

    def alone(number: int) -> list[float]:
        asked.append(number)
        return [one() for _ in range(5)]

    def together() -> list[list[float]]:
        return [[factor * one() for _ in range(5)] for _ in range(engines)]

    found = compare(engines, alone, together, "t")
    assert asked == [turn % engines for turn in range(found.turns)]  # each its turn
    assert found.ratio is not None and found.ratio_low is not None and found.ratio_high is not None
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert str(f"{found.ratio:.3f}") in found.told()
    return found.unchanged, found.turns, found.ratio


def test_engines_that_do_not_notice_each_other_may_run_side_by_side() -> None:
    unchanged, turns, ratio = _verdict(1.0, 0.005)
    assert unchanged and turns == LEAST_TURNS and abs(ratio - 1) < 0.01


def test_a_clear_change_is_seen_at_once_in_either_direction() -> None:
    for factor in (1.3, 0.8):
        unchanged, turns, ratio = _verdict(factor, 0.02)
        assert not unchanged and turns == LEAST_TURNS and abs(ratio / factor - 1) < 0.05


def test_what_cannot_be_told_within_the_turns_stays_exclusive() -> None:
    unchanged, turns, _ = _verdict(1.0, 0.3)
    assert not unchanged and turns == MOST_TURNS


def test_three_percent_more_is_a_change() -> None:
    assert not _verdict(1.03, 0.002)[0]
    assert _verdict(1.01, 0.002)[0]
