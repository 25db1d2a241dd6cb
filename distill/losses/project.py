"""Bringing two features to one shape: channels, space, tokens ↔ maps."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


def as_map(features: Tensor) -> Tensor:
    """Maps (N, C, H, W) as they are; tokens (N, T, D) as (N, D, √T, √T), leading extra tokens (class token)
    left out; vectors (N, D) as (N, D, 1, 1)."""
    if features.dim() == 4:
        return features
    if features.dim() == 2:
        return features[:, :, None, None]
    side = math.isqrt(features.shape[1])
    patches = features[:, features.shape[1] - side * side :]
    return patches.transpose(1, 2).unflatten(2, (side, side))


def to_same_space(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (N, C, H, W) at the smaller height and width of the two, by average pooling."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pool(a, size), _pool(b, size)


def _pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)


class Projector(nn.Module):
    """A learned 1×1 convolution from one feature's channels to another's, at the smaller space of the two.

    Args:
        source, target: one dry run's features, of any kinds that `as_map` takes.
        bias: FitNet's regressor has one.
    """

    def __init__(self, source: Tensor, target: Tensor, bias: bool = True):
        super().__init__()
        self.convolution = nn.Conv2d(as_map(source).shape[1], as_map(target).shape[1], 1, bias=bias)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both as maps of one shape (N, C_target, H, W): `source` projected, `target` pooled where it is larger."""
        source, target = to_same_space(as_map(source), as_map(target))
        return self.convolution(source), target
