"""FitNet hints: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, §2.2, eq. 3.

    L = ½ ‖ u_h(x) - r(v_g(x)) ‖²,   u_h the teacher's hint, v_g the guided layer, r a learned regressor

As in the released code and every benchmark since (Tian et al., ICLR 2020: weight 100), the mean of the squared
differences stands for half their sum, and hint and labels train together instead of in two phases. As there, too, the
regressor is a convolution with batch norm, and a ReLU where the hint came out of one: without them that weight
diverges. Its shape is inferred from the two taps, 1×1.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.project import Projector


def fitnet(projected: Tensor, hint: Tensor) -> Tensor:
    """Scalar: mean squared difference of two features of one shape."""
    return F.mse_loss(projected, hint)


class FitNet(Loss):
    """`fitnet` between one tap of the student, projected, and one of the teacher.

    Args:
        student_tap, teacher_tap: names of taps, or module paths.
    """

    def __init__(self, student_tap: str = "stage2", teacher_tap: str = "stage2"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)

    def build(self, student, teacher, data) -> None:
        hint = teacher.features[self.teacher_taps[0]]
        self.project = Projector(student.features[self.student_taps[0]], hint)
        channels = self.project.convolution.out_channels
        self.scale = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU() if hint.min() >= 0 else nn.Identity())

    def forward(self, student, teacher, batch) -> Tensor:
        projected, hint = self.project(student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]])
        return fitnet(self.scale(projected), hint)
