"""Dynamic int8: Linear layers compute in int8, convolutions are stored in int8 or compute in it too.

- Linear: int8 weights with one scale per output channel; the activations get one scale per batch, chosen when the
  network runs, so no calibration data is needed. TorchScript's form of it is made by
  `torch.ao.quantization.quantize_dynamic`, that of ExecuTorch (flow "xnnpack") and ONNX in distill/compress/flows.py.
- Conv2d: XNNPACK computes it like Linear; only a depthwise one stays float there. PyTorch has no dynamic kernel, and
  ONNX Runtime's is slower than float. For these two its weights are stored in int8, symmetric with one scale per
  output channel (Jacob et al. 2018, arXiv:1712.05877; per channel: Krishnamoorthi 2018, arXiv:1806.08342):

      q = round(w / s),  s = max|w| / 127,  w' = s · q,  so |w - w'| <= s / 2

  and dequantized in the graph: the file is smaller, the arithmetic stays float.
"""

import copy
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from torch.fx.experimental.optimization import fuse

from distill.compress import flows
from distill.compress.calibrate import noise
from distill.compress.layers import without_fast_paths
from distill.errors import UserError

CONV = ("weight_only", "float")


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q and s of a weight (O, …): int8 of the same shape, and (O, 1, …) float."""
    scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a channel of zeros; NaN stays NaN
    return (weight / scale).round().to(torch.int8), scale


class Int8Conv2d(nn.Module):
    """A zero-padded Conv2d whose weight is an int8 buffer (O, I/groups, kh, kw) and a scale (O, 1, 1, 1)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weight, scale = rounded(conv.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def dequantized(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.dequantized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """A copy in eval mode whose BatchNorms are folded into their convolutions, where torch.fx can follow it.

    int8 weights must not be frozen, so TorchScript would not fold them later. With one scale per channel,
    folding leaves the int8 numbers as they are.
    """
    net = without_fast_paths(copy.deepcopy(net).eval())
    try:
        traced = fx.symbolic_trace(net)
    except Exception:  # whatever its forward raises on a symbolic value: control flow that depends on tensors
        return net
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    if any(calls[name] > 1 for name, layer in traced.named_modules() if isinstance(layer, nn.Conv2d)):
        return net  # a convolution that is called twice cannot absorb two BatchNorms
    return fuse(net)


def dynamic_int8(net: nn.Module, finetune=None, data=None, flow: str = "fx", *, conv: str = "weight_only") -> nn.Module:
    """A compressed copy of `net`; `net` itself is untouched.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K).
        finetune: part of every compression step's signature; not needed here.
        data: gives the size of the images; not needed for the flow "fx".
        flow: one of flows.FLOWS.
        conv: "weight_only" stores convolutions in int8; "float" leaves them as they are. For the flow "xnnpack", whose
            runtime can't hold stored ones, they compute in int8 as well.

    Subclasses of Linear and Conv2d (but for Linear's in "xnnpack" and "onnx"), and convolutions padded with anything
    but zeros, stay float: `coverage` says how much that is.

    Raises:
        UserError: `conv` is none of these; or, in "xnnpack" and "onnx", the network's graph can't be captured.
    """
    if conv not in CONV:
        raise UserError(f"compress.dynamic_int8.conv={conv} is unknown: choose one of {', '.join(CONV)}")
    net, stores = fold_batch_norm(net), conv == "weight_only"
    if stores and flow != "xnnpack":
        for name, module in list(net.named_modules()):
            if type(module) is nn.Conv2d and module.padding_mode == "zeros":
                net.set_submodule(name, Int8Conv2d(module))
    if flow != "fx":
        return flows.dynamic(net, noise(data), flow, conv=stores and flow == "xnnpack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization is to move to torchao
        warnings.filterwarnings("ignore", message=".*(reduce_range|quantize_per_channel)")
        quantize_dynamic(net, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
    return net
