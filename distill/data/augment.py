"""Augmentations as pure functions of images and uniform numbers: `augment(images, uniforms, size)`.

`size` is the set's: the side of squares, or (height, width); what is made of that size is (N, C, H, W).

`count` is how many uniforms an image needs. Pixels stay uint8; nothing here draws a random number, and no image's bits
depend on the others of its batch: sums are of whole numbers, and floats are worked on one operation at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

from distill.errors import UsageError
from distill.schema.ranges import Count, Number, PositiveRange, ShareRange
from distill.types import ImageSize, sides

SMALL = 64  # px: images up to this side are kept in memory and worked on a batch at a time
LOT = 2**21  # numbers: of the images that a processor works on at once, so that what is in between stays in its caches
LONGEST = 32  # times: of an image's side, in proportion, that is resized as a whole
_TRIES = 10


@dataclass(frozen=True)
class Chain:
    """Augmentations one after the other; then, with `mixes`, each image is mixed with another one's view.

    Where there are several mixes, each image draws one of them. See distill/data/mix.py.
    """

    steps: tuple[Callable, ...]
    mixes: tuple = ()

    @property
    def count(self) -> int:
        return sum(step.count for step in self.steps)

    @property
    def mix_count(self) -> int:
        """Uniforms that `mix` needs: one chooses the mix."""
        return 1 + max(mix.count for mix in self.mixes)

    def __call__(self, images: Tensor | Sequence[Tensor], uniforms: Tensor, size: ImageSize) -> Tensor:
        """What the first step takes, and uniforms (N, count): (N, C, H, W) uint8."""
        lot = max(1, LOT // (3 * math.prod(sides(size)))) if uniforms.device.type == "cpu" else len(images)
        starts = range(0, len(images), lot)
        seen = [self._seen(images[start : start + lot], uniforms[start : start + lot], size) for start in starts]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def _seen(self, images: Tensor | Sequence[Tensor], uniforms: Tensor, size: ImageSize) -> Tensor:
        for step, part in zip(self.steps, uniforms.split([step.count for step in self.steps], dim=1), strict=True):
            images = step(images, part, size)
        return images

    def mix(self, images: Tensor, partners: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """images, partners (N, C, H, W) in [0, 1], uniforms (N, mix_count): mixed, and the own label's share (N,)."""
        mixed, share = images.clone(), images.new_ones(len(images))
        chosen = (uniforms[:, 0] * len(self.mixes)).long()
        for number, mix in enumerate(self.mixes):
            rows = (chosen == number).nonzero()[:, 0]
            mixed[rows], share[rows] = mix.mix(images[rows], partners[rows], uniforms[rows, 1 : 1 + mix.count])
        return mixed, share


def chain(augment: Mapping[str, Callable] | None, default: Callable) -> Chain:
    """The augmentations of `augment` in their order, mixes last; `default` where no step is given."""
    given = tuple((augment or {}).values())
    steps = tuple(step for step in given if not hasattr(step, "mix"))
    return Chain(steps or (default,), tuple(step for step in given if hasattr(step, "mix")))


@dataclass(frozen=True)
class ShiftFlip:
    """Shift by up to `padding` pixels, zeros moving in, and mirror half of the images (He et al. 2016)."""

    padding: Number = 4
    flip: bool = True
    count = 3

    def __post_init__(self):
        if self.padding < 0:
            raise UsageError(f"ShiftFlip: padding must be at least 0, not {self.padding}")

    def __call__(self, images: Tensor, uniforms: Tensor, size: ImageSize) -> Tensor:
        """images (N, C, H, W) of any dtype, uniforms (N, 3): a new (N, C, H, W); `size` is not used."""
        _, channels, height, width = images.shape
        offsets = (uniforms[:, :2] * (2 * self.padding + 1)).long()  # 0 … 2 · padding, evenly
        rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (N, H) in the padded image
        columns = offsets[:, 1:] + torch.arange(width, device=images.device)  # (N, W)
        if self.flip:
            columns = torch.where(uniforms[:, 2:] < 0.5, columns.flip(1), columns)
        pixels = (rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]).flatten(1)  # (N, H·W)
        padded = pad(images, [self.padding] * 4).flatten(2)
        return padded.gather(2, pixels[:, None, :].expand(-1, channels, -1)).view(images.shape)


@dataclass(frozen=True)
class Flip:
    """Mirror half of the images."""

    count = 1

    def __call__(self, images: Tensor, uniforms: Tensor, size: ImageSize) -> Tensor:
        """images (N, C, H, W), uniforms (N, 1): a new (N, C, H, W); `size` is not used."""
        return torch.where(uniforms[:, :, None, None] < 0.5, images.flip(3), images)


@dataclass(frozen=True)
class Cutout:
    """A grey square of `size` pixels anywhere, parts of it outside included (DeVries & Taylor 2017).

    The paper puts zeros into normalised images, which is about the mean: hence `fill`.
    """

    size: Count = 8
    fill: Annotated[int, Interval(ge=0, le=255)] = 128
    count = 2

    def __post_init__(self):
        if self.size < 1 or not 0 <= self.fill <= 255:
            raise UsageError(f"Cutout: size must be at least 1 and fill 0 to 255, not {self.size} and {self.fill}")

    def __call__(self, images: Tensor, uniforms: Tensor, size: ImageSize) -> Tensor:
        """images (N, C, H, W) uint8, uniforms (N, 2): a new (N, C, H, W); the argument `size` is not used."""
        inside = []
        for side, uniform in zip(images.shape[2:], uniforms.split(1, dim=1), strict=True):
            corner = (uniform * side).long() - self.size // 2  # (N, 1)
            place = torch.arange(side, device=images.device)
            inside.append((place >= corner) & (place < corner + self.size))  # (N, H) and (N, W)
        return images.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], self.fill)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to the set's size, mirrored half of the time (Szegedy et al. 2015).

    `scale` is the range of the part's area over the image's, `ratio` that of its width over its height, as seen once
    it is resized: 1 is not distorted, whatever the set's size.
    """

    scale: ShareRange = (0.25, 1.0)
    ratio: PositiveRange = (3 / 4, 4 / 3)
    flip: bool = True
    count = 2 * _TRIES + 3
    crops = True  # takes images of any sizes

    def __post_init__(self):
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UsageError(
                "RandomResizedCrop: scale must be [low, high] within (0, 1] and ratio [low, high] above 0, "
                f"not {list(self.scale)} and {list(self.ratio)}"
            )

    def __call__(self, images: Sequence[Tensor], uniforms: Tensor, size: ImageSize) -> Tensor:
        """N images (C, H, W) uint8 of any sizes, and uniforms (N, 23): (N, C, H, W) uint8."""
        sizes = torch.tensor([image.shape[1:] for image in images], device=uniforms.device)  # (N, 2) height, width
        height, width = sides(size)
        boxes, flips = self.boxes(sizes, uniforms, width / height), self.flip & (uniforms[:, -1] < 0.5)
        if isinstance(images, Tensor) and max(images.shape[2:]) <= SMALL:
            crops = _resized_crops(images, boxes, (height, width))
            return torch.where(flips[:, None, None, None], crops.flip(3), crops)
        # dense matrices would cost more than a loop
        pairs = zip(images, boxes.tolist(), strict=True)
        crops = [F.resized_crop(image, *box, [height, width], antialias=True) for image, box in pairs]
        return torch.stack([crop.flip(2) if flip else crop for crop, flip in zip(crops, flips.tolist(), strict=True)])

    def boxes(self, sizes: Tensor, uniforms: Tensor, aspect: float = 1.0) -> Tensor:
        """(N, 2) heights and widths, uniforms (N, 23) → (N, 4) int64: top, left, height, width.

        `aspect` is width over height of what the part is resized to, by which the ratio's range is multiplied.

        As torchvision's: area uniform, ratio log-uniform; the first of ten tries that fits; if none does, the
        middle of the image at the ratio nearest to its own.
        """
        size = sizes.double()[:, None]  # (N, 1, 2)
        areas, ratios = uniforms[:, : 2 * _TRIES].double().chunk(2, dim=1)  # (N, 10) each
        low, high = (aspect * ratio for ratio in self.ratio)
        areas = torch.lerp(*areas.new_tensor(tuple(self.scale)), areas) * size.prod(-1)
        ratios = torch.lerp(*areas.new_tensor((low, high)).log(), ratios).exp()
        tries = torch.stack([(areas / ratios).sqrt(), (areas * ratios).sqrt()], -1).round()  # (N, 10, 2)
        fits = ((tries <= size) & (tries >= 1)).all(-1)
        chosen = tries[torch.arange(len(sizes), device=sizes.device), fits.byte().argmax(1)]  # (N, 2)

        height, width = sizes.double().unbind(1)
        widest = torch.stack([height.minimum(width / low), width.minimum(height * high)], 1).round()
        found = fits.any(1, keepdim=True)
        extent = torch.where(found, chosen, widest.clamp(min=1)).long()
        position = torch.where(found, uniforms[:, 2 * _TRIES : 2 * _TRIES + 2].double(), 0.5)
        corner = (position * (sizes - extent + 1)).long()
        return torch.cat([corner, extent], 1)


def _resized_crops(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) of images (N, C, H, W) uint8, resized with antialiasing by two matrices each: (N, C, *size).

    The weights are multiples of 2^-14, so that products and sums are exact in float32 in whatever order.
    """
    count, channels, height, width = images.shape
    down, across = (
        _triangles(boxes[:, axis], boxes[:, axis + 2], side, size[axis]) for axis, side in enumerate((height, width))
    )
    pixels = images.flatten(1, 2).float() @ across.mT  # (N, C·H, size[1])
    pixels = pixels.round_().view(count, channels, height, size[1]).mT.flatten(1, 2)  # rounded in between, as by Pillow
    pixels = (pixels @ down.mT).round_().clamp_(0, 255)  # (N, C·size[1], size[0])
    return pixels.to(torch.uint8).view(count, channels, *size[::-1]).mT.contiguous()


def _triangles(start: Tensor, extent: Tensor, side: int, size: int) -> Tensor:
    """Weights (N, size, side) of `side` pixels in the `size` that `extent` pixels from `start` become, (N,) each."""
    start, extent = start[:, None, None], extent[:, None, None]
    scale = extent / size
    centers = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (N, size, 1) from `start`
    pixels = torch.arange(side, device=start.device) + 0.5 - start  # (N, 1, side)
    weights = (pixels - centers).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0)
    weights.mul_((pixels > 0) & (pixels < extent))
    return weights.div_(weights.sum(2, keepdim=True)).mul_(2**14).round_().div_(2**14)


@dataclass(frozen=True)
class CenterCrop:
    """For evaluation: resized until it covers `resize` times the set's size, then the middle of that size.

    Of a square that is: the short side resized, then the middle square.
    """

    resize: float = 256 / 224
    count = 0

    def __call__(self, images: Sequence[Tensor], uniforms: Tensor, size: ImageSize) -> Tensor:
        """N images (C, H, W) uint8 of any sizes, uniforms (N, 0): (N, C, H, W) uint8."""
        covered = self.covered(size)
        middles = (_middle_part(image, covered) for image in images)
        resized = [F.resize(image, covering(image.shape[1:], covered), antialias=True) for image in middles]
        return torch.stack([F.center_crop(image, sides(size)) for image in resized])

    def covered(self, size: ImageSize) -> tuple[int, int]:
        """Height and width, px, that an image covers once it is resized."""
        # a quotient times its divisor may be a bit more
        height, width = (math.ceil(round(self.resize * side, 6)) for side in sides(size))
        return height, width


def _middle_part(image: Tensor, wanted: tuple[int, int]) -> Tensor:
    """Of an image that is LONGEST times as long as its shape would be, or more: the middle. Resized until it covers
    what is wanted, a line of 1 × 20,000 px would be of billions."""
    height, width = image.shape[1:]
    high, wide = wanted
    most = [max(1, LONGEST * width * high // wide), max(1, LONGEST * height * wide // high)]
    if height <= most[0] and width <= most[1]:
        return image
    return F.center_crop(image, [min(height, most[0]), min(width, most[1])])


def covering(image: Sequence[int], wanted: tuple[int, int]) -> list[int]:
    """The smallest height and width to which an image (height, width) can be resized so that it covers `wanted`.

    Its shape stays; as in torchvision, the side that is longer than wanted is rounded down.
    """
    (height, width), (high, wide) = image, wanted
    length, own = (high, height) if height * wide <= width * high else (wide, width)
    return [int(length * side / own) for side in image]
