"""Orthogonal projection: Miles, Elezi & Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections",
CVPR 2024, §3.

    L = mean over images and features of  l₁( P s, norm(t) ),   PᵀP = I (P Pᵀ = I where the student is wider)

P is a learned linear map without bias that is orthogonal in every step, so that it can rotate the student's features
into the teacher's but not learn a part of the task in their place; norm scales the teacher's features of each image to
mean 0 and variance 1 (a layer norm without parameters); l₁ is the smooth L1 distance (Huber, δ = 1). That is the
authors' code for classification, with weight 1 beside a cross-entropy and, on a distillation head, KD; the paper's
whitening is for generating images.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from distill.losses.base import Loss
from distill.losses.stages import as_vector


def vkd(projected: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from features (N, D); scale and shift of each of the teacher's rows change nothing (but for 1e-5)."""
    return F.smooth_l1_loss(projected, F.layer_norm(teacher, teacher.shape[1:]))


class VKD(Loss):
    """`vkd` of one tap of either network, the student's projected; maps are averaged over their space.

    Args:
        student_tap, teacher_tap: names of taps, or module paths.
    """

    def __init__(self, student_tap: str = "pooled", teacher_tap: str = "pooled"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)

    def build(self, student, teacher, data) -> None:
        source, target = self._features(student, teacher)
        self.project = orthogonal(nn.Linear(source.shape[1], target.shape[1], bias=False))

    def _features(self, student, teacher) -> tuple[Tensor, Tensor]:
        taps = (student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]])
        return as_vector(taps[0]), as_vector(taps[1])

    def forward(self, student, teacher, batch) -> Tensor:
        source, target = self._features(student, teacher)
        return vkd(self.project(source), target)
