"""Training images, as they are at test time, on which a compression step measures."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distill.data.base import Data
from distill.errors import UserError
from distill.types import sides

FEWEST = 32  # a range of activations that is found on less is chance
BATCH = 64


def calibration(data: Data, images: int, option: str, seed: int = 0) -> list[Tensor]:
    """`images` training images chosen by `seed`, or all where there are fewer, without augmentation.

    Args:
        data: only its training rows are read, in the way of its validation images.
        option: names `images` in the error, such as "compress.static_int8.images".

    Returns:
        Batches (n, C, H, W) float32 in [0, 1].

    Raises:
        UserError: fewer than FEWEST images.
    """
    split = replace(data.val, images=data.train.images, labels=data.train.labels)
    found = enough(data, images, option)
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:found]
    return [split[part, 0].images for part in rows.split(BATCH)]


def enough(data: Data, images: int, option: str) -> int:
    """How many of `images` there are. Raises UserError for fewer than FEWEST, see `calibration`."""
    found = min(images, len(data.train))
    if found < FEWEST:
        raise UserError(
            f"{option}={images} with {len(data.train)} training images: calibration needs at least {FEWEST}; "
            "512 are usual"
        )
    return found


def noise(data: Data) -> Tensor:
    """(2, 3, H, W) in [0, 1], always the same: for what needs the size of the images, not images."""
    return torch.rand(2, 3, *sides(data.image_size), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answers(net: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Logits (N, K) of all images; a network prepared by distill/compress/flows.py observes them."""
    return torch.cat([net(images) for images in batches])
