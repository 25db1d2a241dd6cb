"""Numbers that change while training: the learning rate's factor, a loss's weight."""

import math
from collections.abc import Callable, Sequence

from distill.schema.ranges import NotNegative, Share, UpToOne


def cosine(epoch: float, epochs: float, warmup: NotNegative = 0.0, floor: Share = 0.0) -> float:
    """Factor of the learning rate: linear from 0 to 1 over `warmup` epochs, then half a cosine down to `floor`
    at `epochs` (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if epoch < warmup:
        return epoch / warmup
    progress = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-9))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def multistep(
    epoch: float, epochs: float, milestones: Sequence[NotNegative] = (), gamma: UpToOne = 0.1, warmup: NotNegative = 0.0
) -> float:
    """Factor of the learning rate: `gamma` once for every milestone (an epoch) that is passed."""
    factor = gamma ** sum(epoch >= milestone for milestone in milestones)
    return factor * min(1.0, epoch / warmup) if warmup else factor


def squeezed(epoch: float, epochs: float, schedule: Callable[[float, float], float], full: float) -> float:
    """`schedule` of a training of `full` epochs, gone through in `epochs`."""
    return schedule(epoch * full / epochs, full)
