"""Distillation through a token: Touvron et al., "Training data-efficient image transformers & distillation through
attention", ICML 2021, eq. 2–3. For students with a distillation head (student=deit_tiny).

    hard:  L = CE(z_dist, argmax z_t)                                          (eq. 3)
    soft:  L = τ² · KL(softmax(z_t / τ) ‖ softmax(z_dist / τ)), batch mean     (eq. 2)

The labels' half is `ce`, which in training reads the class head: 'loss=[ce,deit]' loss.ce.weight=0.5 is eq. 3, with
hard labels and weights ½ each as in the authors' code. Soft: they use λ = 0.1 and τ = 3; their code also divides by
the number of classes, this as the paper does not.
"""

from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.logits import soft_kl
from distill.schema.ranges import Positive


def deit(dist_logits: Tensor, teacher_logits: Tensor, hard: bool, temperature: float) -> Tensor:
    """Scalar from the distillation head's logits (N, K) and the teacher's (N, K); the temperature is for soft only."""
    if hard:
        return F.cross_entropy(dist_logits, teacher_logits.argmax(1))
    return soft_kl(dist_logits, teacher_logits, temperature).mean()


class DeiT(Loss):
    """`deit` of the student's distillation head.

    Args:
        hard: the teacher's class; else its softened probabilities.
        temperature: τ > 0, of the soft one.
        student_tap: where the student's distillation logits (N, K) are.

    Raises:
        UserError: the tap does not hold logits.
    """

    def __init__(self, hard: bool = True, temperature: Positive = 3.0, student_tap: str = "dist_head"):
        super().__init__()
        self.hard, self.temperature = hard, temperature
        self.student_taps = (student_tap,)

    def build(self, student, teacher, data) -> None:
        came = student.features[self.student_taps[0]].shape
        if came != student.logits.shape:
            raise UserError(
                f"loss deit needs the logits of a distillation head, {tuple(student.logits.shape)} for two images; "
                f"the student's '{self.student_taps[0]}' is {tuple(came)}: use student=deit_tiny"
            )

    def forward(self, student, teacher, batch) -> Tensor:
        return deit(student.features[self.student_taps[0]], teacher.logits, self.hard, self.temperature)
