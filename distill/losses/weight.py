"""A loss's weight over the epochs."""

import itertools
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
    """Raises UsageError unless `weight` is a number or a list of [epoch, value] with epochs that do not fall."""
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return
    points = weight if isinstance(weight, list) else []
    numbers = all(isinstance(point, list) and len(point) == 2 for point in points) and all(
        isinstance(value, (int, float)) for point in points for value in point
    )
    if not points or not numbers or any(a[0] > b[0] for a, b in itertools.pairwise(points)):
        raise UsageError(
            f"loss.{name}.weight={weight}: expected a number or [[epoch, value], …] in rising epochs, "
            f"e.g. loss.{name}.weight=[[0,0],[5,1]]"
        )
