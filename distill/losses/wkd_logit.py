"""Wasserstein distance of logits (WKD-L): Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for
Knowledge Distillation", NeurIPS 2024.

    L = -p_t(y) · log p_s(y) + γ · Σ_ij q_ij c_ij,   batch mean

q is the plan that moves p̂_s to p̂_t, the softmaxes at temperature T over all classes but the label y, at the least
cost Σ q c - λ · entropy(q), by 10 iterations of Sinkhorn's algorithm through which the gradient flows. The cost is

    c_ij = 1 - exp(-κ (1 - cos(w_i, w_j))),   w_i the row of class i in the teacher's classifier

(cost=fc), or, in all of the released CIFAR-100 configurations, 1 - CKA in place of 1 - cos (cost=cka): the linear
centred kernel alignment (Kornblith et al., ICML 2019) of the teacher's features X_i (n, D) of two classes' images,

    CKA = ‖X_iᵀ X_j‖²_F / (‖X_iᵀ X_i‖_F ‖X_jᵀ X_j‖_F),   columns centred,

whose rows are the pixels of the last map. It is found in a pass over `samples` images of each class before training
(theirs: over all 500). The entropy keeps the distance above zero even between equal distributions.
Defaults T = 8, λ = 0.05, κ = 1, γ = 600, weight 1 beside loss.ce.weight=1: the released configuration of 32x4 → 8x4
(γ = 800 until December 2024; WRN-40-2 → ShuffleNetV1: 200 and T = 6), which lets γ alone fall to zero, by half a cosine
from epoch 150 to 240: gamma=[[150,600],[240,0,cosine]].
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.logits import LogitLoss, target_cross_entropy
from distill.losses.project import as_map
from distill.losses.relations import unit
from distill.losses.weight import check_weight, weight_at
from distill.schema.ranges import Count, Positive, Schedule


def sharpened(similarity: Tensor, sharpness: float) -> Tensor:
    """c (K, K) from the similarities of the classes, 1 for the same."""
    return (1 - torch.exp(-sharpness * (1 - similarity))).clamp(min=0) + 1e-8


def class_cost(weight: Tensor, sharpness: float) -> Tensor:
    """c (K, K) from the rows of a classifier (K, D)."""
    rows = unit(weight)
    return sharpened(rows @ rows.T, sharpness)


def cka(features: Tensor) -> Tensor:
    """Linear CKA (K, K) of the classes' features (K, n, D)."""
    centred = features - features.mean(1, keepdim=True)
    # a class at a time: (K, D, D) of products, not (K, K, D, D)
    shared = torch.stack([(rows.T @ centred).pow(2).sum((1, 2)) for rows in centred])
    own = shared.diagonal().clamp(min=1e-24).sqrt()
    return shared / (own[:, None] * own)


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
        gamma: weight of the distance; a number or, over the epochs, points as a loss's weight has them.
        temperature: T > 0.
        entropy, iterations: λ and the number of Sinkhorn's iterations.
        sharpness: κ.
        head: where the teacher's classifier keeps its weights, (K, D); of cost=fc.
        standardize: of z-scored logits.
        cost: "fc", between rows of the teacher's classifier, or "cka", between its features of two classes.
        cost_tap, samples: of cost=cka: the features, and from how many training images of each class.

    Raises:
        UserError: an unknown cost; the teacher's head is not a matrix with a row for each class; a class with a single
            image, or none, has no CKA.
    """

    def __init__(
        self,
        gamma: Schedule = 600.0,
        temperature: Positive = 8.0,
        entropy: Positive = 0.05,
        iterations: Count = 10,
        sharpness: Positive = 1.0,
        head: str = "head:weight",
        standardize: bool = False,
        cost: Literal["fc", "cka"] = "fc",
        cost_tap: str = "last",
        samples: Count = 50,
    ):
        super().__init__(standardize)
        if cost not in ("fc", "cka"):
            raise UserError(f"loss.wkd_logit.cost={cost}: choose fc or cka")
        check_weight("wkd_logit", gamma, "gamma")
        self.gamma, self.options = gamma, (temperature, entropy, iterations)
        self.sharpness, self.samples = sharpness, samples
        self.teacher_taps, self.survey_taps = ((head,), ()) if cost == "fc" else ((), (cost_tap,))

    def build(self, student, teacher, data) -> None:
        if self.survey_taps:
            return
        weight, classes = teacher.features[self.teacher_taps[0]], teacher.logits.shape[1]
        if weight.dim() < 2 or len(weight) != classes:
            raise UserError(
                f"loss wkd_logit needs the teacher's '{self.teacher_taps[0]}' to have a row for each of {classes} "
                f"classes, not the shape {tuple(weight.shape)}: name the classifier's weights (loss.wkd_logit.head)"
            )
        self.register_buffer("cost", class_cost(weight.detach().float().flatten(1), self.sharpness), persistent=False)

    def survey(self, teacher, data) -> None:
        counts = data.train.labels.bincount(minlength=data.num_classes)
        count = min(self.samples, int(counts.min()))
        if count < 2:
            raise UserError(
                "loss wkd_logit with cost=cka needs 2 training images or more of each class, and "
                f"{data.classes[int(counts.argmin())]} has {int(counts.min())}: loss.wkd_logit.cost=fc"
            )
        split = replace(data.train, transform=data.val.transform, training=False)  # as they are in validation
        rows = torch.cat([(data.train.labels == label).nonzero()[:count, 0] for label in range(data.num_classes)])
        batches = (split[part, 0] for part in rows.split(data.batch_size))
        tap = self.survey_taps[0]
        maps = torch.cat([as_map(teacher(batch).features[tap]).float() for batch in batches])  # (K·count, D, H, W)
        features = maps.flatten(2).transpose(1, 2).reshape(data.num_classes, -1, maps.shape[1])
        self.register_buffer("cost", sharpened(cka(features), self.sharpness), persistent=False)

    def compare(self, student_logits, teacher_logits, batch) -> Tensor:
        gamma = weight_at(self.gamma, self.epoch)
        return wkd_logit(student_logits, teacher_logits, batch.labels, self.cost, gamma, *self.options)
