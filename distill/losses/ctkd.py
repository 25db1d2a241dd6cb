"""Curriculum temperature: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023.

    L = T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)),   T = t_start + t_span · sigmoid(θ)

θ is one learned number (the paper's global version), whose gradient is multiplied by -λ: it makes the
distillation harder while the student makes it easier. λ grows with the epoch E by half a cosine,

    λ = ½ (1 - cos(π · min(E, E_λ) / E_λ))

As in the released code, E counts from 1, θ starts at 1 and T lies between t_start and t_start + t_span (1 and 21),
whatever the option's name there says. Defaults E_λ = 10 and weight 0.9 beside loss.ce.weight=0.1: their CIFAR-100
script. E is counted here in images seen, a checkpointed buffer, against the size of the training set.
"""

import math

import torch
from torch import Tensor, nn

from distill.losses.logits import LogitLoss, soft_kl
from distill.processes import numbered
from distill.schema.ranges import NotNegative, Positive


def reversal(epoch: float | Tensor, epochs: float) -> Tensor:
    """λ in [0, 1]."""
    return 0.5 * (1 - torch.cos(math.pi * torch.as_tensor(epoch / epochs).clamp(max=1)))


def reverse(value: Tensor, strength: float | Tensor) -> Tensor:
    """`value` itself, whose gradient is multiplied by -strength."""
    return (1 + strength) * value.detach() - strength * value


def ctkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    theta: Tensor,
    strength: float | Tensor,
    t_start: float,
    t_span: float,
) -> Tensor:
    """Scalar from logits (N, K) and θ (); zero where both logits are the same up to a constant per row."""
    temperature = t_start + t_span * torch.sigmoid(reverse(theta, strength))
    return soft_kl(student_logits, teacher_logits, temperature).mean()


class CTKD(LogitLoss):
    """`ctkd` of the two networks' logits.

    Args:
        t_start, t_span: T lies between t_start and t_start + t_span.
        epochs: E_λ, after which the gradient is fully reversed.
        standardize: of z-scored logits.
    """

    def __init__(
        self, t_start: Positive = 1.0, t_span: NotNegative = 20.0, epochs: Positive = 10.0, standardize: bool = False
    ):
        super().__init__(standardize)
        self.t_start, self.t_span, self.epochs = t_start, t_span, epochs
        self.theta = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # images, by this process

    def build(self, student, teacher, data) -> None:
        self.rows = len(data.train)

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        epoch = 1 + self.seen * numbered()[1] // self.rows
        if self.training:
            self.seen += len(student_logits)
        strength = reversal(epoch, self.epochs)
        return ctkd(student_logits, teacher_logits, self.theta, strength, self.t_start, self.t_span)
