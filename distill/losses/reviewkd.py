"""Knowledge review: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, §3.

    r_n = fuse(s_n),   r_i = fuse(s_i, r_{i+1}),   L = Σ_i HCL(conv(r_i), t_i)
    HCL(a, b) = Σ_l w_l mean (pool_l(a) - pool_l(b))² / Σ_l w_l,   l: whole map, 4, 2, 1;   w = 1, ½, ¼, ⅛

From the deepest stage to the first, the student's map is fused with what came from the deeper stages by a learned
attention over the two (ABF), and compared with the teacher's map at several resolutions (HCL). Levels as large as
the map's shorter side or larger are left out, so the weights move up, as in the released code. As there, the teacher's
maps are those before the activation, the student's those after it, and the pooled vector is the last stage.

Weights of the released scripts for CIFAR-100: 0.6 (ResNet-56 → 20, the default), 1 (110 → 32), 5 (32x4 → 8x4,
WRN), 8 (32x4 → ShuffleNetV2); all warm up linearly over 20 epochs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.project import as_map
from distill.losses.stages import StageLoss, conv_norm, need_two
from distill.schema.ranges import TapPairs

LEVELS = (4, 2, 1)


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar: mean squared difference of maps (N, C, H, W), averaged over resolutions."""
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for level in LEVELS:
        if level < min(student.shape[2:]):
            weight = weight / 2
            pooled = [F.adaptive_avg_pool2d(maps, level) for maps in (student, teacher)]
            total = total + weight * F.mse_loss(*pooled)
            weights = weights + weight
    return total / weights


def reviewkd(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Scalar: `hcl` summed over pairs of maps of one shape."""
    return sum(hcl(student, teacher) for student, teacher in zip(student_maps, teacher_maps, strict=True))


class Fusion(nn.Module):
    """ABF: one stage's maps and what came from the deeper stages, to the teacher's shape and to the next fusion."""

    def __init__(self, channels: int, middle: int, out_channels: int, deepest: bool):
        super().__init__()
        self.enter, self.leave = conv_norm(channels, middle), conv_norm(middle, out_channels, size=3)
        for layers in (self.enter, self.leave):
            nn.init.kaiming_uniform_(layers[0].weight, a=1)  # as in the released code
        self.attention = None if deepest else nn.Conv2d(2 * middle, 2, 1)

    def forward(self, maps: Tensor, deeper: Tensor | None, space: torch.Size) -> tuple[Tensor, Tensor]:
        own = self.enter(maps)  # (N, middle, H, W)
        if self.attention is not None:
            deeper = F.interpolate(deeper, own.shape[2:], mode="nearest")
            share = self.attention(torch.cat([own, deeper], 1)).sigmoid()  # (N, 2, H, W)
            own = own * share[:, :1] + deeper * share[:, 1:]
        if own.shape[2:] != space:
            own = F.interpolate(own, space, mode="nearest")
        return self.leave(own), own


class ReviewKD(StageLoss):
    """`reviewkd` of the student's maps, fused from deep to shallow, and the teacher's.

    Args:
        taps: two stages or more, from shallow to deep, or {student tap: teacher tap}.
    """

    at_least = 2
    takes_vectors = True

    def __init__(self, taps: TapPairs):
        super().__init__(taps, teacher_part=":pre")

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        channels = [as_map(student.features[tap]).shape[1] for tap, _ in self.pairs]
        targets = [as_map(teacher.features[tap]).shape[1] for _, tap in self.pairs]
        middle, last = min(512, channels[-1]), len(channels) - 1
        self.fusions = nn.ModuleList(
            Fusion(channel, middle, target, level == last)
            for level, (channel, target) in enumerate(zip(channels, targets, strict=True))
        )

    def forward(self, student, teacher, batch) -> Tensor:
        targets = [as_map(teacher.features[tap]) for _, tap in self.pairs]
        reviewed, deeper = [], None
        for fusion, (tap, _), target in zip(self.fusions[::-1], self.pairs[::-1], targets[::-1], strict=True):
            maps = as_map(student.features[tap])
            need_two(self.name, maps)
            out, deeper = fusion(maps, deeper, target.shape[2:])
            reviewed.append(out)
        return reviewkd(reviewed[::-1], targets)
