"""Probabilistic transfer: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
ECCV 2018.

    K(a, b) = (cos(a, b) + 1) / 2 (their eq. 6),   p(i|j) = K(x_i, x_j) / Σ_k K(x_k, x_j) (eq. 3–4)
    L = Σ_j Σ_i p_t(i|j) log(p_t(i|j) / p_s(i|j)) (eq. 8)  +  ν · the same with the labels' p_y in place of p_t

As in the authors' code the mean over all N² entries stands for the sum, the diagonal is kept (the paper leaves it
out), and 1e-7 is added within the logarithm. Weight 30000: Tian et al., ICLR 2020. Embeddings may differ in width.
The supervised term, whose p_y is even over the images of one class and 0 elsewhere, is left out there (ν = 0); the
authors' code weighs it 0.001.
"""

from torch import Tensor

from distill.losses.base import Loss
from distill.losses.relations import unit, vectors
from distill.schema.ranges import NotNegative

EPSILON = 1e-7


def affinities(embeddings: Tensor) -> Tensor:
    """Embeddings (N, D) to probabilities (N, N), each row with sum 1."""
    kernel = (unit(embeddings) @ unit(embeddings).T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def divergence(student: Tensor, target: Tensor) -> Tensor:
    """Scalar from probabilities (N, N)."""
    return (target * ((target + EPSILON).log() - (student + EPSILON).log())).mean()


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from embeddings (N, D_s) and (N, D_t); zero where all cosines agree."""
    return divergence(affinities(student), affinities(teacher))


def supervised_pkt(student: Tensor, labels: Tensor) -> Tensor:
    """The supervised term, from embeddings (N, D) and labels (N,)."""
    same = (labels[:, None] == labels).to(student.dtype)
    return divergence(affinities(student), same / same.sum(1, keepdim=True))


class PKT(Loss):
    """`pkt` of one tap of each network.

    Args:
        student_tap, teacher_tap: taps of any kind; their elements are one vector for each image.
        supervised_weight: ν.

    Raises:
        UserError: a batch of 1.
    """

    def __init__(self, student_tap: str = "pooled", teacher_tap: str = "pooled", supervised_weight: NotNegative = 0.0):
        super().__init__()
        self.supervised_weight = supervised_weight
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)

    def forward(self, student, teacher, batch) -> Tensor:
        embeddings = vectors("pkt", student.features[self.student_taps[0]])
        total = pkt(embeddings, vectors("pkt", teacher.features[self.teacher_taps[0]]))
        if self.supervised_weight:
            total = total + self.supervised_weight * supervised_pkt(embeddings, batch.labels)
        return total
