"""Cross-entropy with the labels, which is plain training."""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.schema.ranges import BelowOne


class CE(Loss):
    """-Σ_k y_k log p_k, batch mean, where y is the label, smoothed (Szegedy et al. 2016, §7).

    Of a mixed image (Zhang et al. 2018, Yun et al. 2019) y is share · its own label + (1 - share) · its partner's.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
    """

    needs_teacher = False

    def __init__(self, label_smoothing: BelowOne = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student, teacher, batch) -> Tensor:
        if batch.partner is None:
            return F.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        own, partner = (
            F.cross_entropy(student.logits, labels, reduction="none", label_smoothing=self.label_smoothing)
            for labels in (batch.labels, batch.partner)
        )
        return (batch.share * own + (1 - batch.share) * partner).mean()
