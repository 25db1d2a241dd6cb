"""An image as evaluation sees it: of a file, a Pillow image, an array or a tensor, the pixels that a test image has."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.augment import SMALL, CenterCrop
from distill.data.files import ImageError, from_pillow, read, tensor
from distill.data.pack import Packed
from distill.errors import UserError
from distill.types import ImageSize, checked_size, sides

if TYPE_CHECKING:
    from distill.data.base import Data

NOTHING = torch.empty(1, 0)  # uniforms of a transform that draws nothing


@dataclass(frozen=True)
class Preparation:
    """`preparation(image) -> (3, H, W)`, and of several images (N, 3, H, W): float32 in [0, 1].

    Args:
        image_size: px, of the result: the side of squares, or (height, width).
        resize: an image is resized until it covers so many times the result, whose middle is cut out; None: as small
            images are treated, which stay as they are where they have that size, and else cover it once.
        pack: px: images are first brought to this size, as where they were packed (data.pack); None: they are not.
    """

    image_size: ImageSize
    resize: float | None = CenterCrop.resize
    pack: ImageSize | None = None

    def __call__(self, images) -> Tensor:
        """Of one image: a path, a file's bytes or an open file, a Pillow image, an array (H, W), (H, W, 3) or
        (H, W, 4), a tensor (C, H, W). Of several: a list of such, an array (N, H, W, 3), a tensor (N, C, H, W).

        Arrays and tensors are uint8, or floating point in [0, 1]. A file is read as a test image is: upright by EXIF,
        the first frame, what is transparent on white, 16 bits by their upper eight.

        Raises:
            UserError: there is no image in it.
        """
        if several(images):
            if not len(images):
                raise UserError("there is no image in an empty list")
            return torch.stack([self._one(each) for each in images])
        return self._one(images)

    def _one(self, image) -> Tensor:
        pixels = self._pixels(image)  # (3, H, W), uint8 or float32 in [0, 255]
        if self.pack is not None:
            pixels = CenterCrop(1.0)([pixels], NOTHING, self.pack)[0]
        if self.resize is not None:
            pixels = CenterCrop(self.resize)([pixels], NOTHING, self.image_size)[0]
        elif tuple(pixels.shape[1:]) != sides(self.image_size):
            pixels = CenterCrop(1.0)([pixels], NOTHING, self.image_size)[0]
        return pixels.float().div_(255)

    def _pixels(self, image) -> Tensor:
        if isinstance(image, (str, os.PathLike)):
            return tensor(self._read(Path(image).expanduser(), None))
        if isinstance(image, (bytes, bytearray)):
            return tensor(self._read(io.BytesIO(image), "the image"))
        if hasattr(image, "read"):
            return tensor(self._read(image, str(getattr(image, "name", "the image"))))
        if isinstance(image, Image.Image):
            return tensor(from_pillow(image))
        if isinstance(image, Tensor):
            return _of_tensor(image)
        if isinstance(image, np.ndarray):
            return _of_array(image)
        raise UserError(
            f"expected a path, a Pillow image, an array (height, width, 3) or a tensor (3, …, …), not {image!r:.99}"
        )

    def _read(self, file, name: str | None) -> np.ndarray:
        draft = None if self.pack is None and self.resize is None else 2 * max(sides(self.pack or self.image_size))
        try:
            return read(file, draft, name)
        except OSError as error:
            raise ImageError(f"cannot read the image {name or file} ({error.strerror or error})") from None

    def described(self) -> dict:
        """In plain values, from which `described_as` makes it again."""
        return {"resize": self.resize, "pack": self.pack}


def described_as(described: Mapping | None, image_size: ImageSize) -> Preparation:
    """What `Preparation.described` says; None, of earlier versions' files: as images of that size usually are.

    Raises:
        UserError: it makes no sense.
    """
    if described is None:
        return Preparation(image_size, None if max(sides(image_size)) <= SMALL else CenterCrop.resize)
    resize, pack = described.get("resize"), described.get("pack")
    if resize is not None and not (type(resize) in (int, float) and 1 <= resize <= 100):
        raise UserError(f"expected a number of at least 1, not {resize!r}")
    return Preparation(image_size, resize, None if pack is None else checked_size(pack, "pack"))


def preparation(data: Data) -> Preparation:
    """How the test images of a set are made."""
    images, transform = data.test.images, data.test.transform
    pack = checked_size(images.pixels.shape[2:]) if isinstance(images, Packed) else None
    return Preparation(data.image_size, getattr(transform, "resize", None), pack)


def several(images) -> bool:
    """Whether these are images, and not one."""
    if isinstance(images, (list, tuple)):
        return True
    dimensions = images.ndim if isinstance(images, (Tensor, np.ndarray)) else 0
    return dimensions == 4


def _of_tensor(image: Tensor) -> Tensor:
    """(C, H, W) → (3, H, W), uint8 or float32 in [0, 255]."""
    image = image.detach().cpu()
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise UserError(f"expected a tensor (3, height, width) or (1, height, width), not {tuple(image.shape)}")
    return _in_range(image).expand(3, -1, -1)


def _of_array(image: np.ndarray) -> Tensor:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) → (3, H, W), uint8 or float32 in [0, 255]."""
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise UserError(f"expected an array (height, width), (height, width, 3) or (…, 4), not {image.shape}")
    if image.dtype in (np.uint8, np.uint16) and (image.ndim == 2 or image.dtype == np.uint8):
        return tensor(from_pillow(Image.fromarray(np.ascontiguousarray(image))))
    if image.ndim == 3 and image.shape[2] == 4:
        raise UserError("an array (height, width, 4) must be uint8")
    image = image if image.ndim == 3 else image[:, :, None]
    return _of_tensor(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))


def _in_range(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise UserError(f"expected pixels of uint8, or of floating point in [0, 1], not of {image.dtype}")
    image = image.float()
    if not (image.min() >= 0 and image.max() <= 1):
        raise UserError(
            f"expected floating-point pixels in [0, 1], not from {image.min():.3g} to {image.max():.3g}: images are "
            "given as they are, the student normalises them itself"
        )
    return image * 255
