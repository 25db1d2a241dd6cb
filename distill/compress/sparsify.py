"""Unstructured pruning: single weights become zero. The file shrinks when it is packed; no runtime here gets faster.

Source: Zhu & Gupta 2018 (arXiv:1710.01878): the smallest magnitudes of all layers together are masked in rounds, with
fine-tuning after each, and the sparsity after round t of n rises as

    s_t = s · (1 - (1 - t / n)³)
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.compress.tuning import tuning
from distill.errors import UsageError
from distill.progress import say
from distill.schema.ranges import Count, Inside, Number, Positive

LAYERS = (nn.Conv2d, nn.Linear)


class Masked(nn.Module):
    """A weight as it is where `mask` is 1, and zero elsewhere, without gradient."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def sparsify(
    net: nn.Module,
    finetune: Callable | None = None,
    data=None,
    flow: str = "fx",
    *,
    sparsity: Inside = 0.8,
    rounds: Count = 3,
    epochs: Number = 2,
    lr: Positive = 5e-3,
) -> nn.Module:
    """A copy of `net` of which `sparsity` of the weights of convolutions and Linear layers are zero.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K).
        finetune: trains it, see distill/training/finetune.py; not needed with epochs=0.
        data, flow: part of every compression step's signature; not needed here.
        sparsity: in (0, 1), over all layers together.
        rounds: of masking and fine-tuning.
        epochs, lr: of each round.

    Raises:
        UsageError: options out of range.
        UserError: nothing to fine-tune with.
    """
    if not 0 < sparsity < 1 or rounds < 1 or epochs < 0:
        raise UsageError(
            f"compress.sparsify: sparsity={sparsity} must be between 0 and 1, rounds={rounds} at least 1, "
            f"epochs={epochs} at least 0"
        )
    train = tuning("sparsify", finetune, epochs, lr)
    net = copy.deepcopy(net).eval()
    for number in range(1, rounds + 1):
        share = sparsity * (1 - (1 - number / rounds) ** 3)
        net = _bake(train(_mask(net, share), f"sparsify-{number}"))
    say(f"  sparsify: {zeros(net):.1%} of the weights are zero")
    return net


def zeros(net: nn.Module) -> float:
    """The share of the weights of convolutions and Linear layers that is zero, in [0, 1]."""
    weights = torch.cat([layer.weight.detach().flatten() for layer in net.modules() if isinstance(layer, LAYERS)])
    return (weights == 0).double().mean().item()


def _mask(net: nn.Module, share: float) -> nn.Module:
    """A copy whose `share` of smallest weights, over all layers, stays zero in training."""
    net = copy.deepcopy(net)
    layers = [layer for layer in net.modules() if isinstance(layer, LAYERS)]
    sizes = [layer.weight.numel() for layer in layers]
    magnitudes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    mask = torch.ones_like(magnitudes)
    mask[magnitudes.argsort(stable=True)[: round(share * len(mask))]] = 0
    for layer, part in zip(layers, mask.split(sizes), strict=True):
        parametrize.register_parametrization(layer, "weight", Masked(part.view_as(layer.weight)))
    return net


def _bake(net: nn.Module) -> nn.Module:
    """`net` with the masked weights as ordinary parameters."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return net.eval()
