"""Class attention transfer: Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, §3.

    CAM_k = Σ_d W_{k,d} F_d,   L = mean (pool(CAM_s) - pool(CAM_t))²

A class activation map weighs the last map's channels by the classifier's row of that class (no bias); it is pooled to
a few pixels. The mean over classes, pixels and batch is the released code's. The paper also scales each map to
length 1; of the 11 released CIFAR-100 configurations the 5 across families do, and by default it isn't done here.
Weights there: 0.7 (ResNet-56 → 20, the default), 15 (32x4 → 8x4), each beside a cross-entropy of weight 1.
"""

from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.project import as_map
from distill.losses.relations import unit
from distill.losses.stages import need_maps
from distill.schema.ranges import Count


def class_maps(maps: Tensor, weight: Tensor) -> Tensor:
    """Maps (N, D, H, W) and the classifier's weight (K, D) to class activation maps (N, K, H, W)."""
    return F.conv2d(maps, weight.flatten(1)[:, :, None, None])


def cat_kd(student: Tensor, teacher: Tensor, resolution: int, normalize: bool) -> Tensor:
    """Scalar from class activation maps (N, K, H, W), (N, K, H', W')."""
    student, teacher = (F.adaptive_avg_pool2d(maps, resolution) for maps in (student, teacher))
    if normalize:
        student, teacher = (unit(maps, dim=(2, 3)) for maps in (student, teacher))
    return F.mse_loss(student, teacher)


class CATKD(Loss):
    """`cat_kd` of the two networks' last maps.

    Args:
        student_tap, teacher_tap: what is averaged for the classifier: the last stage ("stage4" where there are four;
            "pool:in" in a WRN, whose last activation comes after its stages).
        resolution: side of the pooled class maps, px.
        normalize: scale each class map to length 1, as the paper does.

    Raises:
        UserError: a vector, or a map that does not have the channels that the classifier reads.
    """

    def __init__(
        self, student_tap: str = "last", teacher_tap: str = "last", resolution: Count = 2, normalize: bool = False
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap, "head:weight"), (teacher_tap, "head:weight")
        self.resolution, self.normalize = resolution, normalize

    def build(self, student, teacher, data) -> None:
        sides = [("student", self.student_taps[0], student), ("teacher", self.teacher_taps[0], teacher)]
        for side, tap, outputs in sides:
            need_maps("cat_kd", side, [tap], outputs, f"{side}_tap")
            channels, reads = as_map(outputs.features[tap]).shape[1], outputs.features["head:weight"].shape[1]
            if channels != reads:
                raise UserError(
                    f"loss cat_kd needs the map before the {side}'s classifier, which reads {reads} channels; '{tap}' "
                    f"has {channels}: name the last stage (loss.cat_kd.{side}_tap=stage4)"
                )

    def forward(self, student, teacher, batch) -> Tensor:
        taps = [(student, self.student_taps[0]), (teacher, self.teacher_taps[0])]
        cams = [class_maps(as_map(out.features[tap]), out.features["head:weight"]) for out, tap in taps]
        return cat_kd(*cams, self.resolution, self.normalize)
