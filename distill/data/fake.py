"""Made images whose classes can be learned: for tests and benchmarks."""

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from annotated_types import Ge
from torch.nn.functional import interpolate

from distill.data.base import Data, from_arrays
from distill.errors import UsageError
from distill.schema.ranges import Seed, Sides
from distill.types import checked_size, sides


def fake(
    num_classes: Annotated[int, Ge(2)] = 10,
    train_size: Annotated[int, Ge(2)] = 600,
    image_size: Sides = 32,
    seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
) -> Data:
    """Each class is a smooth colour pattern under noise; validation and test are a third of training each.

    Args:
        num_classes: at least 2; they are equally frequent.
        train_size: at least as many.
        image_size: px: the side of squares, or [height, width].
        seed: patterns and noise are drawn from it.
    """
    if not 2 <= num_classes <= train_size:
        raise UsageError(
            f"data.num_classes must be from 2 to data.train_size, not {num_classes} with {train_size} images"
        )
    space = sides(checked_size(image_size))
    sizes = [train_size, max(num_classes, train_size // 3), max(num_classes, train_size // 3)]
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(num_classes, 3, 4, 4, generator=generator)
    patterns = interpolate(patterns, size=space, mode="bilinear")
    labels = torch.cat([torch.arange(size) % num_classes for size in sizes])

    def made(labels: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(labels), 3, *space, generator=generator)
        return (patterns[labels] + 0.3 * noise).clamp(0, 1).mul(255).byte()

    images = torch.cat([made(part) for part in labels.split(1024)])  # so that memory grows by the images' own bytes
    classes = [f"class{label}" for label in range(num_classes)]
    splits = zip(images.split(sizes), labels.split(sizes), strict=True)
    return from_arrays(classes, *splits, augment)
