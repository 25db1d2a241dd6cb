"""Soft targets: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", NeurIPS workshop 2015, §2.

    L = T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)),   batch mean

T² keeps the gradient's size independent of T (their §2.1). Defaults: T = 4 and weight 0.9, or T = 1 and weight 0.5
where the student starts from weights, the cross-entropy's weight being the rest of 1 (see benchmarks/gain.json).
0.9, 0.1 and T = 4 are the published CIFAR-100 setting too (Tian et al., ICLR 2020).
"""

from torch import Tensor

from distill.losses.logits import LogitLoss, soft_kl
from distill.schema.ranges import Positive


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Scalar from logits (N, K); zero where both are the same up to a constant per row."""
    return soft_kl(student_logits, teacher_logits, temperature).mean()


class KD(LogitLoss):
    """`kd` of the two networks' logits.

    Args:
        temperature: T > 0.
        standardize: of z-scored logits.
    """

    def __init__(self, temperature: Positive = 4.0, standardize: bool = False):
        super().__init__(standardize)
        self.temperature = temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return kd(student_logits, teacher_logits, self.temperature)
