"""Weighted soft labels: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
Perspective", ICLR 2021.

    L = T² · w · -Σ_k p_t(k) log p_s(k),   w = 1 - exp(-CE(z_s, y) / CE(z_t, y)),   batch mean

p at temperature T, the weight w at temperature 1 and without a gradient: an image on which the student is already
better than the teacher counts less. As in the released code the distillation term is a cross-entropy, not a KL.
Defaults T = 4 and weight 2.25 beside loss.ce.weight=1: the published CIFAR-100 setting (ImageNet: T = 2, 2.5).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.logits import LogitLoss, soft_cross_entropy
from distill.schema.ranges import Positive


def wsld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Scalar from logits (N, K) and labels (N,)."""
    student, teacher = (
        F.cross_entropy(logits.detach(), labels, reduction="none") for logits in (student_logits, teacher_logits)
    )
    weight = -torch.expm1(-student / (teacher + 1e-7))  # (N,)
    return temperature**2 * (weight * soft_cross_entropy(student_logits, teacher_logits, temperature)).mean()


class WSLD(LogitLoss):
    """`wsld` of the two networks' logits.

    Args:
        temperature: T > 0.
        standardize: of z-scored logits.
    """

    def __init__(self, temperature: Positive = 4.0, standardize: bool = False):
        super().__init__(standardize)
        self.temperature = temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return wsld(student_logits, teacher_logits, batch.labels, self.temperature)
