"""Correlation congruence: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.

    C[i, j] = k(x_i, x_j),   k(x, y) = exp(-γ‖x - y‖²) ≈ Σ_p≤P exp(-2γ) (2γ)^p / p! · ⟨x, y⟩^p,   ‖x‖ = ‖y‖ = 1
    L = ‖C_t - C_s‖²_F / N²

The paper's Gaussian kernel by its Taylor series, γ = 0.4, P = 2, on embeddings scaled to length 1. The widely copied
version (Tian et al., ICLR 2020, weight 0.02) multiplies consecutive images' errors instead, which is no correlation;
it isn't followed, and so its weight does not apply. The authors released no code; γ, P and weight 100 are those of
Knowledge-Distillation-Zoo, which follows the paper too. Embeddings may differ in width.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.relations import unit, vectors
from distill.schema.ranges import Count, Positive


def correlation(embeddings: Tensor, gamma: float, order: int) -> Tensor:
    """Embeddings (N, D) to the kernel's matrix (N, N)."""
    cosines = unit(embeddings) @ unit(embeddings).T
    terms = (math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1))
    return sum(terms)


def cc(student: Tensor, teacher: Tensor, gamma: float, order: int) -> Tensor:
    """Scalar from embeddings (N, D_s) and (N, D_t)."""
    return F.mse_loss(correlation(student, gamma, order), correlation(teacher, gamma, order))


class CC(Loss):
    """`cc` of one tap of each network.

    Args:
        student_tap, teacher_tap: taps of any kind; their elements are one vector for each image.
        gamma: γ > 0.
        order: P ≥ 1.

    Raises:
        UserError: a batch of 1.
    """

    def __init__(
        self, student_tap: str = "pooled", teacher_tap: str = "pooled", gamma: Positive = 0.4, order: Count = 2
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.gamma, self.order = gamma, order

    def forward(self, student, teacher, batch) -> Tensor:
        embeddings = vectors("cc", student.features[self.student_taps[0]])
        targets = vectors("cc", teacher.features[self.teacher_taps[0]])
        return cc(embeddings, targets, self.gamma, self.order)
