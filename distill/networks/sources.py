"""What an object is, told in plain values that are the same in every process: for the keys of what is kept on the disk.

A key that lacks something reads what another network or augmentation left; one that has a memory address in it never
finds anything again. So an object is its class and what it holds, and where its class is not an installed package's,
the file of source code that makes it.
"""

import hashlib
import json
import re
import sys
import types
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_PLAIN = (type(None), bool, int, float, str)


def describe(value, inside: tuple[int, ...] = ()):
    """`value` in JSON's plain values.

    Args:
        inside: of whose parts `value` is one, by id: what refers back to them is cut short.
    """
    if isinstance(value, _PLAIN):
        return value
    if id(value) in inside:
        return "(itself)"
    deeper = partial(describe, inside=(*inside, id(value)))
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().float().cpu().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), _digest(np.ascontiguousarray(value).tobytes())]
    if isinstance(value, Mapping):
        return {str(key): deeper(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [deeper(child) for child in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(deeper(child)) for child in value)
    if isinstance(value, partial):
        return [deeper(value.func), deeper(value.args), deeper(value.keywords)]
    if isinstance(value, types.MethodType):
        return [_place(value.__func__), deeper(value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        code = _ADDRESS.sub("", repr(value.__code__.co_consts)).encode() + value.__code__.co_code
        return [_place(value), _digest(code), deeper(value.__defaults__), deeper(cells)]
    if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        return _place(value)
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        return [layers(value), {name: deeper(tensor) for name, tensor in tensors}]
    slots = {name: getattr(value, name, None) for name in getattr(type(value), "__slots__", ())}
    return [_place(type(value)), deeper(slots | getattr(value, "__dict__", {}))]


def layers(net: nn.Module) -> dict[str, list[str]]:
    """By path, each layer's class and what it says of itself; not its weights."""
    return {path: [_place(type(layer)), _ADDRESS.sub("", layer.extra_repr())] for path, layer in net.named_modules()}


def own_sources(described) -> list[str]:
    """What `described` (see `describe`, `layers`) has from elsewhere than installed packages: "module.name@digest of
    its file", in order."""
    return sorted(set(re.findall(r"[\w.<>]+@[0-9a-f]{16}", json.dumps(described))))


def _place(thing) -> str:
    """A class's or function's full name; with a digest of its file where it is not an installed package's."""
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    module = thing.__module__ or "builtins"
    name = f"{module}.{thing.__qualname__}"
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or _installed(module, Path(file)):
        return name
    return f"{name}@{_digest(Path(file).read_bytes())}"


def _installed(module: str, file: Path) -> bool:
    top = module.partition(".")[0]
    return top == "distill" or top in sys.stdlib_module_names or {"site-packages", "dist-packages"} & {*file.parts}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
