"""Probabilistic transfer: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
ECCV 2018.

    K(a, b) = (cos(a, b) + 1) / 2 (their eq. 6),   p(i|j) = K(x_i, x_j) / Σ_k K(x_k, x_j) (eq. 3–4)
    L = Σ_j Σ_i p_t(i|j) log(p_t(i|j) / p_s(i|j)) (eq. 8)

As in the authors' code the mean over all N² entries stands for the sum, the diagonal is kept (the paper leaves it
out), and 1e-7 is added within the logarithm. Weight 30000: Tian et al., ICLR 2020. Embeddings may differ in width.
"""

from torch import Tensor

from distill.losses.base import Loss
from distill.losses.relations import unit, vectors

EPSILON = 1e-7


def affinities(embeddings: Tensor) -> Tensor:
    """Embeddings (N, D) to probabilities (N, N), each row with sum 1."""
    kernel = (unit(embeddings) @ unit(embeddings).T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from embeddings (N, D_s) and (N, D_t); zero where all cosines agree."""
    student, teacher = affinities(student), affinities(teacher)
    return (teacher * ((teacher + EPSILON).log() - (student + EPSILON).log())).mean()


class PKT(Loss):
    """`pkt` of one tap of each network.

    Args:
        student_tap, teacher_tap: taps of any kind; their elements are one vector for each image.

    Raises:
        UserError: a batch of 1.
    """

    def __init__(self, student_tap: str = "pooled", teacher_tap: str = "pooled"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)

    def forward(self, student, teacher, batch) -> Tensor:
        embeddings = vectors("pkt", student.features[self.student_taps[0]])
        return pkt(embeddings, vectors("pkt", teacher.features[self.teacher_taps[0]]))
