"""Where names of points go so that none covers another.

A name stands beside its point if there is room, else a little further off with a thin line
to it. Points are served in order of how crowded they are, each takes the best place left.
Pixels throughout, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LETTER, _LINE = 5.7, 12.0
"""Width of a letter and height of a line at 10.5 pixels, sans-serif."""
_GAP = 7
"""From a point to its name."""
_RINGS = (0, 12, 24, 38, 54, 72, 92)
"""How much further off a name may stand."""
_DIRECTIONS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A rectangle by its middle."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        across = (self.width + other.width) / 2 - abs(self.x - other.x)
        down = (self.height + other.height) / 2 - abs(self.y - other.y)
        return max(0.0, across) * max(0.0, down)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Middle of a name, and whether it stands so far off that a line should lead to it."""

    x: float
    y: float
    far: bool


def place(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    *,
    width: float,
    height: float,
    lines: Sequence[float] = (),
) -> list[Place]:
    """A place for each name inside a panel of that size, off other names, points and `lines`.

    Args:
        lines: y of horizontal lines, which are better not crossed.
    """
    dots = [Box(x=x, y=y, width=10, height=10) for x, y in points]
    rules = [Box(x=width / 2, y=y, width=width, height=1.5) for y in lines]
    near = [sum(math.dist(one, other) < 60 for other in points) for one in points]
    taken: dict[int, Box] = {}
    far: dict[int, bool] = {}
    for index in sorted(range(len(points)), key=lambda one: (-near[one], points[one])):
        size = len(names[index]) * _LETTER, _LINE
        others = [*taken.values(), *dots[:index], *dots[index + 1 :]]
        best = math.inf
        for ring in _RINGS:
            for turn in range(_DIRECTIONS):
                box = _beside(points[index], size, ring, turn)
                cost = (
                    40 * sum(box.overlap(other) for other in others)
                    + 8 * sum(box.overlap(rule) for rule in rules)
                    + 400 * _outside(box, width, height)
                    + 3 * ring
                    + (turn % (_DIRECTIONS // 2) != 0)
                )
                if cost < best:
                    best, taken[index], far[index] = cost, box, ring > 0
    return [Place(x=taken[i].x, y=taken[i].y, far=far[i]) for i in range(len(points))]


def apart(places: Sequence[float], least: float) -> list[float]:
    """Coordinates moved as little as needed to stand `least` apart, in the same order."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1:
            above, below = groups[-2], groups[-1]
            if _middle(above, places) + _half(above, least) <= (
                _middle(below, places) - _half(below, least)
            ):
                break
            groups[-2:] = [above + below]
    moved = list(places)
    for group in groups:
        top = _middle(group, places) - (len(group) - 1) * least / 2
        for rank, index in enumerate(group):
            moved[index] = top + rank * least
    return moved


def _beside(point: tuple[float, float], size: tuple[float, float], ring: float, turn: int) -> Box:
    """Name of that size in direction `turn` (0 is right), its edge `ring` beyond the gap."""
    angle = 2 * math.pi * turn / _DIRECTIONS
    across, down = math.cos(angle), math.sin(angle)
    reach = _GAP + ring
    return Box(
        x=point[0] + across * (reach + size[0] / 2),
        y=point[1] + down * (reach + size[1] / 2),
        width=size[0],
        height=size[1],
    )


def _outside(box: Box, width: float, height: float) -> float:
    """Pixels by which a box leaves the panel."""
    across = max(0.0, box.width / 2 - box.x) + max(0.0, box.x + box.width / 2 - width)
    return across + max(0.0, box.height / 2 - box.y) + max(0.0, box.y + box.height / 2 - height)


def _middle(group: Sequence[int], places: Sequence[float]) -> float:
    return sum(places[index] for index in group) / len(group)


def _half(group: Sequence[int], least: float) -> float:
    return len(group) * least / 2
