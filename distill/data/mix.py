"""Two images in one: part of the view, so that what a row is mixed with is a function of (seed, row, view) too.

The row itself always has the larger share, so that its label stays the batch's: Beta(α, α) is symmetric, and the
papers' pairs are too.
"""

from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

from distill.errors import UsageError
from distill.schema.ranges import Positive


@dataclass(frozen=True)
class Mixup:
    """λ x + (1 - λ) x', λ ~ Beta(α, α) (Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018)."""

    alpha: Positive = 0.2
    count = 1

    def __post_init__(self):
        _check(self)

    def mix(self, images: Tensor, partners: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """images, partners (N, C, H, W) float, uniforms (N, 1): mixed images (N, C, H, W) and share λ (N,)."""
        share = _share(self.alpha, uniforms[:, 0])
        weights = share[:, None, None, None]
        return images * weights + partners * (1 - weights), share


@dataclass(frozen=True)
class CutMix:
    """A box of the partner's, 1 - λ of the area, λ ~ Beta(α, α), about a point anywhere (Yun et al., ICCV 2019).

    As in the paper's code, what is outside of the image is cut off, and the share is that of the pixels left.
    """

    alpha: Positive = 1.0
    count = 3

    def __post_init__(self):
        _check(self)

    def mix(self, images: Tensor, partners: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """images, partners (N, C, H, W) float, uniforms (N, 3): mixed images (N, C, H, W) and share (N,)."""
        extent = (1 - _share(self.alpha, uniforms[:, 0])).sqrt()
        inside = []
        for axis, side in enumerate(images.shape[2:]):
            half = (extent * side).long()[:, None] // 2
            center = (uniforms[:, 1 + axis, None] * side).long()
            place = torch.arange(side, device=images.device)
            inside.append((place >= center - half) & (place < center + half))  # (N, H) and (N, W)
        box = inside[0][:, :, None] & inside[1][:, None]
        return torch.where(box[:, None], partners, images), 1 - box.float().mean((1, 2))


def _check(mix: Mixup | CutMix) -> None:
    if mix.alpha <= 0:
        raise UsageError(f"{type(mix).__name__}: alpha must be above 0, not {mix.alpha}")


def _share(alpha: float, uniforms: Tensor) -> Tensor:
    """(N,) uniforms → (N,) of max(λ, 1 - λ), λ ~ Beta(α, α): the inverse of its distribution function."""
    portion = torch.from_numpy(betaincinv(alpha, alpha, uniforms.cpu().double().numpy())).to(uniforms)
    return portion.maximum(1 - portion)
