"""Random policies over fourteen operations: each image draws its own, and each operation runs once for a batch.

Operations and ranges are those of AutoAugment (Cubuk et al. 2019) as RandAugment and TrivialAugment take them over;
what moves in is black, pixels are the nearest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from distill.data import color
from distill.errors import UsageError
from distill.schema.ranges import Count
from distill.types import ImageSize

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDED = {
    "brightness": color.brightness,
    "color": color.saturation,
    "contrast": color.contrast,
    "sharpness": color.sharpness,
}
OPERATIONS = ("identity", *GEOMETRIC, *BLENDED, "posterize", "solarize", "autocontrast", "equalize")
LEVELS = 30


@dataclass(frozen=True)
class RandAugment:
    """`ops` operations in a row, each at `magnitude` of 30 (Cubuk et al., "RandAugment", NeurIPS 2020)."""

    ops: Count = 2
    magnitude: Annotated[int, Interval(ge=0, le=30)] = 9

    def __post_init__(self):
        if self.ops < 1 or not 0 <= self.magnitude <= LEVELS:
            raise UsageError(
                f"RandAugment: ops must be at least 1 and magnitude 0 to {LEVELS}, not {self.ops} and {self.magnitude}"
            )

    @property
    def count(self) -> int:
        return 2 * self.ops

    def __call__(self, images: Tensor, uniforms: Tensor, size: ImageSize) -> Tensor:
        """images (N, 3, H, W) uint8, uniforms (N, 2 · ops): a new (N, 3, H, W); `size` is not used."""
        limits = {"shear": 0.3, "rotate": 30, "blend": 0.9, "posterize": 4}
        limits |= {"translate_x": 150 / 331 * images.shape[3], "translate_y": 150 / 331 * images.shape[2]}
        levels = torch.full_like(uniforms[:, 0], self.magnitude / LEVELS)
        for pair in uniforms.split(2, dim=1):
            images = _apply(images, pair[:, 0], levels, pair[:, 1], limits)
        return images


@dataclass(frozen=True)
class TrivialAugment:
    """One operation, at a level drawn too, in the wide ranges (Müller & Hutter, "TrivialAugment", ICCV 2021)."""

    count = 3

    def __call__(self, images: Tensor, uniforms: Tensor, size: ImageSize) -> Tensor:
        """images (N, 3, H, W) uint8, uniforms (N, 3): a new (N, 3, H, W); `size` is not used."""
        limits = {"shear": 0.99, "rotate": 135, "blend": 0.99, "posterize": 6, "translate_x": 32, "translate_y": 32}
        which, sign, level = uniforms.unbind(1)
        return _apply(images, which, (level * (LEVELS + 1)).floor() / LEVELS, sign, limits)


def _apply(images: Tensor, which: Tensor, levels: Tensor, signs: Tensor, limits: Mapping[str, float]) -> Tensor:
    """One operation for each image.

    Args:
        images: (N, 3, H, W) uint8.
        which, signs: (N,) uniforms that choose operation and direction.
        levels: (N,) in [0, 1], of the limits.
        limits: shear (a tangent), translate_x and translate_y (px), rotate (degrees), blend (a factor's distance from
            1) and posterize (bits dropped) at level 1.
    """
    chosen = (which * len(OPERATIONS)).long()
    signed = torch.where(signs < 0.5, -levels, levels)
    result = images.clone()

    def rows_of(*names: str) -> Tensor:
        return sum(chosen == OPERATIONS.index(name) for name in names).nonzero()[:, 0]

    rows = rows_of(*GEOMETRIC)
    result[rows] = _warp(images[rows], _matrices(chosen[rows], signed[rows], limits, *images.shape[2:]))
    for name, blend in BLENDED.items():
        rows = rows_of(name)
        result[rows] = blend(images[rows], 1 + limits["blend"] * signed[rows])
    rows = rows_of("posterize")
    dropped = (levels[rows] * limits["posterize"]).round().to(torch.uint8)
    result[rows] = images[rows] >> dropped[:, None, None, None] << dropped[:, None, None, None]
    rows = rows_of("solarize")
    threshold = (255 * (1 - levels[rows])).ceil().to(torch.uint8)
    bright = images[rows] >= threshold[:, None, None, None]
    result[rows] = torch.where(bright, 255 - images[rows], images[rows])
    rows = rows_of("autocontrast")
    result[rows] = F.autocontrast(images[rows])
    rows = rows_of("equalize")
    result[rows] = F.equalize(images[rows])
    return result


def _matrices(chosen: Tensor, signed: Tensor, limits: Mapping[str, float], height: int, width: int) -> Tensor:
    """(N, 2, 3): from a pixel (x, y, 1) of the result, seen from the middle, to the source's."""
    matrices = torch.eye(2, 3, device=signed.device).repeat(len(chosen), 1, 1)
    is_op = {name: chosen == OPERATIONS.index(name) for name in GEOMETRIC}
    for name, axis, side in (("shear_x", 0, height), ("shear_y", 1, width)):  # the top left corner stays
        tangents = limits["shear"] * signed * is_op[name]
        matrices[:, axis, 1 - axis] += tangents
        matrices[:, axis, 2] += tangents * (side / 2)
    for name, axis in (("translate_x", 0), ("translate_y", 1)):
        matrices[:, axis, 2] -= (limits[name] * signed * is_op[name]).trunc()
    angles = (limits["rotate"] * signed * is_op["rotate"]).double() * (math.pi / 180)
    cosine, sine = angles.cos().float(), angles.sin().float()  # double before: the same bits at any place of a batch
    matrices[:, 0, 0] *= cosine
    matrices[:, 1, 1] *= cosine
    matrices[:, 0, 1] -= sine
    matrices[:, 1, 0] += sine
    return matrices


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """images (N, C, H, W) through matrices (N, 2, 3), nearest pixels, black outside."""
    channels, height, width = images.shape[1:]
    y = torch.arange(height, device=images.device)[:, None] + 0.5 - height / 2  # (H, 1)
    x = torch.arange(width, device=images.device) + 0.5 - width / 2  # (W,)
    (xx, xy, x0), (yx, yy, y0) = (row.unbind(1) for row in matrices[..., None, None].unbind(1))  # (N, 1, 1) each
    columns = (xx * x + xy * y).add_(x0 + (width / 2 - 0.5)).round_()  # (N, H, W)
    rows = (yx * x + yy * y).add_(y0 + (height / 2 - 0.5)).round_()
    outside = (columns < 0).logical_or_(columns >= width).logical_or_(rows < 0).logical_or_(rows >= height)
    pixels = rows.mul_(width).add_(columns).masked_fill_(outside, 0).long().flatten(1)  # (N, H·W)
    moved = images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view(images.shape)
    return moved.masked_fill_(outside[:, None], 0)
