"""Scale-decoupled distillation: Wei, Luo & Luo, "Scale Decoupled Distillation", CVPR 2024.

    L = mean over cells of  w · D(t, s),   batch mean

    SD-KD   D = T² KL(softmax(t / T) ‖ softmax(s / T))
    SD-DKD  D = T² (α KL(b_t ‖ b_s) + β KL(p̂_t ‖ p̂_s)), see dkd.py
    SD-NKD  D = -p_t(y) log p_s(y) - γ T² Σ_{k≠y} p̂_t(k) log p̂_s(k), see nkd.py

The last stage's map is averaged over 1×1, 2×2 and 4×4 cells, and the classifier itself answers to each of the
M = 21 cells: logits s, t (N, M, K). w = 2 (complementary) where the teacher is right about the cell and wrong about
the image or the other way round, else w = 1 (consistent). As in the released code, the coarser cells are averages of
the finest, and T = 4; SD-KD has weight 0.9 beside loss.ce.weight=0.1, the others 1 beside 1 and a warm-up; the scales
are [1, 2] for 32x4 → 8x4 and VGG-13 → 8. Its SD-NKD keeps the label among the other classes, which NKD's authors call
a mistake; here it is left out.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.logit_standardization import standardize as z_scores
from distill.losses.logits import decoupled_kl, normalised_cross_entropy, soft_kl
from distill.losses.project import as_map
from distill.schema.ranges import Counts, NotNegative, Positive

FORMS = ("kd", "dkd", "nkd")


def cell_logits(maps: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> Tensor:
    """Logits (N, M, K) of a linear classifier, weight (K, C) and bias (K,), on the cells of maps (N, C, H, W)."""
    finest = F.adaptive_avg_pool2d(maps, max(scales))
    cells = torch.cat([F.adaptive_avg_pool2d(finest, scale).flatten(2) for scale in scales], dim=2)  # (N, C, M)
    return F.linear(cells.transpose(1, 2), weight, bias)


def sdd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    complementary: float,
    form: str = "kd",
    alpha: float = 1.0,
    beta: float = 8.0,
    gamma: float = 8.0,
) -> Tensor:
    """Scalar from logits (N, M, K) of cells, of which the first is the whole image, and labels (N,)."""
    right = teacher_logits.argmax(2) == labels[:, None]  # (N, M)
    weight = torch.where(right == right[:, :1], 1.0, complementary)
    student, teacher = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)  # (N·M, K)
    labels = labels.repeat_interleave(right.shape[1])
    if form == "dkd":
        scaled = student / temperature, teacher / temperature
        differences = temperature**2 * decoupled_kl(*scaled, labels, alpha, beta)
    elif form == "nkd":
        differences = normalised_cross_entropy(student, teacher, labels, gamma, temperature)
    else:
        differences = soft_kl(student, teacher, temperature)
    return (weight * differences.view_as(weight)).mean()


class SDD(Loss):
    """`sdd` of what both networks' classifiers answer to the cells of their last maps.

    Args:
        temperature: T > 0.
        complementary: w of the cells on which the teacher contradicts its answer to the image.
        scales: cells along a side, 1 first.
        form: D, "kd", "dkd" or "nkd".
        alpha, beta: of "dkd": weights of the label's part and of the other classes' part.
        gamma: of "nkd": weight of the part on the other classes.
        student_tap, teacher_tap: the maps whose mean the classifier sees.
        standardize: of z-scored logits.

    Raises:
        UserError: an unknown form; a tap's mean under the classifier is not the network's answer.
    """

    def __init__(
        self,
        temperature: Positive = 4.0,
        complementary: NotNegative = 2.0,
        scales: Counts = (1, 2, 4),
        student_tap: str = "last",
        teacher_tap: str = "last",
        standardize: bool = False,
        form: Literal["kd", "dkd", "nkd"] = "kd",
        alpha: NotNegative = 1.0,
        beta: NotNegative = 8.0,
        gamma: NotNegative = 8.0,
    ):
        super().__init__()
        self.scales = tuple(scales)
        if form not in FORMS:
            raise UserError(f"loss.sdd.form={form}: choose {', '.join(FORMS)}")
        self.options = (temperature, complementary, form, alpha, beta, gamma)
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
        return sdd(student_logits, teacher_logits, batch.labels, *self.options)
