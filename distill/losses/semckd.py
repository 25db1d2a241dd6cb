"""Semantic calibration: Chen et al., "Cross-Layer Distillation with Semantic Calibration", AAAI 2021, §3 (SemCKD).

    L = 1/(N·S) Σ_n Σ_i Σ_j w_nij · mean (r_ij(s_i)_n - t_j,n)²,   w_ni = softmax_j ⟨q(G(s_i))_n, k(G(t_j))_n⟩

over images n, the student's stages i (S of them) and the teacher's j: every stage of the student learns from all of the
teacher's, by attention. G(f) = f·fᵀ (N, N) are the images' similarities, f (N, C·H·W); q and k are learned networks of
two layers, one a stage, which read an image's row of them and end in length 1; r_ij brings the student's map to the
teacher's channels (1×1, 3×3, 1×1 convolutions), at the smaller space of the two. As in the authors' code q and k are a
quarter of the batch wide, r_ij twice the teacher's channels, and all stages take part. Their weight is 400, for stages
of 64 to 256 channels (32x4 → 8x4), beside a cross-entropy and KD of weight 1 each. The mean over channels makes a step
on a quarter of them four times as large: under a ResNet-20 400 diverges at once and 100, the default, does not.

A row of G has as many numbers as the batch images, so a smaller batch's are filled up with zeros (theirs has none).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.project import as_map, to_same_space
from distill.losses.relations import unit, vectors
from distill.losses.stages import StageLoss
from distill.schema.ranges import Count, TapPairs


def semckd(errors: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Scalar.

    Args:
        errors: (N, S, T), mean squared differences of each image between stages.
        queries, keys: (N, S, D) of the student's stages, (N, T, D) of the teacher's.
    """
    attention = (queries @ keys.transpose(1, 2)).softmax(2)  # (N, S, T)
    return (attention * errors).sum() / (errors.shape[0] * errors.shape[1])


class Embed(nn.Module):
    """The similarities (N, N) of a batch to embeddings (N, D) of length 1; N is at most `images`."""

    def __init__(self, images: int, width: int):
        super().__init__()
        self.images = images
        self.layers = nn.Sequential(nn.Linear(images, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, features: Tensor) -> Tensor:
        similarities = features @ features.T
        return unit(self.layers(F.pad(similarities, (0, self.images - len(features)))))


def regressor(channels: int, out_channels: int) -> nn.Sequential:
    """Maps (N, C, H, W) to maps (N, C', H, W)."""
    middle = 2 * out_channels
    return nn.Sequential(
        nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
        nn.Conv2d(middle, out_channels, 1, bias=False),
    )  # fmt: skip


class SemCKD(StageLoss):
    """`semckd` of all of the student's stages with all of the teacher's.

    Args:
        taps: stages of both; or {student tap: teacher tap}, whose pairs are not kept together.
        factor: the batch's images for each number of a query.

    Raises:
        UserError: a tap is a vector; a batch of one image, or of more than data.batch_size.
    """

    def __init__(self, taps: TapPairs, factor: Count = 4):
        super().__init__(taps)
        self.factor = factor

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        width = max(1, data.batch_size // self.factor)
        sources, targets = self._stages(student, teacher)
        self.queries = nn.ModuleList(Embed(data.batch_size, width) for _ in sources)
        self.keys = nn.ModuleList(Embed(data.batch_size, width) for _ in targets)
        self.regressors = nn.ModuleList(
            nn.ModuleList(regressor(source.shape[1], target.shape[1]) for target in targets) for source in sources
        )

    def _stages(self, student, teacher) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [as_map(student.features[tap]) for tap in self.student_taps],
            [as_map(teacher.features[tap]) for tap in self.teacher_taps],
        )

    def forward(self, student, teacher, batch) -> Tensor:
        sources, targets = self._stages(student, teacher)
        if len(sources[0]) > self.queries[0].images:
            raise UserError(
                f"loss semckd was built for batches of {self.queries[0].images} images or fewer, and this one has "
                f"{len(sources[0])}: raise data.batch_size"
            )
        queries, keys = (
            torch.stack([embed(vectors("semckd", stage)) for embed, stage in zip(embeds, stages, strict=True)], 1)
            for embeds, stages in ((self.queries, sources), (self.keys, targets))
        )
        rows = [
            torch.stack([_error(bring, source, target) for bring, target in zip(brings, targets, strict=True)], 1)
            for brings, source in zip(self.regressors, sources, strict=True)
        ]
        return semckd(torch.stack(rows, 1), queries, keys)


def _error(bring: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """(N,): mean squared difference of each image."""
    source, target = to_same_space(source, target)
    return (bring(source) - target).pow(2).mean((1, 2, 3))
