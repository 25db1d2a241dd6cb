"""Colour changes of a batch of RGB images, each image by its own factor; fractions are cut off, as torchvision does."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import UsageError
from distill.schema.ranges import Share
from distill.types import ImageSize


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, in this order, times factors uniform in [1 - s, 1 + s] for strength s.

    Howard, "Some improvements on deep convolutional neural network based image classification", 2013.
    """

    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    count = 3

    def __post_init__(self):
        strengths = [self.brightness, self.contrast, self.saturation]
        if not all(0 <= strength <= 1 for strength in strengths):
            raise UsageError(f"ColorJitter: brightness, contrast and saturation must be in [0, 1], not {strengths}")

    def __call__(self, images: Tensor, uniforms: Tensor, size: ImageSize) -> Tensor:
        """images (N, 3, H, W) uint8, uniforms (N, 3): a new (N, 3, H, W); `size` is not used."""
        changes = {brightness: self.brightness, contrast: self.contrast, saturation: self.saturation}
        pixels = images.float()  # not bytes in between: they would be made and read again
        for (change, strength), uniform in zip(changes.items(), uniforms.unbind(1), strict=True):
            if strength:
                pixels = change(pixels, 1 + strength * (2 * uniform - 1))
        return pixels.to(torch.uint8)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """images (N, 3, H, W) uint8, or such numbers as float32, and factors (N,), to images of that type, as everywhere
    here: 0 is black, 1 the image."""
    return _whole(images * factors[:, None, None, None]).to(images.dtype)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """0 is the image's mean grey."""
    pixels = images.float()
    mean = _grey(pixels).double().mean((2, 3), keepdim=True)  # exact: sums of whole numbers
    return _blend(images, mean.float() - pixels, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """0 is the grey image."""
    pixels = images.float()
    return _blend(images, _grey(pixels) - pixels, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """0 is the image smoothed by (1 1 1; 1 5 1; 1 1 1) / 13; the border stays as it is."""
    pixels = images.float()
    middle = pixels[:, :, 1:-1, 1:-1]
    across = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    smooth = (across[:, :, :-2] + across[:, :, 1:-1]).add_(across[:, :, 2:]).add_(4 * middle).div_(13).round_()
    change = torch.zeros_like(pixels)
    change[:, :, 1:-1, 1:-1] = smooth.sub_(middle)
    return _blend(images, change, factors)


def _grey(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, 1, H, W), whole numbers."""
    red, green, blue = pixels.split(1, dim=1)
    return (0.2989 * red).add_(0.587 * green).add_(0.114 * blue).floor_()


def _blend(images: Tensor, change: Tensor, factors: Tensor) -> Tensor:
    """factor · image + (1 - factor) · other, from change = other - image; where that is 0 the pixel stays."""
    return _whole(change.mul_((1 - factors)[:, None, None, None]).add_(images)).to(images.dtype)


def _whole(values: Tensor) -> Tensor:
    """In place: within range, fractions cut off."""
    return values.clamp_(0, 255).trunc_()
