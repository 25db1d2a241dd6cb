"""Softmax regression: Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021,
§3.

    L = mean (p - h_t)² + mean (W_t p + b_t - z_t)²,   p = pool(connect(s))

The student's last map, brought to the teacher's channels by a learned 1×1 convolution with batch norm and ReLU and
then pooled, has to match the teacher's pooled feature h_t, and, through the teacher's own classifier, its logits z_t.
Of two versions in circulation this is the authors', which pools after the connector; loss.srrl.student_tap=pooled
gives the other. Both terms are means with weight 1, as in their code.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.project import as_map
from distill.losses.stages import as_vector, conv_norm, need_two


def srrl(projected: Tensor, teacher_features: Tensor, weight: Tensor, bias: Tensor, teacher_logits: Tensor) -> Tensor:
    """Scalar from vectors (N, D), the teacher's classifier (K, D), (K,) and logits (N, K)."""
    logits = F.linear(projected, weight, bias)
    return F.mse_loss(projected, teacher_features) + F.mse_loss(logits, teacher_logits)


class SRRL(Loss):
    """`srrl` of the student's last map, connected and pooled.

    Args:
        student_tap: its last stage: "stage4" where there are four.
        teacher_tap: what the teacher's classifier reads.
    """

    def __init__(self, student_tap: str = "last", teacher_tap: str = "pooled"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap, "head:weight", "head:bias")

    def build(self, student, teacher, data) -> None:
        source, target = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        self.connect = nn.Sequential(*conv_norm(as_map(source).shape[1], as_map(target).shape[1]), nn.ReLU())

    def forward(self, student, teacher, batch) -> Tensor:
        source, target = as_map(student.features[self.student_taps[0]]), teacher.features[self.teacher_taps[0]]
        need_two("srrl", source)
        weight, bias = teacher.features["head:weight"].flatten(1), teacher.features["head:bias"]
        return srrl(as_vector(self.connect(source)), as_vector(target), weight, bias, teacher.logits)
