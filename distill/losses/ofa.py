"""One for all: Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
NeurIPS 2023, §3.

    L(z) = - Σ_k [ (p_k + 1[k = y])^γ - 1[k = y] ] log q_k,   p = softmax(z_t / T), q = softmax(z / T),   batch mean
    total = L(z_s) + Σ_stages L(branch(s))

Every stage of the student gets a branch of its own that ends in logits, so that features of networks as different as
a convnet and a transformer never meet. γ raises the target class; as in the released code the other classes are
raised to γ too, this is a cross-entropy, not a KL (at student = teacher it is the entropy of the target, for γ = 1),
and all terms, the network's own logits included, have weight 1 with T = 1, γ = 1 (their runs use 1 to 1.5).

Branches as released: separable convolutions that halve the map down to the last stage's, or transformer blocks and the
class token. Departures: their width is the student's own (there: the larger of both networks), so that a teacher's
cached logits are enough, and patches are not merged beforehand.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.losses.stages import need_maps
from distill.schema.ranges import Positive, Taps


def ofa(logits: Tensor, teacher_logits: Tensor, labels: Tensor, exponent: float, temperature: float) -> Tensor:
    """Scalar from logits (N, K) and labels (N,)."""
    target = F.one_hot(labels, logits.shape[1])
    enhanced = (F.softmax(teacher_logits / temperature, 1) + target).pow(exponent) - target
    return -(enhanced * F.log_softmax(logits / temperature, 1)).sum(1).mean()


def _halving(channels: int, out_channels: int) -> nn.Sequential:
    """Two separable convolutions; the first has stride 2."""

    def separable(out: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        return [depthwise, nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(*separable(channels, 2), *separable(out_channels, 1))


class Mapped(nn.Sequential):
    """Maps (N, C, H, W) to logits: `halvings` times half the space, then pooled."""

    def __init__(self, channels: int, width: int, halvings: int, classes: int):
        widths = [channels * 2**step for step in range(halvings)] + [width]
        layers = [_halving(a, b) for a, b in pairwise(widths)]
        layers = layers or [nn.Conv2d(channels, width, 1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Tokens(nn.Module):
    """Tokens (N, T, D) to logits: transformer blocks, then the class token, or the mean where there is none."""

    def __init__(self, width: int, blocks: int, classes: int):
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        heads = math.gcd(4, width)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(blocks))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        extra = tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2
        tokens = self.blocks(tokens)
        return self.head(tokens[:, 0] if extra else tokens.mean(1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class OFA(Loss):
    """`ofa` of the student's logits and of a branch at each of its stages.

    Args:
        taps: the student's stages, from shallow to deep.
        exponent: γ.
        temperature: T.
    """

    def __init__(self, taps: Taps, exponent: Positive = 1.0, temperature: Positive = 1.0):
        super().__init__()
        self.student_taps = tuple(taps)
        self.exponent, self.temperature = exponent, temperature

    def build(self, student, teacher, data) -> None:
        need_maps("ofa", "student", self.student_taps, student)
        classes, stages = student.logits.shape[1], [student.features[tap] for tap in self.student_taps]
        self.branches = nn.ModuleList()
        for level, stage in enumerate(stages):
            after = len(stages) - 1 - level
            if stage.dim() == 3:
                self.branches.append(Tokens(stage.shape[2], max(after, 1), classes))
            else:
                self.branches.append(Mapped(stage.shape[1], stages[-1].shape[1], after, classes))
        self.branches.apply(_initialise)

    def forward(self, student, teacher, batch) -> Tensor:
        branched = [branch(student.features[tap]) for branch, tap in zip(self.branches, self.student_taps, strict=True)]
        everything = torch.stack([student.logits, *branched])
        terms = [ofa(logits, teacher.logits, batch.labels, self.exponent, self.temperature) for logits in everything]
        return sum(terms)
