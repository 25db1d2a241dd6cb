"""Softmax regression: Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021,
§3.

    L = α · mean (p - h_t)² + β · mean (W_t p + b_t - z_t)²,   p = pool(connect(s))

The student's last map, brought to the teacher's channels by a learned 1×1 convolution with batch norm and ReLU and
then pooled, has to match the teacher's pooled feature h_t, and, through the teacher's own classifier, its logits z_t.
Of two versions in circulation this is the authors', which pools after the connector; loss.srrl.student_tap=pooled
gives the other. Both terms are means, and α = β = 1, as in their code, which is for ImageNet; on CIFAR-100 the
configuration of Yang et al., ICCV 2023 (NKD) has β = 5.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.project import as_map
from distill.losses.stages import as_vector, conv_norm, need_two
from distill.schema.ranges import NotNegative


def srrl(
    projected: Tensor,
    teacher_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    teacher_logits: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Scalar from vectors (N, D), the teacher's classifier (K, D), (K,) and logits (N, K)."""
    logits = F.linear(projected, weight, bias)
    return alpha * F.mse_loss(projected, teacher_features) + beta * F.mse_loss(logits, teacher_logits)


class SRRL(Loss):
    """`srrl` of the student's last map, connected and pooled.

    Args:
        student_tap: its last stage: "stage4" where there are four.
        teacher_tap: what the teacher's classifier reads.
        alpha, beta: weights of the feature's term and of the logits' term.
    """

    def __init__(
        self,
        student_tap: str = "last",
        teacher_tap: str = "pooled",
        alpha: NotNegative = 1.0,
        beta: NotNegative = 1.0,
    ):
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap, "head:weight", "head:bias")

    def build(self, student, teacher, data) -> None:
        source, target = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        self.connect = nn.Sequential(*conv_norm(as_map(source).shape[1], as_map(target).shape[1]), nn.ReLU())

    def forward(self, student, teacher, batch) -> Tensor:
        source, target = as_map(student.features[self.student_taps[0]]), teacher.features[self.teacher_taps[0]]
        need_two("srrl", source)
        weight, bias = teacher.features["head:weight"].flatten(1), teacher.features["head:bias"]
        projected = as_vector(self.connect(source))
        return srrl(projected, as_vector(target), weight, bias, teacher.logits, self.alpha, self.beta)
