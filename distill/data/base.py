"""What an image set is: three splits that are read a batch at a time, and their loaders."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.augment import ShiftFlip
from distill.data.batches import EpochBatches
from distill.data.draws import draws
from distill.data.files import Files
from distill.errors import UsageError, UserError
from distill.types import Batch


@dataclass(eq=False)
class Split(Dataset):
    """Labelled images, read as `split[rows, views] -> Batch`.

    Args:
        images: (N, 3, H, W) uint8, or files.
        labels: (N,) int64.
        image_size: side of the square images of a batch.
        transform: `transform(images, uniforms, size) -> (N, 3, size, size) uint8`, needing `transform.count`
            uniforms an image (distill/data/augment.py); None: the images as they are.
        training: report rows and views, and let the view decide the uniforms; otherwise index -1, view 0.
        seed: of the views.
    """

    images: Tensor | Files
    labels: Tensor
    image_size: int
    transform: Callable | None = None
    training: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: tuple[Sequence[int], Sequence[int]]) -> Batch:
        """Rows and views, (N,) each: the batch, images (N, 3, image_size, image_size) float32 in [0, 1]."""
        rows, views = (torch.as_tensor(part, dtype=torch.int64) for part in index)
        images, labels = self.images[rows], self.labels[rows]
        if not self.training:
            rows, views = torch.full_like(rows, -1), torch.zeros_like(views)
        if self.transform is not None:
            uniforms = draws(self.seed, rows, views, self.transform.count)
            images = self.transform(images, uniforms, self.image_size)
        return Batch(images.float().div_(255), labels, rows, views)


@dataclass(eq=False)
class Data:
    """An image set. Its training rows are 0 … n-1; validation is part of neither training nor test."""

    classes: list[str]
    image_size: int
    train: Split
    val: Split
    test: Split
    batch_size: int
    num_workers: int

    def __post_init__(self):
        if self.batch_size < 1 or self.num_workers < 0:
            raise UsageError(
                "data.batch_size must be at least 1 and data.num_workers at least 0, "
                f"not {self.batch_size} and {self.num_workers}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of classes, labels, splits and pixels (of files: names and sizes), as 64 hex digits."""
        digest = hashlib.sha256(json.dumps([self.classes, self.image_size]).encode())
        for split in (self.train, self.val, self.test):
            digest.update(f"{len(split)} labels and images".encode())
            digest.update(split.labels.numpy())
            files = isinstance(split.images, Files)
            digest.update(split.images.listing() if files else split.images.contiguous().numpy())
        return digest.hexdigest()

    def train_loader(self, seed: int) -> DataLoader:
        """Batches in the order and the views of `seed`; `loader.sampler` is its EpochBatches."""
        return self._loader(replace(self.train, seed=seed), EpochBatches(len(self.train), self.batch_size, seed))

    def val_loader(self) -> DataLoader:
        """Every validation image once, in order and in every process, in batches twice as large."""
        return self._loader(self.val, _in_order(len(self.val), 2 * self.batch_size))

    def test_loader(self) -> DataLoader:
        """Every test image once, in order and in every process, in batches twice as large."""
        return self._loader(self.test, _in_order(len(self.test), 2 * self.batch_size))

    def _loader(self, split: Split, sampler) -> DataLoader:
        return DataLoader(
            split,
            batch_size=None,  # the sampler's items are whole batches already
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _in_order(size: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
    return [(rows.tolist(), [0] * len(rows)) for rows in torch.arange(size).split(batch_size)]


def from_arrays(
    classes: Sequence[str],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    augment: Callable | None,
    batch_size: int,
    num_workers: int,
) -> Data:
    """An image set in memory, from (images, labels) pairs.

    Args:
        images: (N, 1 or 3, S, S) uint8; grey becomes three equal channels.
        labels: (N,) int64.
        augment: None: `ShiftFlip()`.
    """
    size = train[0].shape[-1]

    def split(pair: tuple[Tensor, Tensor], **training) -> Split:
        images, labels = pair
        return Split(images.expand(-1, 3, -1, -1).contiguous(), labels, size, **training)

    training = split(train, transform=augment or ShiftFlip(), training=True)
    return Data(list(classes), size, training, split(val), split(test), batch_size, num_workers)


def cut(labels: Tensor, fractions: Sequence[float], seed: int, classes: Sequence[str]) -> list[Tensor]:
    """Stratified parts of a set, always the same for a seed: the rest first, then one for each fraction.

    Of each class, each part takes its fraction, rounded, but at least one row.

    Args:
        labels: (N,) int64.
        fractions: of the whole, positive, their sum below 1.

    Returns:
        Disjoint row numbers, ascending, (n,) int64 each.

    Raises:
        UserError: the fractions are out of range, or a class has too few images to be in every part.
    """
    if min(fractions) <= 0 or sum(fractions) >= 1:
        raise UsageError(
            f"the fractions of data to hold out must be above 0 and sum to less than 1, not {list(fractions)}"
        )
    rank = draws(seed, torch.arange(len(labels)), torch.zeros(len(labels), dtype=torch.int64), 1)[:, 0]
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label, name in enumerate(classes):
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[rank[rows].argsort(stable=True)]
        counts = [max(1, round(len(rows) * fraction)) for fraction in fractions]
        rest = len(rows) - sum(counts)
        if rest < 1:
            raise UserError(
                f"class '{name}' has {len(rows)} images: too few to be split into {len(parts)} parts "
                f"(fractions held out: {list(fractions)}); add images or leave the class out"
            )
        for part, share in zip(parts, rows.split([rest, *counts]), strict=True):
            part.append(share)
    return [torch.cat(part).sort().values for part in parts]
