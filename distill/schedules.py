"""Numbers that change while training: the learning rate's factor, a loss's weight."""

import itertools
import math
from collections.abc import Sequence

from distill.errors import UsageError


def cosine(epoch: float, epochs: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Factor of the learning rate: linear from 0 to 1 over `warmup` epochs, then half a cosine down to `floor`
    at `epochs` (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if epoch < warmup:
        return epoch / warmup
    progress = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-9))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def multistep(
    epoch: float, epochs: float, milestones: Sequence[float] = (), gamma: float = 0.1, warmup: float = 0.0
) -> float:
    """Factor of the learning rate: `gamma` once for every milestone (an epoch) that is passed."""
    factor = gamma ** sum(epoch >= milestone for milestone in milestones)
    return factor * min(1.0, epoch / warmup) if warmup else factor


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
