"""Images in files: read one by one, or, if they are all small, once into memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.data.augment import CenterCrop
from distill.errors import UserError

SMALL = 64  # px: images up to this side are kept in memory


class ImageError(UserError):
    """An image file cannot be read.

    DataLoader replaces a worker's exception by one of the same class whose message is the whole traceback as
    text. That ends in the original message, which is cut out here, so that one line arrives.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Files:
    """Image files under `root`, as `files[rows] -> list of (3, H, W) uint8`, decoded when asked for.

    JPEGs are decoded at a fraction of their resolution when that is still twice `image_size` or more.
    """

    def __init__(self, root: Path, names: Sequence[str], image_size: int):
        self.root, self.image_size = root, image_size
        self.names = np.array(names)  # not a list: forked workers would copy it by counting references

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> list[Tensor]:
        return [_tensor(read(self.root / name, 2 * self.image_size)) for name in self.names[rows.numpy()]]

    def listing(self) -> bytes:
        """Every file's name and size in bytes: changes when a file does, without reading them all."""
        lines = (f"{name}\t{os.path.getsize(self.root / name)}\n" for name in self.names)
        return os.fsencode("".join(lines))


def read(path: Path, draft: int | None = None) -> np.ndarray:
    """The image upright in RGB, (H, W, 3) uint8; with `draft`, a JPEG may come reduced to sides no shorter.

    Raises:
        ImageError: it is missing, damaged, or not an image.
    """
    try:
        with Image.open(path) as image:
            if draft:
                image.draft(None, (draft, draft))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # convert() would clip these to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly everything, SyntaxError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"cannot read the image {path} ({reason}): mend or remove it") from None


def read_small(root: Path, names: Sequence[str], size: int | None) -> Tensor | None:
    """All images as one (N, 3, size, size) uint8 array; None where they do not suit one.

    They suit if none has a side above 64 px and, without `size`, if all are squares of the same size.
    With `size` they are resized and cropped to it where they differ.
    """
    first = read(root / names[0])
    side, resize = size or len(first), CenterCrop(resize=1.0)
    if max(side, *first.shape) > SMALL:
        return None
    images = np.empty((len(names), 3, side, side), np.uint8)
    for row, name in enumerate(names):  # threads would be slower: so little of it is done outside Python's lock
        image = read(root / name)
        if image.shape == (side, side, 3):
            images[row] = image.transpose(2, 0, 1)
        elif size and max(image.shape) <= SMALL:
            images[row] = resize([_tensor(image)], torch.empty(1, 0), side)[0].numpy()
        else:
            return None
    return torch.from_numpy(images)


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)
