"""Which layers of a network a step may put others in place of."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def hooked(net: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """While it lasts, the layers of `net` at these paths have these forward hooks."""
    handles = [net.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def called(net: nn.Module, example: Tensor) -> set[str]:
    """The paths of the modules that are called when `net` answers images (N, C, H, W); of others (Swin's `qkv`) it
    reads the weights and computes with them itself."""
    found: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: found.add(path))
        for path, module in net.named_modules()
    ]
    try:
        net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def exchange(net: nn.Module, layers: Mapping[str, nn.Module], example: Tensor | None) -> list[str]:
    """Put `layers` in their places in `net`; where `net` then fails, because a forward reads a layer's weight itself
    (Swin's attention, XCiT's positions), the old one stays.

    Args:
        net: changed in place; eval mode.
        layers: by path.
        example: images (N, C, H, W) to try it on; None: it is not tried.

    Returns:
        The paths of those that stayed.
    """
    old = {path: net.get_submodule(path) for path in layers}

    def works(paths) -> bool:
        for path in paths:
            net.set_submodule(path, layers[path])
        try:
            net(example)
        except Exception:  # whatever its forward raises
            for path in paths:
                net.set_submodule(path, old[path])
            return False
        return True

    if example is None:
        for path, layer in layers.items():
            net.set_submodule(path, layer)
        return []
    return [] if works(layers) else [path for path in layers if not works([path])]
