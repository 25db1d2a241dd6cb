"""α-β divergence: Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation
via α-β-Divergence", ICML 2025.

    L = -1/(αβ) Σ_k [ p_k^α q_k^β - α/(α+β) p_k^(α+β) - β/(α+β) q_k^(α+β) ],   batch mean
    p = softmax(z_t / T),   q = softmax(z_s / T)

and its limits where α or β is 0 (Cichocki et al., Entropy 2011): (1, 0) is KL(p ‖ q), (0, 1) the reverse KL, (½, ½)
four times the squared Hellinger distance, (1, 1) half the squared error, (0, 0) half the squared difference of the
log-probabilities. There is no factor T², as in the authors' code. Defaults α = 0.8, β = 0.3, T = 4, weight 32 beside
loss.ce.weight=1: their command for ResNet-56 → 20 on CIFAR-100.
"""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.logits import LogitLoss
from distill.schema.ranges import NotNegative, Positive


def abkd(student_logits: Tensor, teacher_logits: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Scalar from logits (N, K); zero where both are the same up to a constant per row."""
    p, q = (F.log_softmax(logits / temperature, dim=1) for logits in (teacher_logits, student_logits))
    if alpha == beta == 0:
        return 0.5 * (p - q).pow(2).sum(1).mean()
    # the two halves of the formula, both differences of powers, so that each has its own limit
    mixed = (alpha * p + beta * q).exp()
    towards_teacher = (((alpha + beta) * p).exp() - mixed) / beta if beta else mixed * (p - q)
    towards_student = (mixed - ((alpha + beta) * q).exp()) / alpha if alpha else mixed * (p - q)
    return ((towards_teacher - towards_student) / (alpha + beta)).sum(1).mean()


class ABKD(LogitLoss):
    """`abkd` of the two networks' logits.

    Args:
        alpha, beta: α, β ≥ 0.
        temperature: T > 0.
        standardize: of z-scored logits.
    """

    def __init__(
        self, alpha: NotNegative = 0.8, beta: NotNegative = 0.3, temperature: Positive = 4.0, standardize: bool = False
    ):
        super().__init__(standardize)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return abkd(student_logits, teacher_logits, self.alpha, self.beta, self.temperature)
