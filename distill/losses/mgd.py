"""Masked generation: Yang et al., "Masked Generative Distillation", ECCV 2022, §3.

    L = 1/N Σ (G(align(s) · M) - t)²,   G = conv3×3, ReLU, conv3×3;   M_{n,c} = 0 with probability λ, else 1

The student's masked map has to generate the teacher's whole one. For classification the released code masks whole
channels (the paper's text: pixels), λ = 0.15, and sums over channels and space with weight 7e-5, on the last stage:
its ImageNet setting, the default here. On CIFAR-100 the authors' configuration has weight 0.0012 and the same λ, for
ResNet-34 → 18, whose last maps are of 512 channels and 4×4 pixels: the sum grows with both. The 1×1 convolution `align`
is there where the channels differ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.losses.stages import StageLoss, align
from distill.schema.ranges import BelowOne, TapPairs


def mgd(generated: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Scalar from two lists of maps of one shape (N, C, H, W): squared differences, summed, over N."""
    pairs = zip(generated, teacher_maps, strict=True)
    return sum((student - teacher).pow(2).sum() / len(teacher) for student, teacher in pairs)


class Generator(nn.Module):
    """Maps (N, C_student, H, W), masked by channel, to the teacher's (N, C_teacher, H, W)."""

    def __init__(self, source: Tensor, target: Tensor, masked: float):
        super().__init__()
        channels = target.shape[1]
        self.masked, self.align = masked, align(source, target)
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.generate = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.align(maps)
        mask = torch.rand(*maps.shape[:2], 1, 1, device=maps.device) >= self.masked
        return self.generate(maps * mask)


class MGD(StageLoss):
    """`mgd` of the student's maps, masked, through a learned generator.

    Args:
        taps: stages, or {student tap: teacher tap}.
        masked: λ in [0, 1), the share of channels that are hidden, drawn anew for every image and step.
    """

    def __init__(self, taps: TapPairs, masked: BelowOne = 0.15):
        super().__init__(taps)
        self.masked = masked

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        pairs = self.maps(student, teacher)
        self.generators = nn.ModuleList(Generator(source, target, self.masked) for source, target in pairs)

    def forward(self, student, teacher, batch) -> Tensor:
        sources, targets = zip(*self.maps(student, teacher), strict=True)
        return mgd([generate(maps) for generate, maps in zip(self.generators, sources, strict=True)], targets)
