"""Encoded images, decoded when asked for: in files here, in tar shards in webdataset.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.errors import UserError
from distill.files import file_stamp


class ImageError(UserError):
    """An image file cannot be read.

    DataLoader replaces a worker's exception by one of the same class whose message is the whole traceback as
    text. That ends in the original message, which is cut out here, so that one line arrives.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Encoded:
    """Images as `images[rows] -> list of (3, H, W) uint8`, decoded when asked for.

    JPEGs are decoded at a fraction of their resolution when that is still twice `image_size` or more.
    """

    names: np.ndarray  # (N,), not a list: forked workers would copy it by counting references
    image_size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> list[Tensor]:
        return [tensor(self.decode(row, 2 * self.image_size)) for row in rows.tolist()]

    def decode(self, row: int, draft: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8, see `read`."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> "Encoded":
        """These rows alone, in this order."""
        raise NotImplementedError

    def listing(self) -> bytes:
        """Every image's name and bytes, and when its file was changed: other images have another listing, without
        reading them all. The folder is not in it: what is moved with its times stays the same."""
        raise NotImplementedError


class Files(Encoded):
    """Image files under `root`."""

    def __init__(self, root: Path, names: Sequence[str], image_size: int):
        self.root, self.names, self.image_size = root, np.array(names), image_size

    def decode(self, row: int, draft: int | None = None) -> np.ndarray:
        return read(self.root / self.names[row], draft)

    def select(self, rows: Tensor) -> "Files":
        return Files(self.root, self.names[rows.numpy()], self.image_size)

    def listing(self) -> bytes:
        return b"".join(file_stamp(self.root / name, name) for name in self.names)


def read(file: Path | BinaryIO, draft: int | None = None, name: str | None = None) -> np.ndarray:
    """The image upright in RGB, (H, W, 3) uint8; with `draft`, a JPEG may come reduced to sides no shorter.

    Raises:
        ImageError: it is missing, damaged, or not an image; says `name` where `file` is not a path.
    """
    try:
        with Image.open(file) as image:
            if draft:
                image.draft(None, (draft, draft))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # convert() would clip these to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly everything, SyntaxError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"cannot read the image {name or file} ({reason}): mend or remove it") from None


def tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) → (3, H, W), the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)
