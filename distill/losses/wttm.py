"""Weighted transformed teacher matching: Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching",
ICLR 2024, §4.

    L = U · KL(q ‖ softmax(z_s)),   q_k = p_k^γ / U,   U = Σ_k p_k^γ,   p = softmax(z_t),   batch mean

KD whose student has temperature 1: only the teacher is softened, by a power γ = 1/T (q = softmax(γ z_t)). An image
counts by U, which is large where the teacher is in doubt: 1 where it is certain, K^(1-γ) where all classes are alike.
Defaults γ = 0.2 and weight 4 beside loss.ce.weight=1: the authors' command with CRD for VGG-13 → 8 on CIFAR-100; γ and
weight are searched for each pair.
"""

from torch import Tensor

from distill.losses.logits import LogitLoss, soft_kl
from distill.schema.ranges import Positive


def wttm(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Tensor:
    """Scalar from logits (N, K); zero where the student's are γ times the teacher's, up to a constant per row."""
    powered = gamma * teacher_logits
    doubt = (powered.logsumexp(1) - gamma * teacher_logits.logsumexp(1)).exp()  # U, (N,)
    return (doubt * soft_kl(student_logits, powered, 1.0)).mean()


class WTTM(LogitLoss):
    """`wttm` of the two networks' logits.

    Args:
        gamma: γ > 0, the teacher's power; below 1 it softens.
        standardize: of z-scored logits.
    """

    def __init__(self, gamma: Positive = 0.2, standardize: bool = False):
        super().__init__(standardize)
        self.gamma = gamma

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return wttm(student_logits, teacher_logits, self.gamma)
