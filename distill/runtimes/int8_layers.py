"""Layers that store their weights in int8 and compute in float."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q and s of a weight (O, …): int8 of the same shape, and (O, 1, …) float."""
    scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a channel of zeros; NaN stays NaN
    return (weight / scale).round().to(torch.int8), scale


def _store(module: nn.Module, layer: nn.Conv2d | nn.Linear) -> None:
    """The layer's weight, rounded, its scale and its bias as buffers of `module`."""
    weight, scale = rounded(layer.weight.detach())
    module.register_buffer("weight", weight)
    module.register_buffer("scale", scale)
    module.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())


class Int8Conv2d(nn.Module):
    """A zero-padded Conv2d whose weight is an int8 buffer (O, I/groups, kh, kw) and a scale (O, 1, 1, 1)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        _store(self, conv)
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def dequantized(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.dequantized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Int8Linear(nn.Module):
    """A Linear whose weight is an int8 buffer (O, I) and a scale (O, 1)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        _store(self, linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)
