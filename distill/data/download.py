"""Torchvision's data sets as they are published: downloaded unless they are there, validation cut from training."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.data.base import Data, cut, from_arrays
from distill.errors import UserError
from distill.locks import alone


def published(
    dataset: type,
    root: str,
    remedy: str,
    val_fraction: float,
    split_seed: int,
    augment: Mapping[str, Callable] | None,
    padding: int = 0,
) -> Data:
    """The official test set; validation is cut from training. By default shifted and mirrored.

    Args:
        dataset, root, remedy: see `fetch`.
        padding: px of zeros on each side.
    """
    classes, (images, labels), (test_images, test_labels) = fetch(dataset, root, remedy)
    images, test_images = (pad(each, [padding] * 4) if padding else each for each in (images, test_images))
    train, val = ((images[rows], labels[rows]) for rows in cut(labels, (val_fraction,), split_seed, classes))
    return from_arrays(classes, train, val, (test_images, test_labels), augment)


def fetch(dataset: type, root: str, remedy: str) -> tuple[list[str], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Class names, and (images, labels) of training and test set.

    Args:
        dataset: a torchvision class whose items have one size; it checks its files and knows their address.
        root: the folder it keeps them in, made if need be.
        remedy: for the message: which files to put where.

    Returns:
        images (N, C, H, W) uint8, labels (N,) int64.

    Raises:
        UserError: the set is not there, or damaged, and cannot be downloaded.
    """
    folder = Path(root).expanduser().absolute()
    try:
        try:
            train, test = dataset(folder, train=True), dataset(folder, train=False)
        except Exception:  # missing, or not what its checksum says
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder / f".{dataset.__name__}.lock", dataset.__name__):
                train, test = dataset(folder, train=True, download=True), dataset(folder, train=False)
    except Exception as error:  # torchvision raises RuntimeError, URLError, AssertionError, EOFError …
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{dataset.__name__} is not (whole) in {folder} and cannot be downloaded ({reason}): "
            f"{remedy}, or point data.root or DISTILL_DATA to the folder that has it"
        ) from None
    return list(train.classes), _arrays(train), _arrays(test)


def _arrays(split) -> tuple[Tensor, Tensor]:
    images = torch.as_tensor(split.data)  # (N, H, W) or (N, H, W, 3) uint8
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images, torch.as_tensor(split.targets)
