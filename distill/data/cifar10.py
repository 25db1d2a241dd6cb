"""CIFAR-10: 60,000 colour images of 32×32 pixels, 10 classes of 6,000 (Krizhevsky 2009)."""

from collections.abc import Callable, Mapping

from torchvision.datasets import CIFAR10

from distill.data.base import Data, cut, from_arrays
from distill.data.download import fetch
from distill.schema.ranges import Count, Inside, Number, Seed


def cifar10(
    root: str,
    batch_size: Count,
    num_workers: Number,
    val_fraction: Inside = 0.1,
    split_seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
) -> Data:
    """The official test set; validation is cut from training. By default shifted and mirrored."""
    remedy = f"put {CIFAR10.filename} from {CIFAR10.url} into that folder"
    classes, (images, labels), test = fetch(CIFAR10, root, remedy)
    train, val = ((images[rows], labels[rows]) for rows in cut(labels, (val_fraction,), split_seed, classes))
    return from_arrays(classes, train, val, test, augment, batch_size, num_workers)
