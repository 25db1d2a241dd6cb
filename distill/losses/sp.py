"""Similarity-preserving distillation: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.

    G̃ = Q·Qᵀ, Q (N, C·H·W) the batch's activations;   G[i, :] = G̃[i, :] / ‖G̃[i, :]‖₂     (eq. 1–3)
    L = ‖G_t - G_s‖²_F / N²,   summed over pairs of stages                                 (eq. 4)

The last stage and weight 3000: Tian et al., ICLR 2020, in a form that the authors verified (the paper: γ = 3000).
Rows are normalised, not columns or the whole. Channels and space of a pair may differ.
"""

from torch import Tensor

from distill.losses.base import Loss
from distill.losses.relations import unit, vectors
from distill.schema.ranges import TapPairs


def similarity(activations: Tensor) -> Tensor:
    """Activations (N, D) to the similarities (N, N) of the images, each row of length 1."""
    return unit(activations @ activations.T, dim=1)


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from activations (N, D_s) and (N, D_t)."""
    return (similarity(teacher) - similarity(student)).pow(2).mean()


class SP(Loss):
    """`sp` over pairs of stages.

    Args:
        taps: stages to compare, by the name both networks share; or {student tap: teacher tap}.

    Raises:
        UserError: a batch of 1.
    """

    def __init__(self, taps: TapPairs = ("last",)):
        super().__init__()
        pairs = dict(taps) if hasattr(taps, "items") else {tap: tap for tap in taps}
        self.student_taps, self.teacher_taps = tuple(pairs), tuple(pairs.values())

    def forward(self, student, teacher, batch) -> Tensor:
        return sum(
            sp(vectors("sp", student.features[ours]), vectors("sp", teacher.features[theirs]))
            for ours, theirs in zip(self.student_taps, self.teacher_taps, strict=True)
        )
