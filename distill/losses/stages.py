"""What losses over stages share: their taps, the checks of those taps, and the layers between two stages."""

from collections.abc import Sequence

from torch import Tensor, nn

from distill.errors import UserError
from distill.losses.base import Loss
from distill.losses.project import as_map, to_same_space
from distill.schema.ranges import TapPairs
from distill.types import Outputs


class StageLoss(Loss):
    """A loss over pairs of taps; its class's name in small letters is the name of its config file.

    Args:
        taps: stages by the name both networks share; or {student tap: teacher tap}.
        student_part, teacher_part: what is read of a stage ("" its output, ":pre" that before its activation).
            A tap that names a part itself ("stage1:in") and "pooled" are taken as they are.

    Raises:
        UserError: fewer than `at_least` taps; a vector where maps or tokens are needed.
    """

    at_least = 1
    takes_vectors = False

    def __init__(self, taps: TapPairs, student_part: str = "", teacher_part: str = ""):
        super().__init__()
        pairs = dict(taps) if hasattr(taps, "items") else {tap: tap for tap in taps}
        if len(pairs) < self.at_least:
            raise UserError(
                f"loss {self.name} needs at least {self.at_least} stages, and loss.{self.name}.taps names "
                f"{len(pairs)}: {', '.join(pairs) or 'none'}"
            )
        self.student_taps = tuple(_part(tap, student_part) for tap in pairs)
        self.teacher_taps = tuple(_part(tap, teacher_part) for tap in pairs.values())
        self.pairs = list(zip(self.student_taps, self.teacher_taps, strict=True))

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def build(self, student: Outputs, teacher: Outputs, data) -> None:
        if not self.takes_vectors:
            need_maps(self.name, "student", self.student_taps, student)
            need_maps(self.name, "teacher", [tap for _, tap in self.pairs], teacher)

    def maps(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """The pairs as maps (N, C, H, W), each pair at the smaller space of its two."""
        return [to_same_space(as_map(student.features[s]), as_map(teacher.features[t])) for s, t in self.pairs]


def _part(tap: str, part: str) -> str:
    return tap if ":" in tap or tap == "pooled" else tap + part


def need_maps(loss: str, side: str, taps: Sequence[str], outputs: Outputs, option: str = "taps") -> None:
    """Raises UserError where one of the taps is a vector (N, D)."""
    for tap in taps:
        shape = tuple(outputs.features[tap].shape)
        if len(shape) < 3:
            raise UserError(
                f"loss {loss} needs maps or tokens; the {side}'s '{tap}' is a vector of shape {shape}: "
                f"choose another tap (loss.{loss}.{option})"
            )


def need_two(loss: str, features: Tensor) -> None:
    """Raises UserError where batch statistics over `features` (N, C, ...) would be those of one value."""
    if features.numel() == features.shape[1]:
        raise UserError(f"loss {loss} normalises over the batch and needs 2 images or more in it; this one has 1")


def as_vector(features: Tensor) -> Tensor:
    """Maps and tokens averaged over their positions to (N, C); vectors as they are."""
    return features if features.dim() == 2 else as_map(features).mean((2, 3))


def conv_norm(channels: int, out_channels: int, size: int = 1) -> nn.Sequential:
    """A convolution without bias, He-initialised, and its batch norm: the connector of Heo's AB and OFD."""
    convolution = nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def align(source: Tensor, target: Tensor) -> nn.Module:
    """A 1×1 convolution to the target's channels where they differ, else nothing."""
    same = source.shape[1] == target.shape[1]
    return nn.Identity() if same else nn.Conv2d(source.shape[1], target.shape[1], 1)


def doubling(terms: Sequence[Tensor]) -> Tensor:
    """Σ_i terms[i] / 2^(n-1-i): each stage counts half of the next."""
    return sum(term / 2 ** (len(terms) - 1 - level) for level, term in enumerate(terms))
