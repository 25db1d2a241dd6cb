"""ResNets for small images: three stages of basic blocks at full, half and quarter resolution.

Source: He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385), section 4.2. The
wider variants "8x4" and "32x4" are those of the CRD benchmark: Tian et al., 2020 (arXiv:1910.10699).
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError
from distill.schema.ranges import Count, ResNetDepth, Widths


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))); "relu2:in" is the tap before the activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()  # never in place: taps would see the overwritten tensor
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class ResNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, K); see `resnet`."""

    def __init__(self, blocks: int, num_classes: int, widths: Sequence[int], stem: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        in_channels = [stem, *widths[:2]]
        self.layer1 = _stage(blocks, in_channels[0], widths[0], 1, shortcut)
        self.layer2 = _stage(blocks, in_channels[1], widths[1], 2, shortcut)
        self.layer3 = _stage(blocks, in_channels[2], widths[2], 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # (N, stem, H, W)
        x = self.layer1(x)  # (N, widths[0], H, W)
        x = self.layer2(x)  # (N, widths[1], H/2, W/2)
        x = self.layer3(x)  # (N, widths[2], H/4, W/4)
        return self.linear(self.pool(x).flatten(1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))


def resnet(
    depth: ResNetDepth,
    num_classes: Count,
    widths: Widths = (16, 32, 64),
    stem: Count = 16,
    shortcut: Literal["A", "B"] = "A",
) -> ResNet:
    """ResNet of `depth` = 6n + 2 layers: (N, 3, H, W) to (N, num_classes).

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110 …
        num_classes: K, the number of logits.
        widths: channels of the three stages.
        stem: channels of the first convolution.
        shortcut: where a block changes shape, "A" (zero padding, no parameters) or "B" (1×1 convolution).

    Raises:
        UserError: a depth that is not 6n + 2, not three widths, another shortcut, or option A where a stage
            is narrower than the one before.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, 32, 44, 56, 110 …), not {depth}")
    if len(widths) != 3:
        raise UserError(f"a CIFAR ResNet has three stages, so widths is three numbers, not {list(widths)}")
    if shortcut not in ("A", "B"):
        raise UserError(f"shortcut is A (zero padding) or B (1×1 convolution), not {shortcut!r}")
    if shortcut == "A" and [stem, *widths] != sorted([stem, *widths]):
        raise UserError(
            f"option A shortcuts cannot narrow a map: stem {stem} and widths {list(widths)} must not fall; "
            f"use shortcut=B"
        )
    return ResNet((depth - 2) // 6, num_classes, widths, stem, shortcut)
