"""Which layers suffer most from int8, each measured alone."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from distill.compress.calibrate import answers
from distill.compress.flows import layers, rounded


def by_sensitivity(net: nn.Module, batches: Sequence[Tensor]) -> list[str]:
    """The layers of `net` that static int8 rounds, the one that changes the logits most first: the change is the mean
    square over images (N, C, H, W) and logits."""
    wanted = answers(net, batches)
    changes = {name: (came - wanted).square().mean().item() for name, came in one_by_one(net, batches, layers(net))}
    return sorted(changes, key=changes.get, reverse=True)


@torch.no_grad()
def one_by_one(net: nn.Module, batches: Sequence[Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(layer, logits (N, K)) of `net` with that layer alone in int8: each in turn has its weights (per channel) and
    its input (per tensor, range of the batch) rounded while all others stay float.

    Args:
        batches: images (n, C, H, W).
        names: of `flows.layers`.
    """
    for name in names:
        layer = net.get_submodule(name)
        weight, hook = layer.weight.detach().clone(), layer.register_forward_pre_hook(_rounded_input)
        layer.weight.copy_(rounded(weight, "xnnpack"))
        try:
            came = answers(net, batches)
        finally:
            layer.weight.copy_(weight)
            hook.remove()
        yield name, came


def _rounded_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    low, high = inputs[0].min().clamp(max=0).item(), inputs[0].max().clamp(min=0).item()
    scale = max((high - low) / 255, 1e-12)
    return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, round(-low / scale), 0, 255), *inputs[1:])
