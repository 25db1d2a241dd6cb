"""Normalised KD: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023.

    L = -p_t(y) · log p_s(y) - γ T² Σ_{k≠y} p̂_t(k) · log p̂_s(k),   batch mean

p at temperature 1; p̂ the softmax over all classes but the label y, at temperature T. Both parts are cross-entropies:
the minimum over the student is not zero. Defaults T = 3, γ = 3.5, weight 1 beside loss.ce.weight=1: the released
CIFAR-100 configuration (ImageNet: T = 1, γ = 1.5). One released version forgot to drop the label (the authors'
issue 16 calls it a mistake); this follows the others and the paper.
"""

from torch import Tensor

from distill.losses.logits import LogitLoss, normalised_cross_entropy
from distill.schema.ranges import NotNegative, Positive


def nkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float, temperature: float) -> Tensor:
    """Scalar from logits (N, K) and labels (N,)."""
    return normalised_cross_entropy(student_logits, teacher_logits, labels, gamma, temperature).mean()


class NKD(LogitLoss):
    """`nkd` of the two networks' logits.

    Args:
        gamma: weight of the part on the other classes.
        temperature: T > 0, of that part.
        standardize: of z-scored logits.
    """

    def __init__(self, gamma: NotNegative = 3.5, temperature: Positive = 3.0, standardize: bool = False):
        super().__init__(standardize)
        self.gamma, self.temperature = gamma, temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return nkd(student_logits, teacher_logits, batch.labels, self.gamma, self.temperature)
