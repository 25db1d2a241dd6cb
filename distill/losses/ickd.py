"""Inter-channel correlation: Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
Distillation", ICCV 2021, eq. 4–6 (ICKD-C).

    G = f·fᵀ (C, C), f (C, H·W) the map of one image;   L = mean over images of ‖Ĝ_t - Ĝ_s‖²_F / C

The authors' code, unlike the paper's C², scales each row of G to length 1 (Ĝ) and divides by C; the student's map
first goes through a learned 1×1 convolution without bias and a batch norm to the teacher's channels. Weight 2.5 and
the last stage: their CIFAR-100 script. Height and width of the two may differ: G has neither.
"""

from torch import Tensor, nn

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.project import as_map
from distill.losses.relations import unit


def channel_correlation(maps: Tensor) -> Tensor:
    """Maps (N, C, H, W) to correlations (N, C, C), each row of length 1."""
    channels = maps.flatten(2)  # (N, C, H·W)
    return unit(channels @ channels.transpose(1, 2), dim=2)


def ickd(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from maps (N, C, H_s, W_s) and (N, C, H_t, W_t)."""
    return (channel_correlation(student) - channel_correlation(teacher)).pow(2).sum(2).mean()


class ICKD(Loss):
    """`ickd` between one tap of the student, projected, and one of the teacher.

    Args:
        student_tap, teacher_tap: maps or tokens.

    Raises:
        UserError: a tap is a vector, whose channels have nothing to be correlated over.
    """

    def __init__(self, student_tap: str = "last", teacher_tap: str = "last"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)

    def build(self, student, teacher, data) -> None:
        pair = [
            ("student", self.student_taps[0], student.features[self.student_taps[0]]),
            ("teacher", self.teacher_taps[0], teacher.features[self.teacher_taps[0]]),
        ]
        for side, name, features in pair:
            if features.dim() < 3:
                raise UserError(
                    f"loss ickd needs maps or tokens; the {side}'s '{name}' is a vector of shape "
                    f"{tuple(features.shape)}: choose another tap (loss.ickd.{side}_tap)"
                )
        channels, wanted = (as_map(features).shape[1] for _, _, features in pair)
        self.project = nn.Sequential(nn.Conv2d(channels, wanted, 1, bias=False), nn.BatchNorm2d(wanted))

    def forward(self, student, teacher, batch) -> Tensor:
        maps = as_map(student.features[self.student_taps[0]])
        return ickd(self.project(maps), as_map(teacher.features[self.teacher_taps[0]]))
