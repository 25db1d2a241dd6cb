"""Cross-entropy with the labels, which is plain training."""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.schema.ranges import BelowOne


def ce(
    student_logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    partner: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Scalar from logits (N, K) and labels (N,); of mixed images also their partners' labels (N,) and their own
    label's share (N,) in [0, 1]."""
    if partner is None:
        return F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    own, other = (
        F.cross_entropy(student_logits, each, reduction="none", label_smoothing=label_smoothing)
        for each in (labels, partner)
    )
    return (share * own + (1 - share) * other).mean()


class CE(Loss):
    """`ce`: -Σ_k y_k log p_k, batch mean, where y is the label, smoothed (Szegedy et al. 2016, §7).

    Of a mixed image (Zhang et al. 2018, Yun et al. 2019) y is share · its own label + (1 - share) · its partner's.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
    """

    needs_teacher = False

    def __init__(self, label_smoothing: BelowOne = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student, teacher, batch) -> Tensor:
        return ce(student.logits, batch.labels, self.label_smoothing, batch.partner, batch.share)
