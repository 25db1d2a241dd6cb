"""DIST: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.

    L = τ² · (β · (1 - mean_i ρ(p_s[i, :], p_t[i, :])) + γ · (1 - mean_k ρ(p_s[:, k], p_t[:, k])))

over images i and classes k; ρ is Pearson's correlation, p = softmax(z / τ) (N, K). The student keeps the teacher's
relations within an image and within a class of the batch, not its exact probabilities. The factor τ² is the released
code's, the paper has none.
Defaults β = γ = 2 and τ = 4, weight 1 beside loss.ce.weight=1: the paper's for CIFAR-100 (ImageNet: τ = 1).
"""

from torch import Tensor

from distill.errors import UserError
from distill.losses.logits import LogitLoss
from distill.losses.relations import correlation
from distill.schema.ranges import NotNegative, Positive


def dist(student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """Scalar from logits (N, K), N ≥ 2; zero where both are the same up to a constant per row."""
    student, teacher = (student_logits / temperature).softmax(1), (teacher_logits / temperature).softmax(1)
    images = 1 - correlation(student, teacher).mean()
    classes = 1 - correlation(student.T, teacher.T).mean()
    return temperature**2 * (beta * images + gamma * classes)


class DIST(LogitLoss):
    """`dist` of the two networks' logits.

    Args:
        beta, gamma: weights of the relation between classes, and of that within a class.
        temperature: τ > 0.
        standardize: of z-scored logits.

    Raises:
        UserError: a batch of one image, in which a class has no correlation.
    """

    def __init__(
        self, beta: NotNegative = 2.0, gamma: NotNegative = 2.0, temperature: Positive = 4.0, standardize: bool = False
    ):
        super().__init__(standardize)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        if len(student_logits) < 2:
            raise UserError("loss dist needs at least 2 images in a batch, this one has 1: raise data.batch_size")
        return dist(student_logits, teacher_logits, self.beta, self.gamma, self.temperature)
