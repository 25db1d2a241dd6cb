"""Which precision a machine trains these networks fastest in."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.ao.quantization import FakeQuantizeBase


def precision(asked: str | int, accelerator: str, networks: Iterable[nn.Module]) -> str:
    """A precision of Lightning's Trainer: `asked`, or for "auto" bf16-mixed where it makes training faster.

    That is on GPUs and CPUs that compute in bfloat16 themselves; but not on a CPU where a network has convolutions in
    groups, whose bfloat16 kernels are slower than those for float32 (measured: MobileNetV2, 0.67 of the speed), nor
    under quantization, which rounds to numbers of its own.

    Args:
        asked: trainer.precision.
        accelerator: trainer.accelerator: "auto", "cpu", "gpu" …
    """
    if asked != "auto":
        return str(asked)
    layers = [layer for network in networks for layer in network.modules()]
    if accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available()):
        slow = any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers)
        faster = torch.cpu.get_capabilities().get("avx512_bf16", False) and not slow
    else:
        faster = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    quantized = any(isinstance(layer, FakeQuantizeBase) for layer in layers)
    return "bf16-mixed" if faster and not quantized else "32-true"
