"""Augmentations as pure functions of images and uniform numbers: `augment(images, uniforms, size)`.

`count` is how many uniforms an image needs. Pixels stay uint8; nothing here draws a random number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

from distill.errors import UsageError

_TRIES = 10


@dataclass(frozen=True)
class ShiftFlip:
    """Shift by up to `padding` pixels, zeros moving in, and mirror half of the images (He et al. 2016)."""

    padding: int = 4
    flip: bool = True
    count = 3

    def __post_init__(self):
        if self.padding < 0:
            raise UsageError(f"ShiftFlip: padding must be at least 0, not {self.padding}")

    def __call__(self, images: Tensor, uniforms: Tensor, size: int) -> Tensor:
        """images (N, C, H, W) of any dtype, uniforms (N, 3): a new (N, C, H, W); `size` is not used."""
        _, channels, height, width = images.shape
        offsets = (uniforms[:, :2] * (2 * self.padding + 1)).long()  # 0 … 2 · padding, evenly
        rows = offsets[:, :1] + torch.arange(height)  # (N, H) in the padded image
        columns = offsets[:, 1:] + torch.arange(width)  # (N, W)
        if self.flip:
            columns = torch.where(uniforms[:, 2:] < 0.5, columns.flip(1), columns)
        pixels = (rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]).flatten(1)  # (N, H·W)
        padded = pad(images, [self.padding] * 4).flatten(2)
        return padded.gather(2, pixels[:, None, :].expand(-1, channels, -1)).view(images.shape)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to the set's size, mirrored half of the time (Szegedy et al. 2015).

    `scale` is the range of the part's area over the image's, `ratio` that of its width over its height.
    """

    scale: Sequence[float] = (0.25, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: bool = True
    count = 2 * _TRIES + 3

    def __post_init__(self):
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UsageError(
                "RandomResizedCrop: scale must be [low, high] within (0, 1] and ratio [low, high] above 0, "
                f"not {list(self.scale)} and {list(self.ratio)}"
            )

    def __call__(self, images: Sequence[Tensor], uniforms: Tensor, size: int) -> Tensor:
        """N images (C, H, W) uint8 of any sizes, and uniforms (N, 23): (N, C, size, size) uint8."""
        sizes = torch.tensor([image.shape[1:] for image in images])  # (N, 2) height, width
        flips = (self.flip & (uniforms[:, -1] < 0.5)).tolist()
        crops = []
        for image, box, flip in zip(images, self.boxes(sizes, uniforms).tolist(), flips, strict=True):
            crop = F.resized_crop(image, *box, [size, size], antialias=True)
            crops.append(crop.flip(2) if flip else crop)
        return torch.stack(crops)

    def boxes(self, sizes: Tensor, uniforms: Tensor) -> Tensor:
        """(N, 2) heights and widths, uniforms (N, 23) → (N, 4) int64: top, left, height, width.

        As torchvision's: area uniform, ratio log-uniform; the first of ten tries that fits; if none does, the
        middle of the image at the ratio nearest to its own.
        """
        size = sizes.double()[:, None]  # (N, 1, 2)
        areas, ratios = uniforms[:, : 2 * _TRIES].double().chunk(2, dim=1)  # (N, 10) each
        areas = torch.lerp(*torch.tensor(tuple(self.scale)).double(), areas) * size.prod(-1)
        ratios = torch.lerp(*torch.tensor(tuple(self.ratio)).double().log(), ratios).exp()
        tries = torch.stack([(areas / ratios).sqrt(), (areas * ratios).sqrt()], -1).round()  # (N, 10, 2)
        fits = ((tries <= size) & (tries >= 1)).all(-1)
        chosen = tries[torch.arange(len(sizes)), fits.byte().argmax(1)]  # (N, 2)

        height, width = sizes.double().unbind(1)
        low, high = self.ratio
        widest = torch.stack([height.minimum(width / low), width.minimum(height * high)], 1).round()
        found = fits.any(1, keepdim=True)
        extent = torch.where(found, chosen, widest.clamp(min=1)).long()
        position = torch.where(found, uniforms[:, 2 * _TRIES : 2 * _TRIES + 2].double(), 0.5)
        corner = (position * (sizes - extent + 1)).long()
        return torch.cat([corner, extent], 1)


@dataclass(frozen=True)
class CenterCrop:
    """For evaluation: the short side resized to `resize` times the set's size, then the middle square."""

    resize: float = 256 / 224
    count = 0

    def __call__(self, images: Sequence[Tensor], uniforms: Tensor, size: int) -> Tensor:
        """N images (C, H, W) uint8 of any sizes, uniforms (N, 0): (N, C, size, size) uint8."""
        short = math.ceil(self.resize * size)
        resized = [F.resize(image, [short], antialias=True) for image in images]
        return torch.stack([F.center_crop(image, [size]) for image in resized])
