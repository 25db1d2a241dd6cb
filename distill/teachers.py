"""Who teaches. A teacher answers to a batch; `Frozen` is one trained network."""

import hashlib

import torch
from torch import nn

from distill.errors import UserError
from distill.network import Network
from distill.types import Batch, Outputs


def content_hash(module: nn.Module) -> str:
    """Hexadecimal SHA-256 of all parameters and buffers, names and dtypes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Frozen(nn.Module):
    """A trained network that only answers: eval mode, no gradients, nothing of it in the checkpoint but its hash.

    The network is kept out of the module tree, so no optimizer, gradient hook, `train()` or checkpoint reaches
    it; it moves between devices and dtypes with its owner.
    """

    def __init__(self, network: Network):
        super().__init__()
        self._outside_the_tree = (network.eval().requires_grad_(False),)
        self.fingerprint = content_hash(network)

    @property
    def network(self) -> Network:
        return self._outside_the_tree[0]

    def _apply(self, fn, recurse=True):
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # no_grad, not inference_mode: an inference tensor saved for the backward of a loss fails
    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        return self.network(batch.images)

    def get_extra_state(self) -> str:
        return self.fingerprint

    def set_extra_state(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise UserError(
                f"this run was taught by another teacher (its content hash is {fingerprint[:12]}, the present "
                f"one's {self.fingerprint[:12]}): give the same teacher again or start a new run"
            )
