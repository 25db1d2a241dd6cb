"""Half precision: weights and arithmetic in float16 or bfloat16, half the bytes."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from distill.errors import UsageError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Half(nn.Module):
    """`net` in another floating type; images and logits stay float32."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net = net.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.to(self.dtype)).float()


def cast(
    net: nn.Module, finetune=None, data=None, flow: str = "fx", *, dtype: Literal["float16", "bfloat16"] = "float16"
) -> nn.Module:
    """A copy of `net`, images (N, C, H, W) to logits (N, K), that computes in `dtype` behind its normalisation.

    Args:
        finetune, data, flow: part of every compression step's signature; not needed here.
        dtype: "float16" (11 bits of precision, up to 65,504) or "bfloat16" (8 bits, the range of float32).

    Raises:
        UsageError: another dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype} is unknown: choose one of {', '.join(DTYPES)}")
    net = copy.deepcopy(net).eval()
    if not hasattr(net, "normalize"):
        return Half(net, DTYPES[dtype]).eval()
    net.net = Half(net.net, DTYPES[dtype])  # pixels lose less before the mean is taken from them in float32
    return net.eval()
