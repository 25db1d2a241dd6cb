"""CIFAR-10: 60,000 colour images of 32×32 pixels, 10 classes of 6,000 (Krizhevsky 2009)."""

from collections.abc import Callable, Mapping

from torchvision.datasets import CIFAR10

from distill.data.base import Data
from distill.data.download import published
from distill.schema.ranges import Inside, Seed


def cifar10(
    root: str, val_fraction: Inside = 0.1, split_seed: Seed = 0, augment: Mapping[str, Callable] | None = None
) -> Data:
    """See `published`."""
    remedy = f"put {CIFAR10.filename} from {CIFAR10.url} into that folder"
    return published(CIFAR10, root, remedy, val_fraction, split_seed, augment)
