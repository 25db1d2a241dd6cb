"""A loss's weight over the epochs."""

import itertools
import math
from collections.abc import Sequence

from distill.errors import UsageError


def weight_at(weight: float | Sequence[Sequence[float]], epoch: float) -> float:
    """A loss's weight: a number, or [[epoch, value], …], linear between the points and constant outside of them.
    Two points at one epoch make a jump."""
    if isinstance(weight, (int, float)):
        return float(weight)
    before = weight[0]
    for after in weight:
        if epoch < after[0]:
            if after[0] == before[0]:
                return float(before[1])
            share = max(0.0, (epoch - before[0]) / (after[0] - before[0]))
            return before[1] + share * (after[1] - before[1])
        before = after
    return float(before[1])


def check_weight(name: str, weight) -> None:
    """Raises UsageError unless `weight` is a finite number of at least 0, or a list of [epoch, value] of such numbers
    whose epochs do not fall."""
    if _weighs(weight):
        return
    points = weight if isinstance(weight, list) else []
    numbers = all(isinstance(point, list) and len(point) == 2 and all(map(_weighs, point)) for point in points)
    if not points or not numbers or any(a[0] > b[0] for a, b in itertools.pairwise(points)):
        raise UsageError(
            f"loss.{name}.weight={weight}: expected a number of at least 0 or [[epoch, value], …] of such numbers in "
            f"rising epochs, e.g. loss.{name}.weight=[[0,0],[5,1]]"
        )


def _weighs(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
