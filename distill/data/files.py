"""Encoded images, decoded when asked for: in files here, in tar shards in webdataset.py."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.errors import UserError
from distill.files import file_stamp

DECODED = b"decoded 2\n"  # a change of what pixels a file gives makes other images of it
WIDE = {"I": "32-bit whole numbers", "F": "floating-point values"}


class ImageError(UserError):
    """An image file cannot be read.

    DataLoader replaces a worker's exception by one of the same class whose message is the whole traceback as
    text. That ends in the original message, which is cut out here, so that one line arrives.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Encoded:
    """Images as `images[rows] -> list of (3, H, W) uint8`, decoded when asked for.

    JPEGs are decoded at a fraction of their resolution when that is still twice `largest` or more.
    """

    names: np.ndarray  # (N,), not a list: forked workers would copy it by counting references
    largest: int  # px: the longer side of what is made of them

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> list[Tensor]:
        return [tensor(self.decode(row, 2 * self.largest)) for row in rows.tolist()]

    def decode(self, row: int, draft: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8, see `read`."""
        raise NotImplementedError

    def look(self, row: int) -> None:
        """Raises ImageError where the file's first bytes tell that it can't be read."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> "Encoded":
        """These rows alone, in this order."""
        raise NotImplementedError

    def entries(self) -> tuple[list[str], list[int]]:
        """Every image's name, which no other has, and its bytes."""
        raise NotImplementedError

    def listing(self) -> bytes:
        """Every image's name and bytes, and when its file was changed: other images have another listing, without
        reading them all. The folder is not in it: what is moved with its times stays the same."""
        raise NotImplementedError


class Files(Encoded):
    """Image files under `root`."""

    def __init__(self, root: Path, names: Sequence[str], largest: int):
        self.root, self.names, self.largest = root, np.array(names), largest

    def decode(self, row: int, draft: int | None = None) -> np.ndarray:
        return read(self.root / self.names[row], draft)

    def look(self, row: int) -> None:
        header(self.root / self.names[row])

    def select(self, rows: Tensor) -> "Files":
        return Files(self.root, self.names[rows.numpy()], self.largest)

    def entries(self) -> tuple[list[str], list[int]]:
        return self.names.tolist(), [os.stat(self.root / name).st_size for name in self.names]

    def listing(self) -> bytes:
        return DECODED + b"".join(file_stamp(self.root / name, name) for name in self.names)


def read(file: Path | BinaryIO, draft: int | None = None, name: str | None = None) -> np.ndarray:
    """The image upright in RGB, (H, W, 3) uint8; with `draft`, a JPEG may come reduced to sides no shorter.

    What is transparent is seen on white.

    Raises:
        ImageError: it is missing, damaged, not an image, or has values of an unknown range; says `name` where `file`
            is not a path.
    """
    try:
        with Image.open(file) as image:
            if draft:
                image.draft(None, (draft, draft))
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_rgb(image))
    except Exception as error:  # Pillow raises nearly everything, SyntaxError included
        raise _unreadable(name or file, error) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")  # convert() alone would clip
    if image.mode in WIDE:
        raise ValueError(f"its {WIDE[image.mode]} have no range that is agreed on; save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def check(images: Encoded, evaluated: Tensor, store: str | None) -> None:
    """See before training that every image can be read: the headers of all, and the pixels of those `evaluated`, which
    training doesn't see. Once for a set of files, which `store` remembers.

    Args:
        evaluated: (n,) int64, rows of validation and test images.

    Raises:
        ImageError: names the first that can't.
    """
    seen = None
    if store is not None:
        key = hashlib.sha256(images.listing() + evaluated.numpy().tobytes()).hexdigest()[:16]
        seen = Path(store).expanduser().absolute() / f"{key}.checked"
        if seen.exists():
            return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(images.look, range(len(images)), chunksize=64):
            pass
        for _ in pool.map(lambda row: images.decode(row, 2 * images.largest).shape, evaluated.tolist()):
            pass
    if seen is not None:
        with suppress(OSError):  # a full disk: it is checked again
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.touch()


def header(file: Path | BinaryIO, name: str | None = None) -> None:
    """Raises ImageError as `read` would, for what the first bytes of the file tell."""
    try:
        with Image.open(file) as image:
            if image.mode in WIDE and not (image.mode == "I" and image.format == "PPM"):
                _rgb(image)
    except Exception as error:
        raise _unreadable(name or file, error) from None


def _unreadable(name, error: Exception) -> ImageError:
    reason = re.sub(r" <_io\..*?>", "", str(error).splitlines()[0]) if str(error) else type(error).__name__
    return ImageError(f"cannot read the image {name} ({reason}): mend or remove it")


def tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) → (3, H, W), the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)
