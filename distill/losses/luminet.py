"""LumiNet: Hossain et al., "LumiNet: Perception-Driven Knowledge Distillation via Statistical Logit Calibration",
TMLR 2025.

    L = α² · KL(softmax(h(z_t) / T) ‖ softmax(h(z_s) / T)),   batch mean
    h(z)_ik = (z_ik - mean_i z_ik) / sqrt(var_i z_ik + 1e-5)

KD on the "perception" h: each class's logits are z-scored over the images of the batch (biased variance), so that a
class is seen as it stands out from the other images, not from the other classes. Factor α² and not T², as in the
authors' code. Defaults α = 31, T = 4 beside loss.ce.weight=2, after a linear warm-up over 20 epochs: that code's; its
configurations for CIFAR-100 vary with the pair (32x4 → 8x4: 34 and 4; VGG-13 → 8: 11 and 2, ce 1.3; ImageNet: 2 and
1, ce 0.7, 1 epoch).
"""

from torch import Tensor

from distill.errors import UserError
from distill.losses.logits import LogitLoss, soft_kl
from distill.schema.ranges import NotNegative, Positive

EPSILON = 1e-5


def perception(logits: Tensor) -> Tensor:
    """Logits (N, K), z-scored over the batch."""
    variance, mean = logits.var(0, correction=0), logits.mean(0)
    return (logits - mean) / (variance + EPSILON).sqrt()


def luminet(student_logits: Tensor, teacher_logits: Tensor, alpha: float, temperature: float) -> Tensor:
    """Scalar from logits (N, K), N ≥ 2; a constant per class changes nothing, nor (but for 1e-5) a scale."""
    divergence = soft_kl(perception(student_logits), perception(teacher_logits), temperature).mean()
    return (alpha / temperature) ** 2 * divergence


class LumiNet(LogitLoss):
    """`luminet` of the two networks' logits.

    Args:
        alpha: α, whose square is the factor in front.
        temperature: T > 0.
        standardize: of logits z-scored within each image before they are within each class.

    Raises:
        UserError: a batch of one image, in which a class has no deviation.
    """

    def __init__(self, alpha: NotNegative = 31.0, temperature: Positive = 4.0, standardize: bool = False):
        super().__init__(standardize)
        self.alpha, self.temperature = alpha, temperature

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        if len(student_logits) < 2:
            raise UserError("loss luminet needs at least 2 images in a batch, this one has 1: raise data.batch_size")
        return luminet(student_logits, teacher_logits, self.alpha, self.temperature)
