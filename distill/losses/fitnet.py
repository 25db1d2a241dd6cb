"""FitNet hints: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, §2.2, eq. 3.

    L = ½ ‖ u_h(x) - r(v_g(x)) ‖²,   u_h the teacher's hint, v_g the guided layer, r a learned regressor

As in the released code and every benchmark since (Tian et al., ICLR 2020: weight 100), the mean of the squared
differences stands for half their sum, and hint and labels train together instead of in two phases. As there, too, the
regressor is a convolution with batch norm, and a ReLU where the hint came out of one: without them that weight
diverges. Its shape is inferred from the two taps. Where they differ in size, resize="pool" brings both to the smaller
and the convolution is 1×1; resize="convolve" lets it change the size, as that benchmark's does:

    the student's twice the hint's    3×3 of stride 2
    half of the hint's                4×4 transposed, of stride 2
    otherwise larger by d px          (1 + d)×(1 + d) without padding (the same size: 1×1)
    otherwise smaller                 3×3, against the hint pooled (there refused)
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.project import Projector, as_map, to_same_space


def fitnet(projected: Tensor, hint: Tensor) -> Tensor:
    """Scalar: mean squared difference of two features of one shape."""
    return F.mse_loss(projected, hint)


class Resizer(nn.Module):
    """A learned convolution from one feature's channels and size to another's.

    Args:
        source, target: one dry run's features, of any kinds that `as_map` takes.
    """

    def __init__(self, source: Tensor, target: Tensor):
        super().__init__()
        (inner, *size), (outer, *wanted) = as_map(source).shape[1:], as_map(target).shape[1:]
        pairs = list(zip(size, wanted, strict=True))
        if all(own == 2 * other for own, other in pairs):
            self.convolution = nn.Conv2d(inner, outer, 3, stride=2, padding=1)
        elif all(2 * own == other for own, other in pairs):
            self.convolution = nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1)
        elif all(own >= other for own, other in pairs):
            self.convolution = nn.Conv2d(inner, outer, [1 + own - other for own, other in pairs])
        else:
            self.convolution = nn.Conv2d(inner, outer, 3, padding=1)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both as maps of one shape: `source` convolved, the larger one pooled where they still differ."""
        return to_same_space(self.convolution(as_map(source)), as_map(target))


KINDS = {"pool": Projector, "convolve": Resizer}


class FitNet(Loss):
    """`fitnet` between one tap of the student, projected, and one of the teacher.

    Args:
        student_tap, teacher_tap: names of taps, or module paths.
        resize: how taps of different sizes meet.

    Raises:
        UserError: an unknown way to resize.
    """

    def __init__(
        self,
        student_tap: str = "stage2",
        teacher_tap: str = "stage2",
        resize: Literal["pool", "convolve"] = "pool",
    ):
        super().__init__()
        if resize not in KINDS:
            raise UserError(f"loss.fitnet.resize={resize}: choose {' or '.join(KINDS)}")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.resize = resize

    def build(self, student, teacher, data) -> None:
        hint = teacher.features[self.teacher_taps[0]]
        self.project = KINDS[self.resize](student.features[self.student_taps[0]], hint)
        channels = self.project.convolution.out_channels
        self.scale = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU() if hint.min() >= 0 else nn.Identity())

    def forward(self, student, teacher, batch) -> Tensor:
        projected, hint = self.project(student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]])
        return fitnet(self.scale(projected), hint)
