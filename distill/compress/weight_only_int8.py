"""Weight-only int8: Linear and Conv2d are stored in int8, one scale an output channel; the arithmetic stays float."""

from collections.abc import Sequence

from torch import nn

from distill.compress.calibrate import noise
from distill.compress.flows import paths
from distill.compress.layers import exchange
from distill.networks.fold import fold_batch_norm
from distill.runtimes.int8_layers import Int8Conv2d, Int8Linear


def weight_only_int8(
    net: nn.Module, finetune=None, data=None, flow: str = "fx", *, skip: Sequence[str] = ()
) -> nn.Module:
    """A copy of `net`, images (N, C, H, W) to logits (N, K), a quarter as large and about as fast.

    Args:
        finetune, data, flow: part of every compression step's signature; not needed here.
        skip: layers that stay float, by name.

    Subclasses of Linear and Conv2d, and convolutions padded with anything but zeros, stay float: `coverage` says how
    much that is.

    Raises:
        UserError: an unknown layer in `skip`.
    """
    skip = paths(net, skip)
    net, small = fold_batch_norm(net), {}
    for name, module in net.named_modules():
        if name in skip:
            continue
        if type(module) is nn.Linear:
            small[name] = Int8Linear(module)
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
            small[name] = Int8Conv2d(module)
    exchange(net, small, None if data is None else noise(data))
    return net
