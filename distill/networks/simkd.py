"""A student with the teacher's classifier: the model of SimKD.

Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, §3.2 and appendix (the
projector: 1×1, 3×3 and 1×1 convolutions through half of the teacher's channels, each with batch norm and ReLU).
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from distill.errors import UserError
from distill.networks.taps import dry_run, heads, out_of_place
from distill.networks.weights import read_state
from distill.schema.ranges import Count
from distill.types import ImageSize

FACTOR = 2  # how much narrower the projector is than the teacher


def projector(channels: int, width: int) -> nn.Sequential:
    """Maps (N, channels, H, W) to (N, width, H, W), not negative."""
    middle = width // FACTOR
    sizes = [(channels, middle, 1), (middle, middle, 3), (middle, width, 1)]
    return nn.Sequential(
        *(
            layer
            for a, b, size in sizes
            for layer in (nn.Conv2d(a, b, size, padding=size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        )
    )


def simkd(
    body: Callable[..., nn.Module], num_classes: Count, image_size: ImageSize, width: Count, weights: str | None = None
) -> nn.Module:
    """The network `body` with a projector before its last pooling ("POOL.project") and a classifier of `width` inputs.

    Args:
        body: makes the student; `num_classes` and `image_size` are given to it where it takes them.
        num_classes: K.
        image_size: px.
        width: D, channels that the teacher's classifier reads.
        weights: a file of the teacher's weights: its classifier is taken over and frozen. None: a fresh one that
            learns, which is for reading a trained student back.

    Raises:
        UserError: a body whose classifier does not read what its last pooling gives, or a file without a
            classifier (num_classes, width).
    """
    accepted = inspect.signature(body).parameters
    options = {"num_classes": num_classes, "image_size": image_size}
    net = out_of_place(body(**{key: value for key, value in options.items() if key in accepted}))
    head, pool, channels = _ends(net, image_size)
    net.set_submodule(
        pool, nn.Sequential(OrderedDict(project=projector(channels, width), pool=net.get_submodule(pool)))
    )
    net.set_submodule(head, nn.Linear(width, num_classes))
    if weights is not None:
        net.get_submodule(head).load_state_dict(_classifier(weights, num_classes, width))
        net.get_submodule(head).requires_grad_(False)
    dry_run(net, image_size)
    return net


def _ends(net: nn.Module, image_size: ImageSize) -> tuple[str, str, int]:
    """The paths of classifier and last pooling, and the channels of the map between body and pooling."""
    head, kind = next(iter(heads(net, image_size)), ""), type(net).__name__
    pools = [path for path, module in net.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    seen: dict[str, torch.Size] = {}
    if pools:
        pooling = net.get_submodule(pools[-1])
        hook = pooling.register_forward_hook(lambda module, inputs, output: seen.update(maps=inputs[0].shape))
        dry_run(net, image_size)
        hook.remove()
    reads = getattr(net.get_submodule(head), "in_features", None)
    if "maps" not in seen or seen["maps"][1] != reads:
        raise UserError(
            f"simkd needs a student whose classifier reads what an AdaptiveAvgPool2d gives; in {kind} the pooling is "
            f"{pools[-1] if pools else 'no module'} and '{head}' reads {reads} features: choose another, e.g. a ResNet"
        )
    return head, pools[-1], reads


def _classifier(weights: str, num_classes: int, width: int) -> dict[str, torch.Tensor]:
    """The last (num_classes, width) matrix of a file and its bias, as a linear layer's state."""
    state = read_state(weights)
    names = [
        name.removesuffix(".weight")
        for name, value in state.items()
        if getattr(value, "shape", None) == (num_classes, width)
    ]
    found = [name for name in names if f"{name}.bias" in state]
    if not found:
        raise UserError(
            f"{weights} has no classifier of {num_classes} classes that reads {width} features: "
            "set student.width to the teacher's, or name another file"
        )
    return {part: state[f"{found[-1]}.{part}"] for part in ("weight", "bias")}
