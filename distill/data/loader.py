"""What reads a split a batch at a time, in worker processes or in this one."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill.types import Batch


class Loader(DataLoader):
    """Batches with images in [0, 1].

    Workers hand over bytes, which become floats here: four times the memory would have to be shared, page by page,
    which takes longer than a crop of 224 px.
    """

    def __iter__(self) -> Iterator[Batch]:
        return map(_floats, super().__iter__())


def _floats(batch: Batch) -> Batch:
    return batch if batch.images.is_floating_point() else batch._replace(images=unit(batch.images))


def unit(images: Tensor) -> Tensor:
    """(N, C, H, W) of uint8, or in that range, as float32 in [0, 1]; in pinned memory what was in it."""
    if images.dtype != torch.uint8 or images.device.type != "cpu":
        return images.float().div_(255)
    floats = torch.from_numpy(np.divide(images.numpy(), np.float32(255)))  # NumPy asks for large pages of memory
    return floats.pin_memory() if images.is_pinned() else floats
