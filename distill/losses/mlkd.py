"""Multi-level logit distillation: Jin, Wang & Lin, "Multi-Level Logit Distillation", CVPR 2023.

    L = Σ_T  a · T² KL(p_t ‖ p_s) + b · ‖p_s p_sᵀ - p_t p_tᵀ‖² / N + c · ‖p_sᵀ p_s - p_tᵀ p_t‖² / K

with p = softmax(z / T): an instance level (batch mean), a batch level over pairs of images and a class level over pairs
of classes, each at temperatures 2, 3, 4, 5 and 6.

The paper shows each image in a weak and a strong augmentation and adds the levels of both; here there is the one
view of the batch. The released code masks the terms after they are summed, which halves the weak view's three levels
and leaves the strong view's instance level whole: a = 1.5 and b = c = 0.5 are that code's value where both views are
the same. Its weight is 0.9, beside a cross-entropy of 0.1 on each view: loss.ce.weight=0.2 on one.
With `standardize` the instance level alone sees z-scores, as in the released code of Sun et al., CVPR 2024.
"""

from collections.abc import Sequence

from torch import Tensor

from distill.losses.base import Loss
from distill.losses.logit_standardization import standardize as z_scores
from distill.losses.logits import soft_kl
from distill.schema.ranges import NotNegative, Positives


def mlkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperatures: Sequence[float],
    instance: float,
    batch: float,
    classes: float,
    standardize: bool = False,
) -> Tensor:
    """Scalar from logits (N, K); zero where both are the same up to a constant per row."""
    pair = (student_logits, teacher_logits)
    instance_pair = tuple(map(z_scores, pair)) if standardize else pair
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        s, t = ((logits / temperature).softmax(1) for logits in pair)  # (N, K)
        images = (s @ s.T - t @ t.T).pow(2).sum() / s.shape[0]  # of (N, N)
        relations = (s.T @ s - t.T @ t).pow(2).sum() / s.shape[1]  # of (K, K)
        total = total + instance * soft_kl(*instance_pair, temperature).mean() + batch * images + classes * relations
    return total


class MLKD(Loss):
    """`mlkd` of the two networks' logits.

    Args:
        temperatures: the T summed over.
        instance, batch, classes: weights of the levels.
        standardize: z-scored logits at the instance level.
    """

    def __init__(
        self,
        temperatures: Positives = (2.0, 3.0, 4.0, 5.0, 6.0),
        instance: NotNegative = 1.5,
        batch: NotNegative = 0.5,
        classes: NotNegative = 0.5,
        standardize: bool = False,
    ):
        super().__init__()
        self.options = (tuple(temperatures), instance, batch, classes, standardize)

    def forward(self, student, teacher, batch) -> Tensor:
        return mlkd(student.logits, teacher.logits, *self.options)
