"""What flows through the toolkit: a batch of images in, a network's outputs out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """N images with their labels and where they come from."""

    images: Tensor  # (N, C, H, W) float in [0, 1]
    labels: Tensor  # (N,) int64 in [0, K); of a mixed image: that of its larger part
    index: Tensor  # (N,) int64, row in the training set; -1: not a row of it
    view: Tensor  # (N,) int64, which repeatable augmentation of that row this is
    partner: Tensor | None = None  # (N,) int64 in [0, K), label of what a mixed image was mixed with; None: not mixed
    share: Tensor | None = None  # (N,) float in [0.5, 1], of its own label


class Outputs(NamedTuple):
    """What a network answers to N images."""

    logits: Tensor  # (N, K)
    features: dict[str, Tensor]  # by tap name: maps (N, C, H, W), tokens (N, T, D) or vectors (N, D)

    def float(self) -> "Outputs":
        """The same in float32, float64 apart: losses are computed outside of autocast."""
        whole = (lambda value: value) if self.logits.dtype == torch.float64 else (lambda value: value.float())
        return Outputs(whole(self.logits), {name: whole(value) for name, value in self.features.items()})

    def detach(self) -> "Outputs":
        return Outputs(self.logits.detach(), {name: value.detach() for name, value in self.features.items()})
