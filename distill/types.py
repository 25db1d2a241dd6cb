"""What flows through the toolkit: a batch of images in, a network's outputs out."""

import copy
import math
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill.errors import UsageError, UserError

LARGEST = 8192  # px: of an image's sides

ImageSize = int | tuple[int, int]  # px: the side of squares, or (height, width) where they differ


def checked_size(size, option: str = "data.image_size") -> ImageSize:
    """N for N and for [N, N], so that squares are the same however they are given; (H, W) for another [H, W].

    Args:
        size: px, whole numbers from 1 to LARGEST.
        option: names it in the error.

    Raises:
        UsageError: it is no such number or pair.
    """
    pair = [size, size] if type(size) is int else size
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(side) is int for side in pair):
        raise UsageError(f"{option}={size}: expected a whole number of px, or two: [HEIGHT,WIDTH]")
    if not all(0 < side <= LARGEST for side in pair):
        raise UsageError(f"{option}={size}: expected sides of 1 to {LARGEST} px")
    return pair[0] if pair[0] == pair[1] else tuple(pair)


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width), px."""
    return (size, size) if isinstance(size, int) else tuple(size)


def in_px(size: ImageSize) -> str:
    """For messages: "32 px", or height and width, "16 × 24 px"."""
    return f"{size} px" if isinstance(size, int) else "{} × {} px".format(*size)


def alike(height: int, width: int, image: tuple[int, int]) -> bool:
    """Whether sides are those of an image (height, width) divided by one number, rounded up or down.

    Of a square, only equal sides are.
    """
    return abs(height * image[1] - width * image[0]) < max(image)


def grid(tokens: int, image: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest grid of an image's shape (height, width) that has at most as many cells; of a
    square: the whole root, twice. (0, 0): there is none."""
    common = math.gcd(*image)
    high, wide = image[0] // common, image[1] // common
    times = math.isqrt(tokens // (high * wide))
    return high * times, wide * times


def square(size: ImageSize, network: str) -> int:
    """The side.

    Raises:
        UserError: `network` needs squares, and these are none.
    """
    if not isinstance(size, int):
        raise UserError(
            f"{network} takes square images only, not {in_px(size)}: give data.image_size one number, or choose a "
            "convolutional network or a transformer of timm"
        )
    return size


class Batch(NamedTuple):
    """N images with their labels and where they come from."""

    images: Tensor  # (N, C, H, W) float in [0, 1]
    labels: Tensor  # (N,) int64 in [0, K); of a mixed image: that of its larger part
    index: Tensor  # (N,) int64, row in the training set; -1: not a row of it. On the host, where rows are looked up
    view: int  # which repeatable augmentation of those rows this is
    partner: Tensor | None = None  # (N,) int64 in [0, K), label of what a mixed image was mixed with; None: not mixed
    share: Tensor | None = None  # (N,) float in [0.5, 1], of its own label
    answers: dict[str, Tensor] | None = None  # what the teacher's cache keeps of them, where a worker has read it

    def to(self, device: torch.device) -> "Batch":
        """What networks and losses compute with on a device; `index` stays. Lightning moves batches by this."""
        device = torch.device(device)

        def moved(part):
            if isinstance(part, dict):
                return {name: moved(inside) for name, inside in part.items()}
            return part.to(device, non_blocking=device.type == "cuda") if isinstance(part, Tensor) else part

        return Batch(**{name: part if name == "index" else moved(part) for name, part in self._asdict().items()})


class Outputs(NamedTuple):
    """What a network answers to N images."""

    logits: Tensor  # (N, K)
    features: dict[str, Tensor]  # by tap name: maps (N, C, H, W), tokens (N, T, D) or vectors (N, D)

    def float(self) -> "Outputs":
        """The same in float32, float64 apart: losses are computed outside of autocast."""
        whole = (lambda value: value) if self.logits.dtype == torch.float64 else (lambda value: value.float())
        return Outputs(whole(self.logits), {name: whole(value) for name, value in self.features.items()})

    def detach(self) -> "Outputs":
        return Outputs(self.logits.detach(), {name: value.detach() for name, value in self.features.items()})


def plain_values(cfg):
    """A copy of a part of the configuration in plain Python, interpolations resolved; other values just copied."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else copy.deepcopy(cfg)
