"""Relational knowledge: Park, Kim, Lu & Cho, "Relational Knowledge Distillation", CVPR 2019.

    distance (eq. 5–7):   ψ_D(i, j) = ‖t_i - t_j‖ / μ,  μ the mean distance in the batch
    angle (eq. 8–10):     ψ_A(i, j, k) = ⟨e_ij, e_kj⟩,  e_ij = (t_i - t_j) / ‖t_i - t_j‖
    L = w_D · mean l_δ(ψ_D(teacher), ψ_D(student)) + w_A · mean l_δ(ψ_A(teacher), ψ_A(student)),   l_δ Huber, δ = 1

As in the authors' code the means run over all pairs and triples, those of an image with itself included; μ over all
pairs of two images, equal ones included. w_D = 25, w_A = 50 under weight 1: the CIFAR-100 setting of Tian et al., ICLR
2020. Embeddings of any two widths. Memory grows with N³ and N²·D, so batches of a few hundred are the limit.
"""

from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.relations import unit, vectors
from distill.schema.ranges import NotNegative


def distances(differences: Tensor) -> Tensor:
    """Differences (N, N, D) to distances (N, N), whose mean over pairs of two images is 1."""
    lengths = differences.norm(dim=2)
    mean = lengths.sum() / (len(lengths) * (len(lengths) - 1))
    return lengths / mean.clamp(min=1e-12)


def angles(differences: Tensor) -> Tensor:
    """Differences (N, N, D) to the cosines (N, N, N) of the angles at each embedding."""
    directions = unit(differences, dim=2)
    return directions @ directions.transpose(1, 2)


def rkd(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """Scalar from embeddings (N, D_s) and (N, D_t); zero where they differ by rotation, shift and scale only."""
    student, teacher = (embeddings[None] - embeddings[:, None] for embeddings in (student, teacher))  # (N, N, D)
    total = distance_weight * F.smooth_l1_loss(distances(student), distances(teacher))
    return total + angle_weight * F.smooth_l1_loss(angles(student), angles(teacher))


class RKD(Loss):
    """`rkd` of one tap of each network.

    Args:
        student_tap, teacher_tap: taps of any kind; their elements are one vector for each image.
        distance_weight, angle_weight: w_D, w_A.

    Raises:
        UserError: a batch of 1.
    """

    def __init__(
        self,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        distance_weight: NotNegative = 25.0,
        angle_weight: NotNegative = 50.0,
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, student, teacher, batch) -> Tensor:
        embeddings = vectors("rkd", student.features[self.student_taps[0]])
        targets = vectors("rkd", teacher.features[self.teacher_taps[0]])
        return rkd(embeddings, targets, self.distance_weight, self.angle_weight)
