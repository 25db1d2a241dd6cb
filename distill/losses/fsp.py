"""Flow of solution procedure: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017, §3.3, eq. 1 and 2.

    G_{c,d}(a, b) = 1/(H·W) Σ_{h,w} a_{c,h,w} b_{d,h,w},   L = Σ_i mean (G(s_i, s_{i+1}) - G(t_i, t_{i+1}))²

G relates one stage's channels to the next one's; the finer map of the two is pooled to the coarser. As in Tian et
al., ICLR 2020 (weight 50), the mean stands for the squared Frobenius norm, and the stages are the stem and the
outputs of all. The paper asks for equal channels; where they differ, a learned 1×1 convolution brings the student's
to the teacher's. The paper trains this alone first and the labels after it: see the schedule in the config.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distill.losses.project import as_map, to_same_space
from distill.losses.stages import StageLoss, align


def flow(before: Tensor, after: Tensor) -> Tensor:
    """Maps (N, C, H, W) and (N, D, H', W') to their FSP matrices (N, C, D)."""
    before, after = to_same_space(before, after)
    return torch.einsum("nchw,ndhw->ncd", before, after) / (before.shape[2] * before.shape[3])


def fsp(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Scalar from two lists of maps, from shallow to deep, of equal channels pair by pair; space may differ."""
    total = student_maps[0].new_zeros(())
    for student, teacher in zip(pairwise(student_maps), pairwise(teacher_maps), strict=True):
        total = total + (flow(*student) - flow(*teacher)).pow(2).mean()
    return total


class FSP(StageLoss):
    """`fsp` over consecutive taps.

    Args:
        taps: two or more from shallow to deep, or {student tap: teacher tap}; "stage1:in" is the stem's output.
    """

    at_least = 2

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        self.align = nn.ModuleList(align(*pair) for pair in self.maps(student, teacher))

    def forward(self, student, teacher, batch) -> Tensor:
        sources = [as_map(student.features[tap]) for tap, _ in self.pairs]
        targets = [as_map(teacher.features[tap]) for _, tap in self.pairs]
        return fsp([align(maps) for align, maps in zip(self.align, sources, strict=True)], targets)
