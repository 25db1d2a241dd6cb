"""A loss's weight over the epochs."""

import itertools
import math
from collections.abc import Sequence

from distill.errors import UsageError


def weight_at(weight: float | Sequence[Sequence], epoch: float) -> float:
    """A loss's weight: a number, or points [[epoch, value], …], linear between them and constant outside of them.
    Two points at one epoch make a jump; to a point [epoch, value, "cosine"] it goes by half a cosine."""
    if isinstance(weight, (int, float)):
        return float(weight)
    before = weight[0]
    for after in weight:
        if epoch < after[0]:
            if after[0] == before[0]:
                return float(before[1])
            share = max(0.0, (epoch - before[0]) / (after[0] - before[0]))
            if after[2:]:
                share = 0.5 * (1 - math.cos(math.pi * share))
            return before[1] + share * (after[1] - before[1])
        before = after
    return float(before[1])


def check_weight(name: str, weight, option: str = "weight") -> None:
    """Raises UsageError unless `weight` is a finite number of at least 0, or a list of [epoch, value] or
    [epoch, value, "cosine"] of such numbers whose epochs do not fall."""
    if _weighs(weight):
        return
    points = weight if isinstance(weight, list) else []
    if not points or not all(map(_is_point, points)) or any(a[0] > b[0] for a, b in itertools.pairwise(points)):
        raise UsageError(
            f"loss.{name}.{option}={weight}: expected a number of at least 0 or [[epoch, value], …] of such numbers in "
            f"rising epochs, e.g. loss.{name}.{option}=[[0,0],[5,1]]"
        )


def _weighs(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_point(point) -> bool:
    return (
        isinstance(point, list) and len(point) >= 2 and all(map(_weighs, point[:2])) and point[2:] in ([], ["cosine"])
    )
