"""What losses on relations between the images of a batch share."""

import torch
from torch import Tensor

from distill.errors import UserError


def vectors(loss: str, features: Tensor) -> Tensor:
    """Features of any kind as vectors (N, D).

    Raises:
        UserError: a batch of 1, which has no relations.
    """
    if len(features) < 2:
        raise UserError(
            f"loss {loss} relates the images of a batch to each other and needs at least 2 of them; "
            f"this batch has {len(features)}: raise data.batch_size"
        )
    return features.flatten(1)


def unit(values: Tensor, dim: int | tuple[int, int] = 1) -> Tensor:
    """Divided by the Euclidean norm along `dim`; zeros stay zeros, with a gradient that does not explode."""
    norms = values.norm(dim=dim, keepdim=True)
    return values / norms.masked_fill(norms < 1e-12, 1.0)


FLAT = 1e-6  # of a row's deviations from its mean, their norm: below it a gradient would be 1e6 times rounding


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two (N, K): (N,); 0, without a gradient, where one is flat but for
    rounding."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    a, b = (torch.where(x.norm(dim=1, keepdim=True) > FLAT, x, 0.0) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
