"""Projector recipe (SRD): Miles & Mikolajczyk, "Understanding the Role of the Projector in Knowledge
Distillation", AAAI 2024, §3.

    L = log Σ_{n,d} | norm(P s)_{n,d} - norm(t)_{n,d} |^α,   α = 4

P is a learned linear projector; `norm` a batch norm without parameters on either side, so that the scale and shift
of every feature drop out; the logarithm softens the largest differences. The sum runs over the batch too, as in the
released code (ε = 1e-4 in the batch norms, weight 1). Its minimum is not zero: log of the floor 1e-12, which keeps it
finite at equal features.
"""

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from distill.losses.base import Loss
from distill.losses.stages import as_vector, need_two

FLOOR = 1e-12


def srd(student: Tensor, teacher: Tensor, exponent: float) -> Tensor:
    """Scalar from normalised features of one shape (N, D)."""
    return ((student - teacher).abs().pow(exponent).sum() + FLOOR).log()


class SRD(Loss):
    """`srd` of one tap of either network; maps are averaged over their space.

    Args:
        student_tap, teacher_tap: names of taps, or module paths.
        exponent: α, at least 2.
    """

    def __init__(
        self,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        exponent: Annotated[float, Ge(2)] = 4.0,
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.exponent = exponent

    def build(self, student, teacher, data) -> None:
        source, target = self._features(student, teacher)
        width = target.shape[1]
        self.project = nn.Linear(source.shape[1], width)
        self.student_norm = nn.BatchNorm1d(width, eps=1e-4, affine=False)
        self.teacher_norm = nn.BatchNorm1d(width, eps=1e-4, affine=False)

    def _features(self, student, teacher) -> tuple[Tensor, Tensor]:
        taps = (student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]])
        return as_vector(taps[0]), as_vector(taps[1])

    def forward(self, student, teacher, batch) -> Tensor:
        source, target = self._features(student, teacher)
        need_two("srd", source)
        return srd(self.student_norm(self.project(source)), self.teacher_norm(target), self.exponent)
