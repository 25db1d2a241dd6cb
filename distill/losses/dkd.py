"""Decoupled KD: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eq. 7.

    L = T² · (α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s)),   batch mean

b = (p_y, 1 - p_y): the label's probability against all others'; p̂: the distribution over the other classes alone,
all of them from logits / T. With α = 1 and β = 1 - p_t(y) it is KD (their eq. 6). b is the softmax of (z_y,
logsumexp of the others), so a saturated student stays finite where the released code's log(softmax) does not.

Defaults α = 1, β = 8, T = 4, weight 1 beside loss.ce.weight=1, after a linear warm-up over 20 epochs: the authors'
configurations for CIFAR-100, where β is 2 for ResNet-56 → 20 and 110 → 32, 6 from VGG to VGG and from WRN to WRN, and 8
for the other pairs.
"""

from torch import Tensor

from distill.losses.logits import LogitLoss, decoupled_kl
from distill.schema.ranges import NotNegative, Positive


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Scalar from logits (N, K) and labels (N,); zero where both are the same up to a constant per row."""
    student, teacher = student_logits / temperature, teacher_logits / temperature
    return temperature**2 * decoupled_kl(student, teacher, labels, alpha, beta).mean()


class DKD(LogitLoss):
    """`dkd` of the two networks' logits.

    Args:
        alpha, beta: weights of the label's part and of the other classes' part.
        temperature: T > 0.
        standardize: of z-scored logits.
    """

    def __init__(
        self, alpha: NotNegative = 1.0, beta: NotNegative = 8.0, temperature: Positive = 4.0, standardize: bool = False
    ):
        super().__init__(standardize)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return dkd(student_logits, teacher_logits, batch.labels, self.alpha, self.beta, self.temperature)
