"""Bias correction: what rounding the weights adds to a layer's answers on the average is taken off its bias.

Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.2, in the form of appendix D, which measures:

    b ← b + E[y] − E[ŷ]

y: what the layer answers in the float network; ŷ: what it answers in the rounded one, whose layers before it are
rounded and corrected; E: the mean over images and places, for each channel.
"""

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from distill.compress.layers import hooked


@torch.no_grad()
def correct(
    net: nn.Module, batches: Sequence[Tensor], layers: Collection[str], rounded: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of `net` in which the biases of `layers` make up for what rounding will do to their weights; or `net`, if
    that doesn't bring the logits nearer.

    E is the mean over the batches: the k-th moves each bias by 1 / k of the difference that it finds. A layer that is
    called more than once for an answer keeps its bias.

    Args:
        net: float32 on the CPU, eval mode, images (N, C, H, W) to logits (N, K); untouched.
        batches: of images.
        layers: paths of convolutions and Linear layers.
        rounded: weights (O, …) to the numbers that their int8 stands for.
    """
    small = copy.deepcopy(net)
    weights = {path: small.get_submodule(path).weight for path in layers}
    for path, weight in weights.items():
        layer = small.get_submodule(path)
        layer.weight = nn.Parameter(rounded(weight))
        if layer.bias is None:
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)))
    logits = net(batches[0])
    before = _error(small, batches[0], logits)
    for number, images in enumerate(batches, 1):
        wanted = _means(net, images, layers)
        moves = {path: _move(means[0], 1 / number) for path, means in wanted.items() if len(means) == 1}
        with hooked(small, moves):
            small(images)
    if not _error(small, batches[0], logits) < before:
        return net
    for path, weight in weights.items():
        small.get_submodule(path).weight = weight
    return small


def _means(net: nn.Module, images: Tensor, layers: Collection[str]) -> dict[str, list[Tensor]]:
    """What each layer answers on the average, (O,), for each time that it is called."""
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    keep = {path: lambda layer, inputs, answer, path=path: found[path].append(_mean(layer, answer)) for path in layers}
    with hooked(net, keep):
        net(images)
    return found


def _move(wanted: Tensor, share: float) -> Callable:
    """A hook that moves a layer's bias by a share of what its answers' mean lacks."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        missing = share * (wanted - _mean(layer, answer))
        layer.bias += missing
        return answer + (missing if isinstance(layer, nn.Linear) else missing[:, None, None])

    return hook


def _mean(layer: nn.Module, answer: Tensor) -> Tensor:
    """Over all but the channels: of (N, O, H, W) or, of a Linear layer, (…, O)."""
    return answer.flatten(0, -2).mean(0) if isinstance(layer, nn.Linear) else answer.mean((0, 2, 3))


def _error(net: nn.Module, images: Tensor, wanted: Tensor) -> float:
    return (net(images) - wanted).square().mean().item()
