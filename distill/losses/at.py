"""Attention transfer: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, §3.1.

    Q = vec(Σ_c |A_c|^p),   L = Σ_j ‖ Q_s^j / ‖Q_s^j‖₂ - Q_t^j / ‖Q_t^j‖₂ ‖₂    (their eq. 2)

The paper takes the norm, without a square; the authors' released code averages the squared differences over positions
and batch instead, and so does this (weight 1000 = their β with that mean). p = 2 there; a larger one, such as the
paper's 4, looks at the strongest places alone. Where the two maps differ in size, both are brought to the smaller by
average pooling.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.project import as_map, to_same_space
from distill.losses.relations import unit
from distill.schema.ranges import TapPairs


def attention(features: Tensor, p: float) -> Tensor:
    """Maps (N, C, H, W) to unit vectors (N, H·W)."""
    powers = features.pow(2) if p == 2 else features.abs().pow(p)
    return unit(powers.mean(1).flatten(1))


def at(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Scalar from two lists of maps (N, C, H, W), equally long; the channels of a pair may differ."""
    total = student_maps[0].new_zeros(())
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = to_same_space(student, teacher)
        total = total + (attention(student, p) - attention(teacher, p)).pow(2).mean()
    return total


class AT(Loss):
    """`at` over pairs of stages.

    Args:
        taps: stages to compare, by the name both networks share; or {student tap: teacher tap}.
        p: the power of activations, at least 1.

    Raises:
        UserError: a tap is a vector, which has no attention over space.
    """

    def __init__(self, taps: TapPairs, p: Annotated[float, Ge(1)] = 2.0):
        super().__init__()
        self.p = p
        pairs = dict(taps) if hasattr(taps, "items") else {tap: tap for tap in taps}
        self.student_taps, self.teacher_taps = tuple(pairs), tuple(pairs.values())

    def build(self, student, teacher, data) -> None:
        for side, names, outputs in [
            ("student", self.student_taps, student),
            ("teacher", self.teacher_taps, teacher),
        ]:
            for name in names:
                if outputs.features[name].dim() < 3:
                    raise UserError(
                        f"loss at needs maps or tokens; the {side}'s '{name}' is a vector of "
                        f"shape {tuple(outputs.features[name].shape)}: choose other taps (loss.at.taps)"
                    )

    def forward(self, student, teacher, batch) -> Tensor:
        return at(
            [as_map(student.features[tap]) for tap in self.student_taps],
            [as_map(teacher.features[tap]) for tap in self.teacher_taps],
            self.p,
        )
