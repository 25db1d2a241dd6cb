"""Factor transfer: Kim, Park & Kwak, "Paraphrasing Complex Network", NeurIPS 2018, §3.

    L = mean | f_s / ‖f_s‖₂ - f_t / ‖f_t‖₂ |  +  ρ · mean | t - decode(f_t) |,   f_t = encode(t), f_s = translate(s)

The paraphraser (encode, decode) condenses the teacher's map into factors, the translator makes them of the student's
map; norms are taken over an image's whole factor. As in the released code, the mean absolute difference stands for
both norms, the factors have half of the teacher's channels (k = 0.5), and the weight is β = 500 (CIFAR-10, last stage).

Departure: the paper trains the paraphraser first and then freezes it. Here it learns in the same run by its own
reconstruction, the second term, whose ρ = 1/500 undoes the weight; the student's term sees its factors detached. A
weight that stays zero for some epochs would stop both, so no schedule is needed. A widely copied "FT" that compares
attention maps has no factors and is not this method.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.relations import unit
from distill.losses.stages import StageLoss
from distill.schema.ranges import NotNegative, Positive, TapPairs


def ft(student_factors: Tensor, teacher_factors: Tensor) -> Tensor:
    """Scalar from factors of one shape (N, C, H, W); the scale of each image's factors changes nothing."""
    student, teacher = (unit(factors.flatten(1)) for factors in (student_factors, teacher_factors))
    return F.l1_loss(student, teacher)


def _layers(kind: type, widths: Sequence[int]) -> nn.Sequential:
    pairs = pairwise(widths)
    return nn.Sequential(*(layer for a, b in pairs for layer in (kind(a, b, 3, padding=1), nn.LeakyReLU(0.1))))


class FT(StageLoss):
    """`ft` of the last stages, with the paraphraser's reconstruction.

    Args:
        taps: stages, or {student tap: teacher tap}.
        rate: k, channels of the factors as a share of the teacher's.
        reconstruction: ρ.
    """

    def __init__(self, taps: TapPairs, rate: Positive = 0.5, reconstruction: NotNegative = 0.002):
        super().__init__(taps)
        self.rate, self.reconstruction = rate, reconstruction

    def build(self, student, teacher, data) -> None:
        super().build(student, teacher, data)
        self.encode, self.decode, self.translate = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for source, target in self.maps(student, teacher):
            own, wide = source.shape[1], target.shape[1]
            factors = max(1, round(wide * self.rate))
            self.encode.append(_layers(nn.Conv2d, [wide, wide, factors, factors]))
            self.decode.append(_layers(nn.ConvTranspose2d, [factors, factors, wide, wide]))
            self.translate.append(_layers(nn.Conv2d, [own, own, factors, factors]))

    def forward(self, student, teacher, batch) -> Tensor:
        total = student.logits.new_zeros(())
        layers = zip(self.encode, self.decode, self.translate, strict=True)
        for (encode, decode, translate), (source, target) in zip(layers, self.maps(student, teacher), strict=True):
            factors = encode(target)
            total = total + ft(translate(source), factors.detach())
            total = total + self.reconstruction * F.l1_loss(decode(factors), target)
        return total
