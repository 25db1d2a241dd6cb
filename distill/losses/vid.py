"""Variational information: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, §2.1.

    L = Σ_stages mean_{n,c,h,w} ½ [ (t - μ(s))² / σ_c² + log σ_c² ],   σ_c² = softplus(α_c) + ε

A lower bound of the mutual information of teacher and student: μ is a regressor of three 1×1 convolutions and
σ_c a deviation for each of the teacher's channels; both are learned with the student. As in the released code
the mean stands for the paper's sum; weight 1 is that of Tian et al., ICLR 2020, who use the same mean.
"""

import math
from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.stages import StageLoss
from distill.schema.ranges import TapPairs

FLOOR = 1e-5  # ε


def vid(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Scalar from maps (N, C, H, W) and the variances (C,); least at variance = mean squared error per channel."""
    variance = variance.view(1, -1, 1, 1)
    return 0.5 * ((target - mean).pow(2) / variance + variance.log()).mean()


class Gaussian(nn.Module):
    """Maps (N, C_source, H, W) to the mean (N, C_target, H, W) and the variances (C_target,) of the target."""

    def __init__(self, channels: int, target_channels: int, variance: float):
        super().__init__()
        widths = [channels, *[target_channels] * 3]
        layers = [nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(widths)]
        self.mean = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.scale = nn.Parameter(torch.full((target_channels,), math.log(math.expm1(variance - FLOOR))))  # α

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(maps), F.softplus(self.scale) + FLOOR


class VID(StageLoss):
    """`vid` summed over pairs of stages.

    Args:
        taps: stages, or {student tap: teacher tap}; vectors count as maps of one pixel.
        variance: what σ² begins with (5 in the released code).
    """

    takes_vectors = True

    def __init__(self, taps: TapPairs, variance: Annotated[float, Gt(1e-5)] = 5.0):
        super().__init__(taps)
        self.variance = variance

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        pairs = self.maps(student, teacher)
        self.gaussians = nn.ModuleList(Gaussian(s.shape[1], t.shape[1], self.variance) for s, t in pairs)

    def forward(self, student, teacher, batch) -> Tensor:
        total = student.logits.new_zeros(())
        for gaussian, (source, target) in zip(self.gaussians, self.maps(student, teacher), strict=True):
            mean, variance = gaussian(source)
            total = total + vid(mean, target, variance)
        return total
