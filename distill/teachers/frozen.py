"""A trained network that teaches."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.networks.fold import fold_batch_norm
from distill.networks.network import Network
from distill.networks.weights import content_hash
from distill.teachers.base import Teacher
from distill.teachers.committee import Committee
from distill.types import Batch, Outputs


class Frozen(Teacher):
    """A trained network that only answers: eval mode, no gradients, nothing of it in the checkpoint but its hash.

    The network is kept out of the module tree, so no optimizer, gradient hook, `train()` or checkpoint reaches
    it; it moves between devices and dtypes with its owner. Where it isn't looked into, a faster copy answers for it.

    Args:
        network: trained.
        precision: what it computes in, whatever the student does; see distill.training.precision.teaching.
        quicken: the faster copy of a plain net, images to logits: its batch norms folded, or in int8.
    """

    def __init__(
        self,
        network: "Network | Committee",
        precision: str = "32-true",
        quicken: Callable[[nn.Module], nn.Module] = fold_batch_norm,
    ):
        super().__init__()
        self._outside_the_tree = [network.eval().requires_grad_(False)]  # and the copy, when it is first asked
        self.precision, self.quicken = precision, quicken
        self.fingerprint = content_hash(network)

    @property
    def network(self) -> "Network | Committee":
        return self._outside_the_tree[0]

    def _apply(self, fn, recurse=True):
        for net in self._outside_the_tree:
            net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # no_grad, not inference_mode: an inference tensor saved for the backward of a loss fails
    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        if self.network.recording:
            return self._looked_into(batch.images)
        if len(self._outside_the_tree) == 1:
            with _autocast(batch.images, None):
                self._outside_the_tree.append(self._quick(batch.images))
        with _autocast(batch.images, self.precision):
            return Outputs(self._outside_the_tree[1](batch.images), self.network.tensors())

    def _looked_into(self, images: Tensor) -> Outputs:
        if self.precision == "int8":
            raise UserError(
                "teacher.precision=int8 answers with logits only, and a loss reads the teacher's features: choose "
                "another precision"
            )
        with _autocast(images, self.precision):
            return self.network(images)

    def _quick(self, images: Tensor) -> nn.Module:
        """The copy that answers without features; an unchanged one where the faster does not answer alike."""
        wanted = self.network(images).logits
        place = next(chain(self.network.parameters(), self.network.buffers()))
        plain = self.network.plain()
        quick = self.quicken(plain)
        quick, plain = (net.to(place).to(memory_format=torch.channels_last) for net in (quick, plain))
        came = quick(images)
        near = torch.allclose(came, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())
        return quick if near or self.precision == "int8" else plain

    def get_extra_state(self) -> str:
        return self.fingerprint

    def set_extra_state(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise UserError(
                f"this run was taught by another teacher (its content hash is {fingerprint[:12]}, the present "
                f"one's {self.fingerprint[:12]}): give the same teacher again or start a new run"
            )


def _autocast(images: Tensor, precision: str | None):
    """The mixed precision of that name, or none, whatever is on around it."""
    mixed = precision is not None and precision.endswith("-mixed")
    kind = images.device.type
    half = torch.float16 if precision == "16-mixed" and kind != "cpu" else torch.bfloat16  # as Lightning does
    return torch.autocast(kind, half, enabled=mixed)
