"""Handwritten digits that come with scikit-learn: 1,797 grey images of 8×8 pixels, brought to 32×32."""

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import interpolate

from distill.data.augment import ShiftFlip
from distill.data.base import Data, cut, from_arrays
from distill.schema.ranges import Inside, Seed


def digits(
    val_fraction: Inside = 0.15,
    test_fraction: Inside = 0.3,
    split_seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
) -> Data:
    """UCI's Optical Recognition of Handwritten Digits, its test part (Alpaydin and Kaynak, 1998); CC BY 4.0.

    The set has no split of its own: it is cut here, stratified. By default digits are shifted, not mirrored.
    """
    from sklearn.datasets import load_digits  # a second to import, for this set only

    source = load_digits()
    labels = torch.from_numpy(source.target).long()
    grey = torch.from_numpy(source.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    images = interpolate(grey, size=(32, 32), mode="bilinear").mul(255).round().byte()
    classes = [str(name) for name in source.target_names]
    rows = cut(labels, (val_fraction, test_fraction), split_seed, classes)
    splits = ((images[part], labels[part]) for part in rows)
    return from_arrays(classes, *splits, augment, ShiftFlip(padding=3, flip=False))
