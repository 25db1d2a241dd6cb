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

import warnings
from typing import Literal

from torch import nn

from distill.compress import flows
from distill.compress.calibrate import noise
from distill.compress.layers import exchange
from distill.errors import UserError
from distill.networks.fold import fold_batch_norm
from distill.runtimes.int8_layers import Int8Conv2d

CONV = ("weight_only", "float")


def dynamic_int8(
    net: nn.Module, finetune=None, data=None, flow: str = "fx", *, conv: Literal["weight_only", "float"] = "weight_only"
) -> nn.Module:
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


def attempt(net: nn.Module, data, flow: str, **options) -> None:
    """Capture `net` where the flow does; nothing of the step needs images."""
    if flow != "fx":
        dynamic_int8(net, None, data, flow, **options)
