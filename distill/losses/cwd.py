"""Channel-wise distillation: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021,
§3.

    L = T² / C Σ_c KL(softmax_{h,w}(t_c / T) ‖ softmax_{h,w}(s_c / T)),   batch mean, summed over stages

Each channel's map becomes a distribution over space. Where the channels differ, a learned 1×1 convolution brings
the student's to the teacher's. T = 4 and weight 50: the paper's for feature maps (§4.1; on logit maps 3), found on
segmentation; the paper has no classification setting.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.stages import StageLoss, align
from distill.schema.ranges import Positive, TapPairs


def cwd(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], temperature: float) -> Tensor:
    """Scalar from two lists of maps of one shape (N, C, H, W); a constant per channel changes nothing."""
    total = student_maps[0].new_zeros(())
    for pair in zip(student_maps, teacher_maps, strict=True):
        student, teacher = (F.log_softmax(maps.flatten(2).flatten(0, 1) / temperature, 1) for maps in pair)  # (N·C, P)
        total = total + temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return total


class CWD(StageLoss):
    """`cwd` over pairs of stages, at the smaller space of the two.

    Args:
        taps: stages, or {student tap: teacher tap}.
        temperature: T > 0.
    """

    def __init__(self, taps: TapPairs, temperature: Positive = 4.0):
        super().__init__(taps)
        self.temperature = temperature

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        self.align = nn.ModuleList(align(*pair) for pair in self.maps(student, teacher))

    def forward(self, student, teacher, batch) -> Tensor:
        sources, targets = zip(*self.maps(student, teacher), strict=True)
        return cwd([align(maps) for align, maps in zip(self.align, sources, strict=True)], targets, self.temperature)
