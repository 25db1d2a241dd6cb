"""How much of a network a compression step has reached, measured on the compressed network itself."""

from typing import NamedTuple

import torch.ao.nn.quantized.dynamic as nnqd
from torch import nn

from distill.compress.dynamic_int8 import Int8Conv2d

TREATMENTS = ("dynamic int8", "weight-only int8", "float")


class Stored(NamedTuple):
    weights: int  # numbers that were learned: parameters, whatever their type
    bytes: int  # with scales, zero points and buffers


def stored(net: nn.Module) -> dict[str, Stored]:
    """{treatment: what `net` stores that way}; a parameter shared by several layers counts once."""
    weights, size = dict.fromkeys(TREATMENTS, 0), dict.fromkeys(TREATMENTS, 0)
    floats = {id(parameter): parameter for parameter in net.parameters()}
    for module in net.modules():
        if isinstance(module, nnqd.Linear):
            weight, bias = module.weight(), module.bias()
            weights["dynamic int8"] += weight.numel()
            # beside each int8 row: a float64 scale and an int64 zero point
            size["dynamic int8"] += weight.numel() + 16 * weight.shape[0]
            if bias is not None:
                floats[id(module)] = bias
        elif isinstance(module, Int8Conv2d):
            weights["weight-only int8"] += module.weight.numel()
            size["weight-only int8"] += module.weight.nbytes + module.scale.nbytes
            if module.bias is not None:
                floats[id(module)] = module.bias
        else:
            size["float"] += sum(buffer.nbytes for buffer in module.buffers(recurse=False))
    weights["float"] = sum(value.numel() for value in floats.values())
    size["float"] += sum(value.nbytes for value in floats.values())
    return {name: Stored(weights[name], size[name]) for name in TREATMENTS}


def coverage(net: nn.Module) -> dict[str, dict[str, float]]:
    """{treatment: {"weights": share, "bytes": share}}; shares are in [0, 1] and sum to 1 over treatments."""
    parts = stored(net)
    total = Stored(*(sum(column) for column in zip(*parts.values(), strict=True)))
    return {
        name: {"weights": part.weights / max(total.weights, 1), "bytes": part.bytes / max(total.bytes, 1)}
        for name, part in parts.items()
    }


def int8_share(net: nn.Module) -> float:
    """The share of the weights that is stored in int8, in [0, 1]."""
    return 1 - coverage(net)["float"]["weights"]


def warning(net: nn.Module) -> str | None:
    """One line when less than half of the weights became int8, else None."""
    share = int8_share(net)
    if share >= 0.5:
        return None
    line = f"dynamic int8 reached only {share:.0%} of the weights"
    if any(type(module) is nn.Conv2d for module in net.modules()):
        return f"{line}, convolutions stayed float: compress.dynamic_int8.conv=weight_only stores them in int8"
    return f"{line}: the rest is in layers that it does not know (it knows Linear and zero-padded Conv2d)"


def describe(net: nn.Module) -> str:
    """A line on how much each treatment covers, and the warning where there is one."""
    parts = [
        f"{name} {share['weights']:.0%} of the weights, {share['bytes']:.0%} of the bytes"
        for name, share in coverage(net).items()
    ]
    line = f"  {'; '.join(parts)}"
    return line if (problem := warning(net)) is None else f"{line}\n  warning: {problem}"
