"""DIST+ on features: Huang et al., "DIST+: Knowledge Distillation from A Stronger Adaptive Teacher", TPAMI 2025.

    L = DIST + ι · (1 - mean_{n,h,w} ρ(s[n,:,h,w], t[n,:,h,w])) + κ · (1 - mean_{h,w} ρ(a_s[:,h,w], a_t[:,h,w]))

DIST of the logits (dist.py) and the same idea for the last map: ρ is Pearson's correlation, over the channels of each
pixel (channel relation) and, of the maps summed over channels a = Σ_c, over the images of the batch at each pixel
(spatial relation). A widely used implementation leaves out the first "1 -", so that minimising it drives the channels
apart; this follows the formula. Where the channels differ a learned 1×1 convolution brings the student's to the
teacher's. ι = κ = 1: that implementation's; β, γ and τ are DIST's for CIFAR-100. The paper's other part, a teacher that
is tuned to the student, is a run of its own.
"""

from torch import Tensor

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.dist import dist
from distill.losses.project import as_map, to_same_space
from distill.losses.relations import correlation
from distill.losses.stages import align, need_maps
from distill.schema.ranges import NotNegative, Positive


def channel_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from maps (N, C, H, W): zero where every pixel's channels correlate."""
    pixels = (maps.movedim(1, -1).flatten(0, 2) for maps in (student, teacher))  # (N·H·W, C)
    return 1 - correlation(*pixels).mean()


def spatial_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar from maps (N, C, H, W), N ≥ 2: zero where the images' sums over channels correlate at every pixel."""
    sums = (maps.sum(1).flatten(1).T for maps in (student, teacher))  # (H·W, N)
    return 1 - correlation(*sums).mean()


def dist_plus(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_map: Tensor,
    teacher_map: Tensor,
    beta: float,
    gamma: float,
    iota: float,
    kappa: float,
    temperature: float,
) -> Tensor:
    """Scalar from logits (N, K) and maps (N, C, H, W), N ≥ 2; zero where all correlate."""
    logits = dist(student_logits, teacher_logits, beta, gamma, temperature)
    features = student_map, teacher_map
    return logits + iota * channel_relation(*features) + kappa * spatial_relation(*features)


class DISTPlus(Loss):
    """`dist_plus` of the logits and one tap of each network.

    Args:
        student_tap, teacher_tap: maps or tokens; the smaller space of the two is taken.
        beta, gamma: weights of the logits' relation between classes, and of that within a class.
        iota, kappa: weights of the features' channel relation and of their spatial relation.
        temperature: τ > 0, of the logits.

    Raises:
        UserError: a tap is a vector; a batch of one image, in which a class has no correlation.
    """

    def __init__(
        self,
        student_tap: str = "last",
        teacher_tap: str = "last",
        beta: NotNegative = 2.0,
        gamma: NotNegative = 2.0,
        iota: NotNegative = 1.0,
        kappa: NotNegative = 1.0,
        temperature: Positive = 4.0,
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.options = beta, gamma, iota, kappa, temperature

    def build(self, student, teacher, data) -> None:
        need_maps("dist_plus", "student", self.student_taps, student, "student_tap")
        need_maps("dist_plus", "teacher", self.teacher_taps, teacher, "teacher_tap")
        self.align = align(*self._maps(student, teacher))

    def _maps(self, student, teacher) -> tuple[Tensor, Tensor]:
        taps = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        return to_same_space(*map(as_map, taps))

    def forward(self, student, teacher, batch) -> Tensor:
        if len(student.logits) < 2:
            raise UserError("loss dist_plus needs at least 2 images in a batch, this one has 1: raise data.batch_size")
        source, target = self._maps(student, teacher)
        return dist_plus(student.logits, teacher.logits, self.align(source), target, *self.options)
