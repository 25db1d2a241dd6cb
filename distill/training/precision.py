"""Which precision a machine computes a network fastest in."""

from collections.abc import Mapping

import torch
from torch import nn

from distill.errors import UsageError

SHORT = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # as Lightning takes them
TEACHING = ("auto", "32-true", "bf16-mixed", "16-mixed", "int8")


def precision(asked: str | int, accelerator: str, network: nn.Module) -> str:
    """A precision of Lightning's Trainer: `asked`, or for "auto" bf16-mixed where it makes `network` faster.

    That is on GPUs and CPUs that compute in bfloat16 themselves; but not on a CPU where it has convolutions in
    groups, whose bfloat16 kernels are slower than those for float32 (measured: MobileNetV2, 0.67 of the speed), nor
    under quantization, which rounds to numbers of its own.

    Args:
        asked: trainer.precision.
        accelerator: trainer.accelerator: "auto", "cpu", "gpu" …
    """
    if asked != "auto":
        return _in_full(asked)
    layers = [*network.modules()]
    if on_cpu(accelerator):
        slow = any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers)
        faster = torch.cpu.get_capabilities().get("avx512_bf16", False) and not slow
    else:
        faster = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    quantized = any(hasattr(layer, "enable_fake_quant") for layer in layers)
    return "bf16-mixed" if faster and not quantized else "32-true"


def teaching(asked: str | int, trainer: Mapping, network: nn.Module) -> str:
    """What a frozen teacher computes in, whatever its student does: one of TEACHING but for "auto", which is the
    trainer's precision, or where that is "auto" too what suits this network; with it any that the trainer takes.

    Args:
        asked: teacher.precision.
        trainer: its "precision" and "accelerator".

    Raises:
        UsageError: an unknown precision, int8 on a GPU, or another number format than the trainer converts all to.
    """
    whole = _in_full(trainer["precision"])
    if asked == "auto":
        return precision(whole, trainer["accelerator"], network)
    chosen = _in_full(asked)
    if chosen not in TEACHING:
        raise UsageError(f"teacher.precision={asked}: choose one of {', '.join(TEACHING)}")
    if whole.endswith("-true") and whole != "32-true":
        raise UsageError(f"teacher.precision={asked}: trainer.precision={whole} converts the teacher too; leave it out")
    if chosen == "int8" and not on_cpu(trainer["accelerator"]):
        raise UsageError("teacher.precision=int8 computes on a CPU: choose bf16-mixed, or trainer.accelerator=cpu")
    return chosen


def _in_full(asked: str | int) -> str:
    return SHORT.get(str(asked), str(asked))


def on_cpu(accelerator: str) -> bool:
    """Whether Lightning's Trainer computes on the CPU with this trainer.accelerator."""
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
