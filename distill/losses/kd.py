"""Soft targets: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, §2.

    L = T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)),   batch mean

T² keeps the gradient's size independent of T (their §2.1). Default T = 4 and, beside a cross-entropy of
weight 0.1, weight 0.9: the CIFAR-100 setting of Tian et al., ICLR 2020.
"""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Scalar from logits (N, K); zero where both are the same up to a constant per row."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class KD(Loss):
    """`kd` of the two networks' logits.

    Args:
        temperature: T > 0.
    """

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher, batch) -> Tensor:
        return kd(student.logits, teacher.logits, self.temperature)
