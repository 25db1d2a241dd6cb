"""How much of a network a compression step has reached, measured on the compressed network itself."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import fx, nn

from distill.runtimes.graph import CONV
from distill.runtimes.int8_layers import Int8Conv2d, Int8Linear

COMPUTED = {"static int8", "dynamic int8"}  # the arithmetic too
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
HALF = {*DTYPES.values()}
INT8 = ("static int8", "dynamic int8", "weight-only int8")
TREATMENTS = (*INT8, *DTYPES.values(), "float")
CHOOSE = "quantized_decomposed.choose_qparams"  # the range of an activation, at run time


class Stored(NamedTuple):
    weights: int  # numbers that were learned: parameters, whatever their type
    bytes: int  # with scales, zero points and buffers


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a layer of torch.ao's that computes in int8 (asked by name: torch.ao is to be removed)."""
    return type(module).__module__.startswith("torch.ao.nn.") and callable(getattr(module, "weight", None))


def stored(net: nn.Module) -> dict[str, Stored]:
    """{treatment: what `net` stores that way}, of TREATMENTS those that occur; a parameter shared by several layers
    counts once."""
    weights, size = Counter(), Counter()
    floats = {id(parameter): parameter for parameter in net.parameters()}
    for module in net.modules():
        if is_quantized(module):
            kind = "dynamic int8" if ".dynamic." in type(module).__module__ else "static int8"
            weight, bias = module.weight(), module.bias()
            weights[kind] += weight.numel()
            # beside each int8 row: a float64 scale and an int64 zero point
            size[kind] += weight.numel() + 16 * weight.shape[0]
            if bias is not None:
                floats[id(module)] = bias
        elif isinstance(module, (Int8Conv2d, Int8Linear)):
            weights["weight-only int8"] += module.weight.numel()
            size["weight-only int8"] += module.weight.nbytes + module.scale.nbytes
            if module.bias is not None:
                floats[id(module)] = module.bias
        else:
            buffers = list(module.buffers(recurse=False))
            frozen = [buffer for buffer in buffers if buffer.dtype == torch.int8]
            kind = _kind(module) if frozen else "float"  # beside int8 weights are their scales
            size[kind] += sum(buffer.nbytes for buffer in buffers)
            weights[kind] += sum(buffer.numel() for buffer in frozen)
    for value in floats.values():
        kind = DTYPES.get(value.dtype, "float")
        weights[kind] += value.numel()
        size[kind] += value.nbytes
    return {name: Stored(weights[name], size[name]) for name in TREATMENTS if size[name] or name == "float"}


def _kind(module: nn.Module) -> str:
    """How a captured graph computes with the int8 weights that it holds; those of a layer inside of it, captured as it
    stored them, are dequantized."""
    if not isinstance(module, fx.GraphModule):
        return "weight-only int8"
    return "dynamic int8" if any(str(node.target).startswith(CHOOSE) for node in module.graph.nodes) else "static int8"


def _has_float_convolutions(net: nn.Module) -> bool:
    graphs = [module.graph for module in net.modules() if isinstance(module, fx.GraphModule)]
    captured = any(node.target == CONV and node.args[1].op == "get_attr" for graph in graphs for node in graph.nodes)
    return captured or any(type(module) is nn.Conv2d for module in net.modules())


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
    return sum(share["weights"] for name, share in coverage(net).items() if name in INT8)


def computed_share(net: nn.Module) -> float:
    """The share of the weights with which the arithmetic is int8's too, in [0, 1]; the others are dequantized first."""
    return sum(share["weights"] for name, share in coverage(net).items() if name in COMPUTED)


def warning(net: nn.Module) -> str | None:
    """One line when some but less than half of the weights became int8 or half precision, else None."""
    parts = coverage(net)
    share = 1 - parts["float"]["weights"]
    if share >= 0.5 or share == 0:
        return None
    name = next(name for name in TREATMENTS if name in parts)
    line = f"{name} reached only {share:.0%} of the weights"
    if name == "dynamic int8" and _has_float_convolutions(net):
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
