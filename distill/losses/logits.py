"""What the losses on logits share."""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.logit_standardization import standardize as z_scores


class LogitLoss(Loss):
    """A loss on the logits of both networks: a subclass says in `compare` how.

    Args:
        standardize: compare the z-scores of the logits (Sun et al., CVPR 2024; see logit_standardization.py).
    """

    def __init__(self, standardize: bool = False):
        super().__init__()
        self.standardize = standardize

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, batch) -> Tensor:
        """Scalar from logits (N, K) each."""
        raise NotImplementedError

    def forward(self, student, teacher, batch) -> Tensor:
        if self.standardize:
            return self.compare(z_scores(student.logits), z_scores(teacher.logits), batch)
        return self.compare(student.logits, teacher.logits, batch)


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)) of each row: (…, K) to (…)."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """-Σ_k softmax(z_t / T)_k · log softmax(z_s / T)_k of each row: (N, K) to (N,)."""
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    return -(teacher * F.log_softmax(student_logits / temperature, dim=1)).sum(1)


def target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-p_t(y) · log p_s(y), y the label, of each row: (N, K) to (N,)."""
    confidence = F.softmax(teacher_logits, dim=1).gather(1, labels[:, None])[:, 0]
    return confidence * F.cross_entropy(student_logits, labels, reduction="none")


def others(values: Tensor, labels: Tensor) -> Tensor:
    """All columns but the label's, in order: (N, K) to (N, K-1)."""
    columns = torch.arange(values.shape[1] - 1, device=values.device)
    return values.gather(1, columns + (columns >= labels[:, None]))


def target_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, 2) of "the label" against "any other class", from (N, K)."""
    return torch.stack([logits.gather(1, labels[:, None])[:, 0], others(logits, labels).logsumexp(1)], dim=1)


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s) of each row, see dkd.py: (N, K) to (N,)."""
    target = soft_kl(target_or_not(student, labels), target_or_not(teacher, labels), 1.0)
    rest = soft_kl(others(student, labels), others(teacher, labels), 1.0)
    return alpha * target + beta * rest


def normalised_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float):
    """-p_t(y) log p_s(y) - γ T² Σ_{k≠y} p̂_t(k) log p̂_s(k) of each row, see nkd.py: (N, K) to (N,)."""
    target = target_cross_entropy(student, teacher, labels)
    rest = soft_cross_entropy(others(student, labels), others(teacher, labels), temperature)
    return target + gamma * temperature**2 * rest
