"""Where to tap a network that nobody has described: its stages, its pooled vector, its head."""

from collections import Counter

import torch
from torch import Tensor, nn

from distill.errors import UserError


def out_of_place(net: nn.Module) -> nn.Module:
    """Switch off in-place activations in `net`: they would overwrite the tensors that taps have recorded."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return net


def head_path(net: nn.Module) -> str:
    """The path of the classifying layer: the last linear layer, else (SqueezeNet) the last convolution.

    Raises:
        UserError: there is neither.
    """
    for kind in (nn.Linear, nn.Conv2d):
        paths = [path for path, module in net.named_modules() if isinstance(module, kind)]
        if paths:
            return paths[-1]
    raise UserError(f"{type(net).__name__} has neither a linear layer nor a convolution that could be its head")


def infer_taps(net: nn.Module, image_size: int) -> dict[str, str]:
    """Taps by one dry run of an image (1, 3, image_size, image_size): "stage1" … "stage4" and "pooled".

    In a network of maps (N, C, H, W) a stage is the outermost last module of a resolution; the four coarsest
    are kept, maps of one pixel are not. In a transformer with tokens (N, T, D) the stages are the blocks at
    a quarter, half, three quarters and all of its depth. "pooled" is the head's input. Of a network
    that keeps maps as (N, H, W, C), such as Swin, only the few maps in the usual order are found.

    Raises:
        UserError: the network cannot take such an image.
    """
    outputs: list[tuple[str, tuple[int, ...]]] = []  # in the order in which the modules finish

    def record(path: str):
        def hook(module, inputs, output):
            if path and isinstance(output, Tensor):
                outputs.append((path, tuple(output.shape)))

        return hook

    hooks = [module.register_forward_hook(record(path)) for path, module in net.named_modules()]
    try:
        dry_run(net, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    stages = _map_stages(outputs)
    if len(stages) < 2:
        stages = _token_stages(net, outputs) or stages
    called = [path for path, _ in outputs]
    linear = [path for path in called if isinstance(net.get_submodule(path), nn.Linear)]
    taps = {f"stage{number}": path for number, path in enumerate(stages[-4:], 1)}
    return {**taps, "pooled": f"{linear[-1] if linear else head_path(net)}:in"}


@torch.no_grad()
def dry_run(net: nn.Module, image_size: int) -> Tensor:
    """The logits (1, K) of one black image, in eval mode; the mode of every module is left as it was.

    Raises:
        UserError: the network cannot take images (1, 3, image_size, image_size).
    """
    training = {module: module.training for module in net.modules()}
    parameter = next(net.parameters(), torch.zeros(()))
    try:
        return net.eval()(parameter.new_zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(net).__name__} cannot take RGB images of {image_size} px ({reason}): "
            "choose another network or another data.image_size"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _map_stages(outputs: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    stages: dict[int, str] = {}  # resolution: path, from fine to coarse
    for path, shape in outputs:
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] == 1:
            continue
        size = shape[2]
        if stages and size > min(stages):
            continue  # a map that grows again, such as adaptive pooling's
        if size not in stages or path.count(".") <= stages[size].count("."):
            stages[size] = path
    return list(stages.values())


def _token_stages(net: nn.Module, outputs: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    """The blocks are the largest group of siblings of one type that answer with tokens (1, T, D)."""
    siblings = {
        path: (path.rpartition(".")[0], type(net.get_submodule(path))) for path, shape in outputs if len(shape) == 3
    }
    if not siblings:
        return []
    counts = Counter(siblings.values())
    blocks_of = max(counts, key=lambda group: (counts[group], -group[0].count(".")))
    blocks = [path for path, group in siblings.items() if group == blocks_of]
    ends = [len(blocks) * quarter // 4 for quarter in (1, 2, 3, 4)]
    return [blocks[end - 1] for end in dict.fromkeys(ends) if end]
