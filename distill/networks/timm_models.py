"""Any classification network of timm, by name."""

import difflib

from torch import nn

from distill.errors import UserError
from distill.networks.taps import dry_run, out_of_place
from distill.schema.ranges import Count
from distill.types import ImageSize, in_px


def classifier(name: str, num_classes: Count, image_size: ImageSize, pretrained: bool = False) -> nn.Module:
    """Images (N, 3, H, W) to logits (N, num_classes), as timm makes it.

    Args:
        name: as in timm.list_models(): resnet18, vit_tiny_patch16_224, efficientnet_lite0 …
        num_classes: K; timm gives pretrained weights a fresh head where K differs.
        image_size: px, (H, W) where they differ, told to the networks that fix it (transformers); others take it as it
            comes and keep their stem, so at 32 px the last map of many is one pixel.
        pretrained: fetch timm's default weights of the name.

    Raises:
        UserError: timm is not installed, an unknown name, weights that cannot be fetched, images that the
            network cannot take.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("network timm needs the timm package: pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(
            f"timm has no network '{name}'; nearest: {', '.join(near) or 'none'}; timm.list_models() names them all"
        )
    config = timm.models.get_pretrained_cfg(name)
    options = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the weights of {name} could not be fetched ({reason}): "
            "try again online, or name a file of your own with checkpoint=PATH"
        ) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"timm cannot make {name} for images of {in_px(image_size)}: {reason}") from error
    dry_run(net, image_size)
    return out_of_place(net)
