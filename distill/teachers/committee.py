"""Several networks that teach as one."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.schema.ranges import Positives
from distill.types import Outputs


class Committee(nn.Module):
    """Several networks as one: images to the weighted mean of their logits and the features of the first.

    Each member normalises the images for itself. Logits are averaged, not probabilities: softmax(mean(z) / T) is the
    normalised geometric mean of the members' softened predictions (Hinton et al. 2015, §1 names it beside the
    arithmetic one) at every temperature T, which a loss chooses later, and losses on raw logits keep their scale.

    Args:
        members: networks or plain nets, answering with equally many logits.
        weights: one a member, positive; None: all equal. They are divided by their sum.

    Raises:
        UserError: no members, weights that don't fit, members of different classes.
    """

    def __init__(self, members: Iterable[nn.Module], weights: Positives | None = None):
        super().__init__()
        self.members = nn.ModuleList(members)
        weights = [1.0] * len(self.members) if weights is None else list(weights)
        if not weights or len(weights) != len(self.members) or min(weights) <= 0:
            raise UserError(
                f"teacher.weights={weights}: expected one positive number for each of the {len(self.members)} members"
            )
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))

    def record(self, names: Iterable[str]) -> "Committee":
        self.members[0].record(names)
        return self

    @property
    def recording(self) -> bool:
        return self.members[0].recording

    def tensors(self) -> dict[str, Tensor]:
        return self.members[0].tensors()

    def forward(self, images: Tensor) -> Outputs:
        answers = [member(images) for member in self.members]
        shapes = [tuple(answer.logits.shape) for answer in answers]
        if len(set(shapes)) > 1:
            raise UserError(f"the members of teacher=ensemble answer with different shapes: {shapes}")
        return Outputs(self.mean([answer.logits for answer in answers]), answers[0].features)

    def mean(self, logits: Sequence[Tensor]) -> Tensor:
        return torch.einsum("m,mnk->nk", self.weights.to(logits[0].dtype), torch.stack(list(logits)))

    def plain(self) -> "PlainCommittee":
        """A copy without taps, in eval mode on the CPU: images in [0, 1] to logits."""
        return PlainCommittee([member.plain() for member in self.members], self.weights.tolist()).eval()


class PlainCommittee(Committee):
    """Images to the weighted mean of the members' logits."""

    def forward(self, images: Tensor) -> Tensor:
        return self.mean([member(images) for member in self.members])
