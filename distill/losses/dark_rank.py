"""Ranks of neighbours: Chen, Wang & Zhang, "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities
Transfer", AAAI 2018, §3 (hard version).

    S_ij = -α ‖x_i - x_j‖^β,   L = -mean_i Σ_k≤m [ S_s(i, π_k) - log Σ_l≥k exp S_s(i, π_l) ],   m = permute_len

π is the order of the m images that are nearest to image i in the teacher's embedding; L is the negative log-likelihood
of that order under the student's scores (Plackett–Luce). α = β = 3 and m = 4, as in the code of Park et al. (RKD,
CVPR 2019). The networks of both papers end in embeddings of length 1, which `normalize` makes of others; features that
came out of a ReLU are then all close to each other, so their scores differ by little, and by default it isn't done.
"""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from distill.losses.base import Loss
from distill.losses.relations import unit, vectors
from distill.schema.ranges import Count, Positive


def scores(embeddings: Tensor, alpha: float, beta: float) -> Tensor:
    """Embeddings (N, D) to S (N, N)."""
    return -alpha * (embeddings[None] - embeddings[:, None]).norm(dim=2).pow(beta)


def dark_rank(student: Tensor, teacher: Tensor, alpha: float, beta: float, permute_len: int) -> Tensor:
    """Scalar from embeddings (N, D_s) and (N, D_t), N ≥ 2; of fewer than `permute_len` other images, all are ranked."""
    own = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
    ranks = scores(teacher, alpha, beta).masked_fill(own, -torch.inf).sort(dim=1, descending=True, stable=True)[1]
    nearest = ranks[:, : min(permute_len, len(teacher) - 1)]
    ranked = scores(student, alpha, beta).gather(1, nearest)  # (N, m), in the teacher's order
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)
    return (remaining - ranked).sum(1).mean()


class HardDarkRank(Loss):
    """`dark_rank` of one tap of each network.

    Args:
        student_tap, teacher_tap: taps of any kind; their elements are one vector for each image.
        alpha, beta: α > 0, β ≥ 1.
        permute_len: m, how many neighbours are ranked.
        normalize: scale embeddings to length 1.

    Raises:
        UserError: a batch of 1.
    """

    def __init__(
        self,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        alpha: Positive = 3.0,
        beta: Annotated[float, Ge(1)] = 3.0,
        permute_len: Count = 4,
        normalize: bool = False,
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.normalize, self.options = normalize, (alpha, beta, permute_len)

    def forward(self, student, teacher, batch) -> Tensor:
        embeddings = vectors("dark_rank", student.features[self.student_taps[0]])
        targets = vectors("dark_rank", teacher.features[self.teacher_taps[0]])
        if self.normalize:
            embeddings, targets = unit(embeddings), unit(targets)
        return dark_rank(embeddings, targets, *self.options)
