"""Which layers of a network a step may put others in place of."""

import torch
from torch import Tensor, nn


def without_fast_paths(net: nn.Module) -> nn.Module:
    """`net`, changed in place, whose nn.TransformerEncoder calls its layers one by one, always: in eval mode it would
    hand their weights to one fused kernel, which asks of every layer to be a float Linear. It answers as before but
    for the last digits."""
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # of which that kernel computes neither
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return net


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
