"""Universal self-KD, without a teacher: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A
Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023.

    L = -α · P(y) · log p(y)  -  β · Σ_{k≠y} ẑ_k · log p̂(k)  +  μ · CE(w, smoothed label),   batch mean

    P(y) = 1 + p(y)² - mean of p(y)² over the batch      the label's soft target
    ẑ    Zipf's law, 1 / rank, over the other classes, made to sum to 1; the rank is that of
         w_k / (1 - w_y) + p_k / (1 - p_y)
    w    softmax of a linear classifier on an earlier stage, pooled, trained by the last term (labels smoothed by 0.1)
    p, p̂ the student's softmax over all classes and over all but the label y

P and ẑ carry no gradient. Defaults α = β = μ = 0.1, weight 1 beside loss.ce.weight=1, and the stage before the last:
the released CIFAR-100 configuration. The latest released code ranks by log p in place of p, by a variable reused when
its softmax became a log-softmax; this follows the first release and the paper. `standardize` has no meaning here:
there is no second scale of logits to agree with.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.logits import others
from distill.losses.project import as_map
from distill.schema.ranges import NotNegative


@torch.no_grad()
def zipf(student_logits: Tensor, weak_logits: Tensor, labels: Tensor) -> Tensor:
    """ẑ (N, K-1), the soft labels of all classes but the label, from logits (N, K)."""
    score = torch.zeros_like(student_logits)
    for logits in (student_logits, weak_logits):
        probabilities = logits.softmax(1)
        score += probabilities / (1 - probabilities.gather(1, labels[:, None]) + 1e-6)
    rank = 1 + score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    soft = others(1 / rank.to(score.dtype), labels)
    return soft / soft.sum(1, keepdim=True)


def uskd(student_logits: Tensor, weak_logits: Tensor, labels: Tensor, alpha: float, beta: float, mu: float) -> Tensor:
    """Scalar from the student's logits and its weak classifier's, (N, K) each, and labels (N,)."""
    cross_entropy = F.cross_entropy(student_logits, labels, reduction="none")  # -log p(y), (N,)
    squared = (-2 * cross_entropy).exp().detach()
    target = (1 + squared - squared.mean()) * cross_entropy
    rest = -(zipf(student_logits, weak_logits, labels) * F.log_softmax(others(student_logits, labels), dim=1)).sum(1)
    weak = F.cross_entropy(weak_logits, labels, label_smoothing=0.1)
    return (alpha * target + beta * rest).mean() + mu * weak


class USKD(Loss):
    """`uskd` of the student alone.

    Args:
        alpha, beta, mu: weights of the label's part, the other classes' part and the weak classifier's.
        tap: the feature that the weak classifier sees, pooled where it is a map or tokens.
    """

    needs_teacher = False

    def __init__(self, alpha: NotNegative = 0.1, beta: NotNegative = 0.1, mu: NotNegative = 0.1, tap: str = "stage2"):
        super().__init__()
        self.alpha, self.beta, self.mu = alpha, beta, mu
        self.student_taps = (tap,)

    def _pooled(self, student) -> Tensor:
        return as_map(student.features[self.student_taps[0]]).mean((2, 3))  # (N, C)

    def build(self, student, teacher, data) -> None:
        self.weak = nn.Linear(self._pooled(student).shape[1], student.logits.shape[1])

    def forward(self, student, teacher, batch) -> Tensor:
        weak_logits = self.weak(self._pooled(student))
        return uskd(student.logits, weak_logits, batch.labels, self.alpha, self.beta, self.mu)
