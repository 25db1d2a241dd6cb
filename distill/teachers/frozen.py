"""A trained network that teaches."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.networks.fold import fold_batch_norm
from distill.networks.network import Network
from distill.networks.weights import content_hash
from distill.progress import say
from distill.teachers.base import Teacher
from distill.teachers.committee import Committee
from distill.types import Batch, Outputs


@dataclass
class Outside:
    """What torch does not see as a part of the module that holds it."""

    network: "Network | Committee"
    quick: nn.Module | None = None  # images to logits, what answers where no features are read; None: not made yet


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
        self.outside = Outside(network.eval().requires_grad_(False))
        self.precision, self.quicken = precision, quicken
        self.fingerprint = content_hash(network)

    @property
    def network(self) -> "Network | Committee":
        return self.outside.network

    def _apply(self, fn, recurse=True):
        for net in filter(None, (self.outside.network, self.outside.quick)):
            net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # no_grad, not inference_mode: an inference tensor saved for the backward of a loss fails
    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        if self.network.recording:
            return self._looked_into(batch.images)
        if self.outside.quick is None:
            self.prepare(batch.images)
        with _autocast(batch.images, self.precision):
            return Outputs(self.outside.quick(batch.images), self.network.tensors())

    @torch.no_grad()
    def prepare(self, example: Tensor) -> None:
        """Make what answers where no features are read: the faster copy, or, where that does not answer images
        (N, C, H, W) alike, an unchanged one. It is on the network's device from now on."""
        place = next(chain(self.network.parameters(), self.network.buffers()))
        with _autocast(example, None):
            wanted, plain = self.network(example).logits, self.network.plain()
            quick = self.quicken(plain)
            quick, plain = (net.to(place).to(memory_format=torch.channels_last) for net in (quick, plain))
            came = quick(example)
        near = torch.allclose(came, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())
        if not near and self.precision != "int8":
            say("  teacher: its faster copy does not answer alike, so the network answers as it is")
            quick = plain
        self.outside.quick = quick

    def _looked_into(self, images: Tensor) -> Outputs:
        if self.precision == "int8":
            raise UserError(
                "teacher.precision=int8 answers with logits only, and a loss reads the teacher's features: choose "
                "another precision"
            )
        with _autocast(images, self.precision):
            return self.network(images)

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
