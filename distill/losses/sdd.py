"""Scale-decoupled distillation: Wei, Luo & Luo, "Scale Decoupled Distillation", CVPR 2024 (SD-KD).

    L = mean over cells of  w · T² KL(softmax(t / T) ‖ softmax(s / T)),   batch mean

The last stage's map is averaged over 1×1, 2×2 and 4×4 cells, and the classifier itself answers to each of the
M = 21 cells: logits s, t (N, M, K). w = 2 (complementary) where the teacher is right about the cell and wrong about
the image or the other way round, else w = 1 (consistent). As in the released code, the coarser cells are averages of
the finest; of its variants this is the one on KD, with that code's T = 4 and weight 0.9 beside loss.ce.weight=0.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.logit_standardization import standardize as z_scores
from distill.losses.logits import soft_kl
from distill.losses.project import as_map
from distill.schema.ranges import Counts, NotNegative, Positive


def cell_logits(maps: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> Tensor:
    """Logits (N, M, K) of a linear classifier, weight (K, C) and bias (K,), on the cells of maps (N, C, H, W)."""
    finest = F.adaptive_avg_pool2d(maps, max(scales))
    cells = torch.cat([F.adaptive_avg_pool2d(finest, scale).flatten(2) for scale in scales], dim=2)  # (N, C, M)
    return F.linear(cells.transpose(1, 2), weight, bias)


def sdd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, complementary: float
) -> Tensor:
    """Scalar from logits (N, M, K) of cells, of which the first is the whole image, and labels (N,)."""
    right = teacher_logits.argmax(2) == labels[:, None]  # (N, M)
    weight = torch.where(right == right[:, :1], 1.0, complementary)
    return (weight * soft_kl(student_logits, teacher_logits, temperature)).mean()


class SDD(Loss):
    """`sdd` of what both networks' classifiers answer to the cells of their last maps.

    Args:
        temperature: T > 0.
        complementary: w of the cells on which the teacher contradicts its answer to the image.
        scales: cells along a side, 1 first.
        student_tap, teacher_tap: the maps whose mean the classifier sees.
        standardize: of z-scored logits.

    Raises:
        UserError: a tap's mean under the classifier is not the network's answer.
    """

    def __init__(
        self,
        temperature: Positive = 4.0,
        complementary: NotNegative = 2.0,
        scales: Counts = (1, 2, 4),
        student_tap: str = "last",
        teacher_tap: str = "last",
        standardize: bool = False,
    ):
        super().__init__()
        self.temperature, self.complementary, self.scales = temperature, complementary, tuple(scales)
        self.student_taps = (student_tap, "head:weight", "head:bias")
        self.teacher_taps = (teacher_tap, "head:weight", "head:bias")
        self.standardize = standardize

    def build(self, student, teacher, data) -> None:
        for side, outputs, taps in (("student", student, self.student_taps), ("teacher", teacher, self.teacher_taps)):
            maps = outputs.features[taps[0]]
            if maps.dim() > 2 and as_map(maps).shape[1] == outputs.features["head:weight"].shape[1]:
                whole = self._cells(outputs, taps, scales=(1,))[:, 0]
                if (whole - outputs.logits).abs().max() <= 0.05 * outputs.logits.abs().max():
                    continue
            raise UserError(
                f"loss sdd needs maps whose mean the {side}'s classifier sees; '{taps[0]}' of shape "
                f"{tuple(maps.shape)} is not that: name the last stage, if the network has such a classifier "
                f"(loss.sdd.{side}_tap)"
            )

    def _cells(self, outputs, taps: Sequence[str], scales: Sequence[int]) -> Tensor:
        maps, weight, bias = (outputs.features[tap] for tap in taps)
        return cell_logits(as_map(maps), weight.flatten(1), bias, scales)

    def forward(self, student, teacher, batch) -> Tensor:
        student_logits = self._cells(student, self.student_taps, self.scales)
        teacher_logits = self._cells(teacher, self.teacher_taps, self.scales)
        if self.standardize:
            student_logits, teacher_logits = z_scores(student_logits), z_scores(teacher_logits)
        return sdd(student_logits, teacher_logits, batch.labels, self.temperature, self.complementary)
