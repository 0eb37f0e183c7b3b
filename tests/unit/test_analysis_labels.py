"""Names of points and lines that must not cover each other."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.figures.labels import Box, apart, place
from analysis.figures.logarithm import Log


def boxes(points: list[tuple[float, float]], names: list[str]) -> list[Box]:
    places = place(points, names, width=400, height=300)
    return [
        Box(x=one.x, y=one.y, width=5.7 * len(name), height=12)
        for one, name in zip(places, names, strict=True)
    ]


def test_a_lonely_name_stands_right_beside_its_point() -> None:
    (one,) = place([(100, 100)], ["h100"], width=400, height=300)
    assert not one.far
    assert (one.x, one.y) == (pytest.approx(107 + 4 * 5.7 / 2), 100)


def test_at_the_edge_a_name_stays_inside() -> None:
    (one,) = boxes([(395, 150)], ["dgx-h100"])
    assert one.x + one.width / 2 <= 400


def test_points_in_a_heap_have_names_apart_from_each_other_and_from_the_points() -> None:
    points = [(200.0 + 6 * n, 150.0 + 5 * (n % 3)) for n in range(9)]
    found = boxes(points, [f"device-{n}" for n in range(9)])
    assert all(one.overlap(other) == 0 for one, other in combinations(found, 2))
    dots = [Box(x=x, y=y, width=9, height=9) for x, y in points]
    assert all(one.overlap(dot) == 0 for one in found for dot in dots)


def test_a_name_gives_way_to_a_line() -> None:
    (one,) = place([(100, 100)], ["h100"], width=400, height=300, lines=[100])
    assert abs(one.y - 100) > 6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 500), max_size=12))
def test_names_of_lines_are_moved_apart_in_order(places: list[float]) -> None:
    moved = apart(places, 14)
    order = sorted(range(len(places)), key=lambda index: places[index])
    gaps = [moved[b] - moved[a] for a, b in pairwise(order)]
    assert all(gap >= 14 - 1e-6 for gap in gaps)
    if all(places[b] - places[a] >= 14 for a, b in pairwise(order)):
        assert moved == pytest.approx(places)


def test_a_logarithmic_axis_goes_both_ways() -> None:
    axis = Log(low=10, high=1000, pixels=200)
    assert axis.pixel(100) == pytest.approx(100)
    assert axis.value(axis.pixel(37)) == pytest.approx(37)
    assert axis.ticks() == [10, 20, 50, 100, 200, 500, 1000]
