"""Cross-entropy with the labels, which is plain training."""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss


class CE(Loss):
    """-Σ_k y_k log p_k, batch mean, where y is the label, smoothed (Szegedy et al. 2016, §7).

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student, teacher, batch) -> Tensor:
        return F.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
