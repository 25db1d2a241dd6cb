"""Refined logit distillation: Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025.

    L = α τ² · KL(b_t ‖ b_s) + β T² · KL(p̃_t ‖ p̃_s),   batch mean

    b_t = (p_t(m), 1 - p_t(m)), m the teacher's class;  b_s = (p_s(y), 1 - p_s(y)), y the label     (sample confidence)
    p̃  the distribution over the classes that the teacher finds less likely than the label          (masked correlation)

b from logits / τ, p̃ from logits / T. The student learns how sure the teacher is, but of the label, and the teacher's
order of classes without those that it puts at or above the label, which is where it errs. A teacher that puts the
label last has nothing to order. Defaults α = 1, β = 8, τ = 1, T = 4, weight 1 beside loss.ce.weight=1 after a linear
warm-up over 20 epochs: the authors' code.
"""

from torch import Tensor

from distill.losses.logits import LogitLoss, soft_kl, target_or_not
from distill.schema.ranges import NotNegative, Positive

NEVER = -1e9  # a logit; finite, so that a row in which all are masked is even and has no gradient


def rld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    alpha_temperature: float,
) -> Tensor:
    """Scalar from logits (N, K) and labels (N,); zero where both are the same and the teacher is right."""
    sure_of_label = target_or_not(student_logits / alpha_temperature, labels)
    sure = target_or_not(teacher_logits / alpha_temperature, teacher_logits.argmax(1))
    confidence = soft_kl(sure_of_label, sure, 1.0)
    masked = teacher_logits >= teacher_logits.gather(1, labels[:, None])  # (N, K), the label among them
    student, teacher = (logits.masked_fill(masked, NEVER) for logits in (student_logits, teacher_logits))
    correlation = soft_kl(student, teacher, temperature)
    return (alpha * alpha_temperature**2 * confidence + beta * correlation).mean()


class RLD(LogitLoss):
    """`rld` of the two networks' logits.

    Args:
        alpha, beta: weights of the confidence in the label and of the order of the classes below it.
        temperature: T > 0, of the order.
        alpha_temperature: τ > 0, of the confidence.
        standardize: of z-scored logits.
    """

    def __init__(
        self,
        alpha: NotNegative = 1.0,
        beta: NotNegative = 8.0,
        temperature: Positive = 4.0,
        alpha_temperature: Positive = 1.0,
        standardize: bool = False,
    ):
        super().__init__(standardize)
        self.options = (alpha, beta, temperature, alpha_temperature)

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return rld(student_logits, teacher_logits, batch.labels, *self.options)
