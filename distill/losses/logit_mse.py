"""Squared difference of logits: Ba & Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, §2.2, eq. 1;
Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation",
IJCAI 2021.

    L = mean over images and classes of (z_s - z_t)²

Ba & Caruana halve the sum over classes; Kim et al.'s released code takes the mean over images and classes, and so
does this. It is KD in the limit of an infinite temperature, up to the rows' means (Kim et al.). Weight 1 and no
cross-entropy, as theirs: `loss=[logit_mse]`.
"""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.logits import LogitLoss


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Scalar from logits (N, K); zero where both are the same."""
    return F.mse_loss(student_logits, teacher_logits)


class LogitMSE(LogitLoss):
    """`logit_mse` of the two networks' logits.

    Args:
        standardize: of z-scored logits.
    """

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return logit_mse(student_logits, teacher_logits)
