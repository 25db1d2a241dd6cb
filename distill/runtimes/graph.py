"""What the exporters of captured graphs share: capturing, and errors that name the operator and its layer."""

import logging
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from distill.errors import UserError


def capture(net: nn.Module, example: Tensor, name: str, most: int | None = None) -> ExportedProgram:
    """`net` as a graph of torch.export for any batch size, or up to `most` images.

    Args:
        net: eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (2 or more, C, H, W).
        name: the format's, for errors.

    Raises:
        UserError: a layer that only PyTorch executes, or a forward that can't be captured, each named.
    """
    for path, module in net.named_modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            raise UserError(
                f"{name} does not know {_name(type(module))} (layer {path}), which only PyTorch executes: choose "
                "compress=[static_int8] for it"
            )
    with quiet(), torch.no_grad():
        try:
            batch = Dim("batch", min=1, max=most)
            return torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
        except Exception as error:  # whatever the network's own code raises on a symbolic value
            where = place(error, net)
            raise UserError(
                f"{_name(type(getattr(net, 'net', net)))} cannot be exported to {name}{where}: {reason(error)}; its "
                "forward must not depend on the values or the number of images"
            ) from error


def refuse(error: Exception, program: ExportedProgram, name: str) -> UserError:
    """`error` of a later step as one line; where it speaks of an operator of `program`, with that and its layer."""
    text, link = "", error
    while link is not None:
        text, link = f"{text}\n{link}", link.__cause__ or link.__context__
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in calls:
        if str(node.target) in text or repr(node.target) in text:
            return unknown(str(node.target), node, name)
    for operator in re.findall(r"OpOverload\(op='([\w.]+)'", text):  # of those that `program` was decomposed into
        return unknown(operator, source(operator, calls), name)
    return UserError(f"{name} cannot take this network: {reason(error)}")


def source(operator: str, calls: Iterable[fx.Node]) -> fx.Node | None:
    """The first call from which `operator` of a decomposed graph may have come: one with its name in its own."""
    base = re.split(r"[.:]", operator.partition("::")[2] or operator.partition(".")[2])[0].removesuffix("_copy")
    base = "conv" if base == "convolution" else base  # of one, two or three dimensions
    return next((node for node in calls if base in str(node.target)), None)


def unknown(operator: str, node: fx.Node | None, name: str) -> UserError:
    place = "" if node is None else f" ({layer(node)})"
    return UserError(f"{name} does not know the operator {operator}{place}: replace it in the network")


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path and class of the innermost module in whose forward a node was recorded; the network's own path is ""."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", "unknown")
    return path.removeprefix("L['self']").strip("."), kind if isinstance(kind, str) else kind.__name__


def layer(node: fx.Node) -> str:
    """`module_of` in words."""
    path, kind = module_of(node)
    return f"layer {path or 'the network itself'}, {kind.rpartition('.')[2]}"


def reason(error: Exception) -> str:
    """The error as one short line."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:300]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Advice to developers of torch.export, torchao and torch.ao (deprecated, yet what TorchScript runs) is hidden."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}" if kind.__module__.startswith("torch.ao.") else kind.__name__


def place(error: BaseException | None, net: nn.Module) -> str:
    """' at layer X (file:line)' of the innermost layer of `net` that was running when it failed, else ''."""
    paths = {id(module): path for path, module in net.named_modules()}
    while error is not None:
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            owner = id(frame.f_locals.get("self"))
            if owner in paths and frame.f_code.co_name == "forward":
                file = frame.f_code.co_filename.rpartition("/")[2]
                return f" at layer {paths[owner] or 'the network itself'} ({file}:{line})"
        error = error.__cause__ or error.__context__
    return ""


LINEAR, CONV = torch.ops.aten.linear.default, torch.ops.aten.conv2d.default
