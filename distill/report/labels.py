"""Where the names of points go, so that none lies on another, on a point, or outside of the plot."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """In pixels; y points down."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: "Box") -> bool:
        within = other.left <= self.left and self.right <= other.right
        return within and other.top <= self.top and self.bottom <= other.bottom


NEAREST, STEP, RINGS, DIRECTIONS = 4, 9, 16, 16  # px, px, how many, how many


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], bounds: Box, radius: float
) -> list[Box | None]:
    """A box for each point's label: the nearest place around it that is free, of what was placed before too. One whose
    line to its point crosses no other label is taken first.

    Args:
        points: (x, y) in px, each a mark of this `radius`.
        sizes: (width, height) of the labels.
        bounds: within which all boxes lie.

    Returns:
        One box a point; None where no place was free: the legend names it.
    """
    marks = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    placed: list[Box | None] = []
    leaders: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for point, size in zip(points, sizes, strict=True):
        others = [box for box in placed if box is not None]
        free = [
            box
            for box in _around(point, size, radius)
            if box.inside(bounds) and not any(box.overlaps(other) for other in [*marks, *others])
        ]
        clear = (
            box
            for box in free
            if not any(_crosses(point, nearest(point, box), other) for other in others)
            and not any(_crosses(*leader, box) for leader in leaders)
        )
        box = next(clear, free[0] if free else None)
        placed.append(box)
        if box is not None:
            leaders.append((point, nearest(point, box)))
    return placed


def nearest(point: tuple[float, float], box: Box) -> tuple[float, float]:
    """Where the line from a point to its label ends."""
    return min(max(point[0], box.left), box.right), min(max(point[1], box.top), box.bottom)


def _crosses(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    """Whether a short line runs through a box."""
    steps = max(2, round(math.dist(start, end) / 3))
    places = (step / steps for step in range(steps + 1))
    spots = ((start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])) for part in places)
    return any(box.left < x < box.right and box.top < y < box.bottom for x, y in spots)


def _around(point: tuple[float, float], size: tuple[float, float], radius: float):
    """Boxes of this size around a point, the nearest first: to the right, to the left, above, below, between."""
    (x, y), (width, height) = point, size
    turns = sorted(range(DIRECTIONS), key=lambda turn: (turn % (DIRECTIONS // 2) != 0, turn % (DIRECTIONS // 4) != 0))
    for ring in range(RINGS):
        distance = radius + NEAREST + ring * STEP
        for turn in turns:
            across, down = math.cos(2 * math.pi * turn / DIRECTIONS), -math.sin(2 * math.pi * turn / DIRECTIONS)
            middle = x + across * (distance + width / 2), y + down * (distance + height / 2)
            yield Box(middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2)


def shortened(name: str, most: int) -> str:
    """A name of at most so many signs, its middle left out."""
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[: most - 1 - half]}…{name[-half:]}"
