"""Overhaul of features (OFD): Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, §3.

    L = Σ_i 2^-(n-1-i) · 1/N Σ [ s ≤ t' ≤ 0 ? 0 : (s - t')² ],   t' = max(t, m),   m_c = E[t_c | t_c < 0]

t and s are the maps before the activation, s through a learned 1×1 convolution with batch norm. The margin m of
a channel comes from its batch norm (mean β_c, deviation |γ_c|); where almost nothing is below zero it is -3 |γ_c|.
Sums over channels and space, mean over the batch, weight 1/1000 on CIFAR-100 and 1/10000 on ImageNet as in the
released code; unlike there, the teacher is in eval mode. A stage's margin is that of the last normalisation inside
of it, so networks that normalise at the entry of the next stage (WRN) get the margin of a nearby layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.losses.stages import StageLoss, conv_norm, doubling
from distill.schema.ranges import TapPairs


def margin(weight: Tensor, bias: Tensor) -> Tensor:
    """(C,), below zero: the mean of what is negative under a normal distribution of mean `bias`, deviation |weight|."""
    deviation = weight.abs().clamp_min(1e-8)
    ratio = bias / deviation
    below = torch.special.ndtr(-ratio)  # share of the distribution that is negative
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return torch.where(below > 0.001, bias - deviation * density / below.clamp_min(0.001), -3 * deviation)


def partial_l2(student: Tensor, teacher: Tensor, margins: Tensor) -> Tensor:
    """Scalar from maps (N, C, H, W) and margins (C,): squared differences, but where both are below zero and the
    student is lower; summed, over N."""
    target = torch.maximum(teacher, margins.view(1, -1, 1, 1))
    counts = (student > target) | (target > 0)
    return ((student - target).pow(2) * counts).sum() / len(student)


def ofd(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """Scalar: `partial_l2` of each stage, each stage half as heavy as the next."""
    return doubling([partial_l2(*stage) for stage in zip(student_maps, teacher_maps, margins, strict=True)])


class OFD(StageLoss):
    """`ofd` of the student's connected maps.

    Args:
        taps: stages, or {student tap: teacher tap}; they are read before the activation.

    Raises:
        UserError: a teacher's stage has no batch norm of as many channels as its maps.
    """

    def __init__(self, taps: TapPairs):
        super().__init__(taps, student_part=":pre", teacher_part=":pre")
        stages = [tap.partition(":")[0] for tap in self.teacher_taps]
        self.norms = [(f"{stage}:norm.weight", f"{stage}:norm.bias") for stage in stages]
        self.teacher_taps = (*self.teacher_taps, *(tap for pair in self.norms for tap in pair))

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        pairs = self.maps(student, teacher)
        for (weight, _), (_, tap), (_, target) in zip(self.norms, self.pairs, pairs, strict=True):
            if teacher.features[weight].shape != target.shape[1:2]:
                raise UserError(
                    f"loss ofd needs a batch norm of {target.shape[1]} channels at the end of the teacher's stage; "
                    f"'{weight}' has shape {tuple(teacher.features[weight].shape)} beside '{tap}': "
                    "choose other stages (loss.ofd.taps)"
                )
        self.connect = nn.ModuleList(conv_norm(s.shape[1], t.shape[1]) for s, t in pairs)

    def forward(self, student, teacher, batch) -> Tensor:
        sources, targets = zip(*self.maps(student, teacher), strict=True)
        margins = [margin(teacher.features[weight], teacher.features[bias]) for weight, bias in self.norms]
        return ofd([connect(maps) for connect, maps in zip(self.connect, sources, strict=True)], targets, margins)
