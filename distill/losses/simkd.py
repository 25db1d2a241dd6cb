"""Reused teacher classifier: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, §3.

    L = mean (P(s) - t)²

The student is distill.networks.simkd: it keeps the teacher's classifier, frozen, behind a learned projector P of its
last map, and all of that ships. This loss, weight 1, is all that is trained: no labels ('loss=[simkd]'). The mean
stands for the paper's squared norm, as in the released code; the larger of the two maps is pooled (there a larger
student's map is pooled before P).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.project import as_map, to_same_space


def simkd(projected: Tensor, teacher_map: Tensor) -> Tensor:
    """Scalar: mean squared difference of two maps of one shape (N, C, H, W)."""
    return F.mse_loss(projected, teacher_map)


class SimKD(Loss):
    """`simkd` of the student's projected map and the teacher's last.

    Args:
        student_tap: the projector's output, a module path of the student ("avgpool.project" in torchvision's ResNets).
        teacher_tap: the last stage: "stage4" where there are four.

    Raises:
        UserError: the student's classifier is not the teacher's, or the two maps differ in channels.
    """

    def __init__(self, student_tap: str = "pool.project", teacher_tap: str = "last"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap, "head:weight"), (teacher_tap, "head:weight")

    def build(self, student, teacher, data) -> None:
        source, target = (as_map(out.features[tap]).shape[1] for out, tap in self._sides(student, teacher))
        own, reused = student.features["head:weight"].flatten(1), teacher.features["head:weight"].flatten(1)
        if not torch.equal(own.to(reused), reused):
            raise UserError(
                "loss simkd needs a student that reuses the teacher's classifier, and its classifier is another: "
                "student=simkd student.weights=FILE, the file of the teacher's weights"
            )
        if source != target:
            raise UserError(
                f"loss simkd needs maps of equal channels; the student's '{self.student_taps[0]}' has {source}, the "
                f"teacher's '{self.teacher_taps[0]}' {target}: name its last stage (loss.simkd.teacher_tap=stage4)"
            )

    def _sides(self, student, teacher):
        return (student, self.student_taps[0]), (teacher, self.teacher_taps[0])

    def forward(self, student, teacher, batch) -> Tensor:
        return simkd(*to_same_space(*(as_map(out.features[tap]) for out, tap in self._sides(student, teacher))))
