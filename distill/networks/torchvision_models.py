"""Any classification network of torchvision, by name, fitted to the classes and to small images."""

import difflib
import math
import os
import pickle
from pathlib import Path
from unittest import mock

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from distill.errors import UserError
from distill.networks.stem import SMALL, for_small_images
from distill.networks.taps import dry_run, heads, out_of_place
from distill.networks.weights import at_positions
from distill.schema.ranges import Count
from distill.types import ImageSize, sides, square


def classifier(name: str, num_classes: Count, image_size: ImageSize, weights: str | None = None) -> nn.Module:
    """Images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: as in torchvision.models.list_models(): resnet18, mobilenet_v2, vit_b_16 …
        num_classes: K; pretrained weights of another number of classes get a fresh head.
        image_size: px; (H, W) where they differ, which a ViT cannot take. Up to 64 px, the shorter side, the first
            layers keep the resolution (see distill.networks.stem; VGG, which has no such layers, and MaxViT, which
            fixes the size, stay as they are), and a ViT without weights takes patches of 4 px (up to 32 px) or 8 px
            instead of its own. Above 64 px the positions of a ViT's weights are interpolated.
        weights: None, "DEFAULT", or a name such as "IMAGENET1K_V1"; torchvision downloads and keeps the file.

    Raises:
        UserError: an unknown name or weights, weights that cannot be had or read, images that the network
            cannot take.
    """
    known = list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(
            f"torchvision has no classification network '{name}'; nearest: {', '.join(near) or 'none'}; "
            "torchvision.models.list_models() names them all"
        )
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}  # one output, always
    if name.startswith("vit_"):
        square(image_size, name)
    if weights is not None:
        net = _pretrained(name, weights, image_size, options)
        _fit_heads(net, num_classes, image_size)
    elif name.startswith("vit_"):
        net = _vit(name, num_classes, image_size)
    else:
        if options:
            options["init_weights"] = True  # the default, but it warns when left out
        net = get_model(name, weights=None, num_classes=num_classes, **options)
    if min(sides(image_size)) <= SMALL and not name.startswith(("vgg", "vit_", "maxvit")):
        for_small_images(net)
    dry_run(net, image_size)
    return out_of_place(net)


def squeezenet(
    name: str, num_classes: Count, image_size: ImageSize, weights: str | None = None, relu_head: bool = True
) -> nn.Module:
    """As `classifier`, for the SqueezeNets.

    Args:
        relu_head: their head ends in a ReLU, so that no logit is below 0, as a teacher's are. False: it ends in the
            convolution before that; for training only, since weights made with it answer otherwise without.
    """
    net = classifier(name, num_classes, image_size, weights)
    if not relu_head:
        net.classifier[2] = nn.Identity()
    return net


def _pretrained(name: str, weights: str, image_size: ImageSize, options: dict) -> nn.Module:
    choices = get_model_weights(name).__members__
    entry = choices.get(weights.rpartition(".")[2])
    if entry is None:
        raise UserError(f"{name} has no weights '{weights}'; it has {', '.join(choices)}")
    size = entry.meta["min_size"][0]
    if name.startswith("vit_") and image_size <= SMALL:
        raise UserError(f"the weights of {name} take images of {size} px, not {image_size}: data.image_size={size}")
    file = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
    try:
        # torchvision unpickles the file that it finds in its folder without a look: allow tensors only
        with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            net = get_model(name, weights=entry, **options)
    except OSError as error:
        raise UserError(
            f"the weights of {name} could not be fetched ({error}): put {entry.url} at {file}, "
            "or name a file of your own with checkpoint=PATH"
        ) from error
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is broken or not the weights of {name}: delete it to fetch it anew") from error
    return _resized(net, name, image_size) if name.startswith("vit_") and image_size != size else net


def _resized(vit: nn.Module, name: str, image_size: int) -> nn.Module:
    """`vit` for images of another size, its position embeddings interpolated."""
    net = _vit(name, vit.num_classes, image_size)
    wanted = net.state_dict()
    net.load_state_dict({key: at_positions(key, value, wanted[key]) for key, value in vit.state_dict().items()})
    return net


def _fit_heads(net: nn.Module, num_classes: int, image_size: ImageSize) -> None:
    for path in heads(net, image_size):
        old = net.get_submodule(path)
        if isinstance(old, nn.Linear) and old.out_features != num_classes:
            net.set_submodule(path, nn.Linear(old.in_features, num_classes))
        elif isinstance(old, nn.Conv2d) and old.out_channels != num_classes:
            net.set_submodule(path, nn.Conv2d(old.in_channels, num_classes, old.kernel_size))


def _vit(name: str, num_classes: int, image_size: int) -> nn.Module:
    native = int(name.rpartition("_")[2])
    patch = 4 if image_size <= 32 else 8 if image_size <= SMALL else native
    if image_size % patch:
        raise UserError(f"{name} cuts images into patches of {patch} px, and {image_size} is not a multiple of it")
    # torchvision fixes the patch: make the network for as many patches of its own, then exchange the patches
    net = get_model(name, weights=None, num_classes=num_classes, image_size=image_size // patch * native)
    if patch != native:
        net.image_size, net.patch_size = image_size, patch
        net.conv_proj = nn.Conv2d(3, net.hidden_dim, patch, patch)
        nn.init.trunc_normal_(net.conv_proj.weight, std=math.sqrt(1 / (3 * patch * patch)))
        nn.init.zeros_(net.conv_proj.bias)
    return net
