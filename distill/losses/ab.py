"""Activation boundaries: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
Neurons", AAAI 2019, §3.

    L = Σ_i 2^-(n-1-i) · 1/N Σ [ t > 0 ? max(0, μ - s)² : max(0, s + μ)² ]

t and s are the maps before the activation, s through a learned 1×1 convolution with batch norm: a hinge that asks
for the sign of the teacher's neuron, whatever its size. Sums over channels and space, mean over the batch; the
weight 3/1000 is the released code's factor. The paper trains this alone first and the labels after it: a schedule
that drops to zero does the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.stages import StageLoss, conv_norm, doubling
from distill.schema.ranges import NotNegative, TapPairs


def ab(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], margin: float) -> Tensor:
    """Scalar from two lists of maps of one shape (N, C, H, W); zero where every neuron is on the teacher's side of
    its boundary by at least `margin`."""
    terms = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        sign = torch.where(teacher > 0, 1.0, -1.0)
        terms.append(F.relu(margin - sign * student).pow(2).sum() / len(student))
    return doubling(terms)


class AB(StageLoss):
    """`ab` of the student's connected maps.

    Args:
        taps: stages, or {student tap: teacher tap}; they are read before the activation.
        margin: μ, at least 0.
    """

    def __init__(self, taps: TapPairs, margin: NotNegative = 1.0):
        super().__init__(taps, student_part=":pre", teacher_part=":pre")
        self.margin = margin

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        pairs = self.maps(student, teacher)
        self.connect = nn.ModuleList(conv_norm(s.shape[1], t.shape[1]) for s, t in pairs)

    def forward(self, student, teacher, batch) -> Tensor:
        sources, targets = zip(*self.maps(student, teacher), strict=True)
        return ab([connect(maps) for connect, maps in zip(self.connect, sources, strict=True)], targets, self.margin)
