"""Dynamic int8: Linear layers compute in int8, convolutions are stored in it.

- Linear: int8 weights with one scale per output channel; the activations get one scale per batch, chosen when the
  network runs, so no calibration data is needed. TorchScript's form of it is made by
  `torch.ao.quantization.quantize_dynamic`, that of ExecuTorch (flow "xnnpack") and ONNX in distill/compress/flows.py.
- Conv2d: no runtime here computes it in dynamic int8 rightly and fast (PyTorch has no kernel, ONNX Runtime's is slower
  than float, XNNPACK's is wrong in common networks: distill/compress/quantizer.py). In TorchScript and ONNX its weights
  are stored in int8, symmetric with one scale per output channel (Jacob et al. 2018, arXiv:1712.05877; per channel:
  Krishnamoorthi 2018, arXiv:1806.08342); in ExecuTorch, which can't hold those, they stay float:

      q = round(w / s),  s = max|w| / 127,  w' = s · q,  so |w - w'| <= s / 2

  and dequantized in the graph: the file is smaller, the arithmetic stays float.
"""

import copy
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from distill.compress import flows
from distill.compress.calibrate import noise
from distill.compress.layers import exchange, without_fast_paths
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
        data: gives the size of the images; without, in the flow "fx", it is not tried whether the network can do with
            other layers.
        flow: one of flows.FLOWS.
        conv: "weight_only" stores convolutions in int8; "float" leaves them as they are, as does the flow "xnnpack"
            always, whose runtime can't hold stored ones.

    Subclasses of Linear and Conv2d (but for Linear's in "xnnpack" and "onnx"), and convolutions padded with anything
    but zeros, stay float: `coverage` says how much that is.

    Raises:
        UserError: `conv` is none of these; or, in "xnnpack" and "onnx", the network's graph can't be captured.
    """
    if conv not in CONV:
        raise UserError(f"compress.dynamic_int8.conv={conv} is unknown: choose one of {', '.join(CONV)}")
    net, example = fold_batch_norm(net), None if data is None else noise(data)
    if conv == "weight_only" and flow != "xnnpack":
        convs = {name: module for name, module in net.named_modules() if type(module) is nn.Conv2d}
        zero_padded = {name: Int8Conv2d(module) for name, module in convs.items() if module.padding_mode == "zeros"}
        exchange(net, zero_padded, example)
    if flow != "fx":
        return flows.dynamic(net, example, flow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization is to move to torchao
        warnings.filterwarnings("ignore", message=".*(reduce_range|quantize_per_channel)")
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic  # to be removed: not sooner

        small = quantize_dynamic(net, {nn.Linear: per_channel_dynamic_qconfig})
    linear = [name for name, module in net.named_modules() if type(module) is nn.Linear]
    exchange(net, {name: small.get_submodule(name) for name in linear}, example)
    return net
