"""Neuron selectivity transfer: Huang & Wang, "Like What You Like: Knowledge Distill via Neuron
Selectivity Transfer", arXiv 2017, §4.

    L = Σ_stages MMD²(s, t),   MMD² = mean k(t_i, t_j) + mean k(s_i, s_j) - 2 mean k(s_i, t_j),   k(a, b) = (aᵀb)²

A channel is a sample: its activations over space, scaled to length 1. Both networks' channels are seen as two
sets, so their numbers may differ and their order does not matter. Weight 50 and all stages: the CIFAR-100 setting
of Tian et al., ICLR 2020, whose means over pairs of channels and batch this follows (the paper uses the last stage).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.losses.relations import unit
from distill.losses.stages import StageLoss


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Scalar: mean of (a_iᵀ b_j)² over channels (N, C_a, P), (N, C_b, P) and batch."""
    return torch.bmm(a, b.transpose(1, 2)).pow(2).mean()


def nst(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Scalar from two lists of maps (N, C, H, W); the channels of a pair may differ."""
    total = student_maps[0].new_zeros(())
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = (unit(maps.flatten(2), dim=2) for maps in (student, teacher))  # (N, C, H·W)
        total = total + kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)
    return total


class NST(StageLoss):
    """`nst` over pairs of stages, at the smaller space of the two.

    Args:
        taps: stages, or {student tap: teacher tap}.
    """

    def forward(self, student, teacher, batch) -> Tensor:
        return nst(*zip(*self.maps(student, teacher), strict=True))
