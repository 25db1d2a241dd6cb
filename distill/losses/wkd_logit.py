"""Wasserstein distance of logits (WKD-L): Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for
Knowledge Distillation", NeurIPS 2024.

    L = -p_t(y) · log p_s(y) + γ · Σ_ij q_ij c_ij,   batch mean

q is the plan that moves p̂_s to p̂_t, the softmaxes at temperature T over all classes but the label y, at the least
cost Σ q c - λ · entropy(q), by 10 iterations of Sinkhorn's algorithm through which the gradient flows. The cost is

    c_ij = 1 - exp(-κ (1 - cos(w_i, w_j))),   w_i the row of class i in the teacher's classifier

the released code's option "fc"; its other option, a CKA between the classes' features, takes a pass over the training
set beforehand. The entropy keeps the distance above zero even between equal distributions.
Defaults T = 8, λ = 0.05, κ = 1, γ = 800, weight 1 beside loss.ce.weight=1: the released CIFAR-100 configuration, which
lets γ fall to zero by half a cosine from epoch 150 to 240.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.logits import LogitLoss, target_cross_entropy
from distill.losses.relations import unit
from distill.schema.ranges import Count, NotNegative, Positive


def class_cost(weight: Tensor, sharpness: float) -> Tensor:
    """c (K, K) from the rows of a classifier (K, D)."""
    rows = unit(weight)
    return (1 - torch.exp(-sharpness * (1 - rows @ rows.T))).clamp(min=0) + 1e-8


def sinkhorn(source: Tensor, target: Tensor, start: Tensor, cost: Tensor, entropy: float, iterations: int) -> Tensor:
    """Cost (N,) of moving each row of `source` to that of `target`, (N, K) each.

    Args:
        start: (N, K), the first scaling of the rows; a class that is zero in all three takes no part.
        cost: (K, K), shared by the rows, so that no (N, K, K) is ever made.
    """
    kernel = torch.exp(-cost / entropy)
    u = start
    for _ in range(iterations):
        v = target / (u @ kernel + 1e-8)
        u = source / (v @ kernel.T + 1e-8)
    return (u @ (kernel * cost) * v).sum(1)


def wkd_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    cost: Tensor,
    gamma: float,
    temperature: float,
    entropy: float,
    iterations: int,
) -> Tensor:
    """Scalar from logits (N, K), labels (N,) and the cost between classes (K, K)."""
    is_label = F.one_hot(labels, student_logits.shape[1]).bool()
    student, teacher = (
        (logits / temperature).masked_fill(is_label, -torch.inf).softmax(1)  # the label gets no mass
        for logits in (student_logits, teacher_logits)
    )
    start = (~is_label).to(student.dtype) / (student_logits.shape[1] - 1)
    distance = sinkhorn(student, teacher, start, cost, entropy, iterations)
    return (target_cross_entropy(student_logits, teacher_logits, labels) + gamma * distance).mean()


class WKDLogit(LogitLoss):
    """`wkd_logit` of the two networks' logits.

    Args:
        gamma: weight of the distance.
        temperature: T > 0.
        entropy, iterations: λ and the number of Sinkhorn's iterations.
        sharpness: κ.
        head: where the teacher's classifier keeps its weights, (K, D).
        standardize: of z-scored logits.

    Raises:
        UserError: the teacher's head is not a matrix with a row for each class.
    """

    def __init__(
        self,
        gamma: NotNegative = 800.0,
        temperature: Positive = 8.0,
        entropy: Positive = 0.05,
        iterations: Count = 10,
        sharpness: Positive = 1.0,
        head: str = "head:weight",
        standardize: bool = False,
    ):
        super().__init__(standardize)
        self.options = (gamma, temperature, entropy, iterations)
        self.sharpness, self.teacher_taps = sharpness, (head,)

    def build(self, student, teacher, data) -> None:
        weight, classes = teacher.features[self.teacher_taps[0]], teacher.logits.shape[1]
        if weight.dim() < 2 or len(weight) != classes:
            raise UserError(
                f"loss wkd_logit needs the teacher's '{self.teacher_taps[0]}' to have a row for each of {classes} "
                f"classes, not the shape {tuple(weight.shape)}: name the classifier's weights (loss.wkd_logit.head)"
            )
        self.register_buffer("cost", class_cost(weight.detach().float().flatten(1), self.sharpness), persistent=False)

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        return wkd_logit(student_logits, teacher_logits, batch.labels, self.cost, *self.options)
