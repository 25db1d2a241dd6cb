"""CIFAR-100: 60,000 colour images of 32×32 pixels, 100 classes of 600 (Krizhevsky 2009)."""

from collections.abc import Callable, Mapping

from torchvision.datasets import CIFAR100

from distill.data.base import Data, cut, from_arrays
from distill.data.download import fetch
from distill.schema.ranges import Count, Inside, Number, Seed


def cifar100(
    root: str,
    batch_size: Count,
    num_workers: Number,
    val_fraction: Inside = 0.1,
    split_seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
) -> Data:
    """The official test set; validation is cut from training. By default shifted and mirrored."""
    remedy = f"put {CIFAR100.filename} from {CIFAR100.url} into that folder"
    classes, (images, labels), test = fetch(CIFAR100, root, remedy)
    train, val = ((images[rows], labels[rows]) for rows in cut(labels, (val_fraction,), split_seed, classes))
    return from_arrays(classes, train, val, test, augment, batch_size, num_workers)
