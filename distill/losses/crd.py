"""Contrastive distillation: Tian, Krishnan & Isola, "Contrastive Representation Distillation", ICLR 2020, eq. 17–18.

    h(t, s) = P / (P + M/n),   P = exp(⟨g_t(t), g_s(s)⟩ / τ) / Z
    L_S = -mean over images of [ log h(t_i, s_i) + Σ_j≤M log(1 - h(t_j, s_i)) ],   L = L_S + L_T (the roles exchanged)

g_s and g_t are linear layers to `feature_dim` and length 1. The M negatives' embeddings come from two memory banks
(n, feature_dim), one a network, by row of the training set; after each batch its rows move to
m·old + (1 - m)·new, scaled to length 1. As in the authors' code, Z = n · mean exp(⟨·,·⟩ / τ) of the first batch and
stays; negatives are images of other classes; the positive is the image itself (mode "exact") or any image of its
class ("relax"); their 1e-7 in the denominators is left out, and negatives may repeat (theirs don't where a class has
M others). M = 16384, τ = 0.07, m = 0.5, weight 0.8: their CIFAR-100 script. Each image is compared with the whole
bank (N, n) and M of those scores are taken, which is smaller than M embeddings for each of N images.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.relations import unit
from distill.processes import gather, numbered
from distill.schema.ranges import BelowOne, Count, Positive, Seed


def crd(scores: Tensor, log_z: Tensor, rows: int) -> Tensor:
    """L_S or L_T as a scalar.

    Args:
        scores: (N, 1 + M) cosines over τ, the positive first.
        log_z: (), log Z.
        rows: n, of the training set.
    """
    odds = scores - log_z - math.log((scores.shape[1] - 1) / rows)  # log (P / (M/n)), so that h = sigmoid(odds)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(1)).mean()


def first_log_z(scores: Tensor, rows: int) -> Tensor:
    """log (n · mean exp(scores)) of one batch, the mean over all processes."""
    return (gather(scores.exp().mean()[None]).mean() * rows).log()


class CRD(Loss):
    """`crd` in both directions, with its memory banks.

    Args:
        student_tap, teacher_tap: taps of any kind; their elements are one vector for each image.
        feature_dim: of the embeddings.
        negatives: M.
        temperature: τ > 0.
        momentum: m in [0, 1).
        mode: the positive of an image: "exact", itself, or "relax", any of its class.
        seed: of the negatives, which depend on it, on the process and on the number of batches so far.

    Raises:
        UserError: an unknown mode, data without row numbers, fewer than two classes.
    """

    def __init__(
        self,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        feature_dim: Count = 128,
        negatives: Count = 16384,
        temperature: Positive = 0.07,
        momentum: BelowOne = 0.5,
        mode: Literal["exact", "relax"] = "exact",
        seed: Seed = 0,
    ):
        super().__init__()
        if mode not in ("exact", "relax"):
            raise UserError(f"loss.crd.mode={mode}: choose exact or relax")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.feature_dim, self.negatives, self.temperature = feature_dim, negatives, temperature
        self.momentum, self.mode, self.seed = momentum, mode, seed

    def build(self, student, teacher, data) -> None:
        labels = data.train.labels
        counts = labels.bincount(minlength=data.num_classes)
        if (counts > 0).sum() < 2:
            raise UserError("loss crd contrasts images of different classes; the training images are all of one class")
        widths = (
            student.features[self.student_taps[0]].flatten(1).shape[1],
            teacher.features[self.teacher_taps[0]].flatten(1).shape[1],
        )
        self.embed_student, self.embed_teacher = (nn.Linear(width, self.feature_dim) for width in widths)
        bound = (3 / self.feature_dim) ** 0.5
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(len(labels), self.feature_dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))  # of L_S and L_T, set by the first batch
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        # the training rows class by class: class c's are by_class[starts[c] : starts[c] + counts[c]]
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def forward(self, student, teacher, batch) -> Tensor:
        if (batch.index < 0).any():
            raise UserError(
                "loss crd keeps an embedding of every training image and needs to know which is which; "
                "this data gives no row numbers (batch.index is -1)"
            )
        ours = unit(self.embed_student(student.features[self.student_taps[0]].flatten(1)))  # (N, feature_dim)
        theirs = unit(self.embed_teacher(teacher.features[self.teacher_taps[0]].flatten(1)))
        index = batch.index.to(batch.labels.device)
        rows = self.draw(index, batch.labels)
        # clones, because the banks are written below, before backward reads them
        scores = [
            (anchors @ bank.clone().T / self.temperature).gather(1, rows)
            for anchors, bank in ((ours, self.teacher_bank), (theirs, self.student_bank))
        ]
        size = len(self.by_class)
        if self.batches == 0:
            self.log_z.copy_(torch.stack([first_log_z(each, size) for each in scores]))
        self.batches += 1
        self.remember(index, ours, theirs)
        return sum(crd(each, log_z, size) for each, log_z in zip(scores, self.log_z, strict=True))

    @torch.no_grad()
    def draw(self, index: Tensor, labels: Tensor) -> Tensor:
        """Rows of the training set (N, 1 + M): the positive, then M of other classes, uniformly."""
        generator = torch.Generator(index.device)
        generator.manual_seed(((self.seed * 1_000_003 + numbered()[0]) * 1_000_000_007 + int(self.batches)) % 2**63)
        uniform = torch.rand(
            len(index), 1 + self.negatives, generator=generator, device=index.device, dtype=torch.float64
        )
        counts, starts = self.counts[labels, None], self.starts[labels, None]  # (N, 1)
        others = (uniform[:, 1:] * (len(self.by_class) - counts)).long()
        others += counts * (others >= starts)  # skip the image's own class
        positives = index[:, None]
        if self.mode == "relax":
            positives = self.by_class[starts + (uniform[:, :1] * counts).long()]
        return torch.cat([positives, self.by_class[others]], 1)

    @torch.no_grad()
    def remember(self, index: Tensor, ours: Tensor, theirs: Tensor) -> None:
        """Write the embeddings of all processes into the banks, which so stay the same in each."""
        rows = gather(index)
        for bank, embeddings in ((self.student_bank, ours), (self.teacher_bank, theirs)):
            bank[rows] = unit(self.momentum * bank[rows] + (1 - self.momentum) * gather(embeddings))
