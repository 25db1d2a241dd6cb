"""What an image set is: three splits that are read a batch at a time, and their loaders."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill import signals
from distill.data.augment import CenterCrop, Chain, RandomResizedCrop, ShiftFlip, chain
from distill.data.batches import EpochBatches, InOrder, ViewBatches
from distill.data.draws import draws
from distill.data.files import CorruptImage, Encoded, check
from distill.data.loader import Loader, unit
from distill.data.pack import Packed, pack, read_small
from distill.data.survey import Survey, survey
from distill.errors import UsageError, UserError
from distill.progress import few
from distill.schema.ranges import OnCorrupt
from distill.types import Batch, ImageSize, checked_size, in_px, sides

WAIT = 600  # seconds for a batch from a process that loads images: one that hangs would be waited for without end


@dataclass(eq=False)
class Split(Dataset):
    """Labelled images, read as `split[rows, view] -> Batch`.

    Args:
        images: (N, 3, H, W) uint8; or encoded, or packed, at a larger size.
        labels: (N,) int64.
        image_size: px, of the images of a batch: the side of squares, or (height, width).
        transform: `transform(images, uniforms, image_size) -> (N, 3, H, W) uint8`, needing `transform.count` uniforms
            an image (distill/data/augment.py), in training a Chain; None: the images as they are.
        training: report rows and views, and let the view decide the uniforms; otherwise index -1, view 0.
        seed: of the views.
        source: files that images in memory were decoded from.
        answers: `answers(rows, view)`, what is kept of a teacher's answers, goes with each batch of training.
        as_bytes: images of a batch are uint8 where they are neither mixed nor made floats by `transform`.
    """

    images: Tensor | Encoded | Packed
    labels: Tensor
    image_size: ImageSize
    transform: Callable | None = None
    training: bool = False
    seed: int = 0
    source: Encoded | None = None
    answers: Callable | None = None
    as_bytes: bool = False

    def __post_init__(self):
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
            came = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise UsageError(f"labels: expected a tensor of int64, one number an image, not {came}")
        if len(self.images) != len(labels):
            raise UsageError(f"{len(self.images):,} images and {len(labels):,} labels: expected one label an image")
        images = self.images
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3):
            came = f"{images.dtype} {tuple(images.shape)}"
            raise UsageError(f"images: expected a tensor (N, 3, H, W) of uint8, from 0 to 255, not {came}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: tuple[Sequence[int], int]) -> Batch:
        """Rows (N,) in one view: the batch, images (N, 3, H, W) float32 in [0, 1], but see `as_bytes`."""
        rows, view = torch.as_tensor(index[0], dtype=torch.int64), int(index[1])
        if not self.training:
            return Batch(self._made(rows, view), self.labels[rows], torch.full_like(rows, -1), 0)
        answers = None if self.answers is None else self.answers(rows, view)
        if isinstance(self.transform, Chain) and self.transform.mixes:
            return self._mixed(rows, view)._replace(answers=answers)
        return Batch(self._made(rows, view), self.labels[rows], rows, view, answers=answers)

    def _made(self, rows: Tensor, view: int) -> Tensor:
        images = self._seen(rows, view)
        return images if self.as_bytes and images.dtype == torch.uint8 else unit(images)

    def _seen(self, rows: Tensor, view: int) -> Tensor:
        """(N, 3, H, W) in [0, 255], not mixed."""
        images = self.images[rows]
        if self.transform is not None:
            uniforms = draws(self.seed, rows, torch.full_like(rows, view), self.transform.count)
            if isinstance(images, Tensor):  # they may be on an accelerator
                uniforms = uniforms.to(images.device, non_blocking=True)
            images = self.transform(images, uniforms, self.image_size)
        return images

    def _mixed(self, rows: Tensor, view: int) -> Batch:
        """Each row with a partner that its (row, view) draws, which is seen as in its own view of that number."""
        own = self.transform.count  # the numbers after these are the mix's
        uniforms = draws(self.seed, rows, torch.full_like(rows, view), own + 1 + self.transform.mix_count)[:, own:]
        partners = (uniforms[:, 0].double() * len(self)).long()
        images = unit(self._seen(torch.cat([rows, partners]), view))
        uniforms = uniforms.to(images.device, non_blocking=True)
        images, share = self.transform.mix(*images.chunk(2), uniforms[:, 1:])
        return Batch(images, self.labels[rows], rows, view, self.labels[partners], share)


@dataclass(eq=False)
class Data:
    """An image set. Its training rows are 0 … n-1; validation is part of neither training nor test.

    Args:
        batch_size, num_workers: of its loaders; who makes the set leaves them out, see distill/cli/build.py.
            num_workers=None: 2, and none for images in memory.
        left_out: name and reason of each image that is damaged and belongs to no split.
        surveys: of train, val and test, where all images were read.
    """

    classes: list[str]
    image_size: ImageSize
    train: Split
    val: Split
    test: Split
    batch_size: int = 64
    num_workers: int | None = None
    left_out: tuple[str, ...] = ()
    surveys: Mapping[str, Survey] | None = None

    def __post_init__(self):
        if self.num_workers is None:
            self.num_workers = 0 if isinstance(self.train.images, Tensor) else 2
        if self.batch_size < 1 or self.num_workers < 0:
            raise UsageError(
                "data.batch_size must be at least 1 and data.num_workers at least 0, "
                f"not {self.batch_size} and {self.num_workers}"
            )
        for split in ("train", "val", "test"):
            labels = getattr(self, split).labels
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise UsageError(
                    f"labels of {split} run from {labels.min()} to {labels.max()}, and there are {len(self.classes)} "
                    "classes: expected 0 to one less than that"
                )
        for name in self.classes:
            if not name or {unicodedata.category(sign) for sign in name} & {"Cc", "Cs", "Zl", "Zp"}:
                raise UserError(
                    f"the class {name!a} has signs that are no text: classes.txt has a line of UTF-8 for each class; "
                    "rename it"
                )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of classes, labels, splits and pixels (of files: see `Encoded.listing`), as 64 hex digits."""
        digest = hashlib.sha256(json.dumps([self.classes, self.image_size]).encode())
        for split in (self.train, self.val, self.test):
            digest.update(f"{len(split)} labels and images".encode())
            digest.update(split.labels.numpy())
            pixels = isinstance(split.images, Tensor)
            digest.update(split.images.contiguous().cpu().numpy() if pixels else split.images.listing())
        return digest.hexdigest()

    def resident(self, device: torch.device) -> "Data":
        """The same with its training images on a CUDA device, and augmented there, if a quarter of it holds them."""
        images = self.train.images
        if device.type != "cuda" or self.num_workers or not isinstance(images, Tensor):
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > free / 4:
            return self
        return replace(self, train=replace(self.train, images=images.to(device)))

    def train_loader(
        self, seed: int, views: int | None = None, view_seed: int | None = None, answers: Callable | None = None
    ) -> DataLoader:
        """Batches in the order of `seed`; `loader.sampler` is its EpochBatches.

        Args:
            views: how many repeatable views of a row take turns over the epochs; None: a new one every epoch.
            view_seed: of the views; None: `seed`.
            answers: see Split; read by workers only: in this process it would be no sooner than where it is needed.
        """
        view_seed = seed if view_seed is None else view_seed
        split = replace(self.train, seed=view_seed, answers=answers if self.num_workers else None)
        return self._loader(split, EpochBatches(len(self.train), self.batch_size, seed, views))

    def views_loader(self, views: int, view_seed: int) -> DataLoader:
        """Every training row in each of its first `views` views, in batches as large as in training."""
        split = replace(self.train, seed=view_seed)
        return self._loader(split, ViewBatches(len(self.train), self.batch_size, views))

    def val_loader(self, shared: bool = False) -> DataLoader:
        """Every validation image, see `in_order`."""
        return self.in_order(self.val, shared)

    def test_loader(self) -> DataLoader:
        """Every test image, see `in_order`."""
        return self.in_order(self.test)

    def in_order(self, split: Split, shared: bool = False) -> DataLoader:
        """Every image of a split once, in order, in batches twice as large: in every process, or `shared` by them."""
        return self._loader(split, InOrder(len(split), 2 * self.batch_size, shared))

    def _loader(self, split: Split, sampler) -> DataLoader:
        return Loader(
            replace(split, as_bytes=self.num_workers > 0),
            batch_size=None,  # the sampler's items are whole batches already
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=signals.left_to_parent,
            timeout=WAIT if self.num_workers else 0,
            pin_memory=torch.cuda.is_available() and not getattr(split.images, "is_cuda", False),
        )


def from_arrays(
    classes: Sequence[str],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    augment: Mapping[str, Callable] | None,
    default: Callable = ShiftFlip(),  # noqa: B008 - a frozen value
) -> Data:
    """An image set in memory, from (images, labels) pairs.

    Args:
        images: (N, 1 or 3, H, W) uint8; grey becomes three equal channels.
        labels: (N,) int64.
        augment: augmentations by name, in order (distill/data/augment.py).
        default: used where `augment` has none, mixes apart.
    """
    size = checked_size(tuple(train[0].shape[2:]))

    def split(pair: tuple[Tensor, Tensor], **training) -> Split:
        images, labels = pair
        return Split(images.expand(-1, 3, -1, -1).contiguous(), labels, size, **training)

    training = split(train, transform=chain(augment, default), training=True)
    return Data(list(classes), size, training, split(val), split(test))


def from_encoded(
    classes: Sequence[str],
    images: Encoded,
    labels: Mapping[str, Tensor],
    fractions: Mapping[str, float],
    split_seed: int,
    corrupt: OnCorrupt,
    image_size: ImageSize | None,
    pack_size: ImageSize | None,
    store: str | None,
    augment: Mapping[str, Callable] | None,
) -> Data:
    """An image set of encoded images: in memory if they are small, packed if asked to, else decoded batch by batch.

    Args:
        labels: (n,) int64 of each split that is given, in the order of the images: train and, if there, val and test.
        fractions: of train, for val and test where they are cut.
        corrupt: "skip": all are read first, and what is damaged is left out before anything is cut.
        image_size: None: that of the images if all are equal and at most 64 px, otherwise 224.
        pack_size: of packed images, from which views are cropped; None: images are not packed.
        store: folder of packs.
    """
    found, left = None, ()
    if corrupt == "skip":
        images, labels, found, left = _whole(classes, images, labels, store)
    rows = hold_out(labels, fractions, split_seed, classes)
    every = torch.cat(list(labels.values()))
    data = _small(classes, images, every, rows, image_size, store, augment) if pack_size is None else None
    if data is None:
        if pack_size is None and found is None:  # else all have been decoded, or are now
            check(images, torch.cat([rows["val"], rows["test"]]), store)
        data = _large(classes, images, every, rows, image_size, pack_size, store, augment)
    surveys = None if found is None else {split: found.select(part.numpy()) for split, part in rows.items()}
    return replace(data, left_out=left, surveys=surveys)


def _whole(
    classes: Sequence[str], images: Encoded, labels: Mapping[str, Tensor], store: str | None
) -> tuple[Encoded, dict[str, Tensor], Survey, tuple[str, ...]]:
    """What of images and labels can be decoded, what was found, and why each of the others can't."""
    found = survey(images, store)
    whole = ~torch.from_numpy(found.corrupt)
    rows = whole.split([len(part) for part in labels.values()])
    kept = {split: part[mine] for (split, part), mine in zip(labels.items(), rows, strict=True)}
    for split, part in labels.items():
        lost = set(part.unique().tolist()) - set(kept[split].unique().tolist())
        if lost:
            names = few([classes[label] for label in sorted(lost)])
            raise UserError(f"no image of {split} can be read in {len(lost)} classes ({names}): mend or remove them")
    return images.select(whole.nonzero()[:, 0]), kept, found.select(whole.numpy()), tuple(found.reasons)


def _small(
    classes: Sequence[str],
    images: Encoded,
    labels: Tensor,
    rows: Mapping[str, Tensor],
    image_size: ImageSize | None,
    store: str | None,
    augment: Mapping[str, Callable] | None,
) -> Data | None:
    """In memory; None: they are too large for that."""
    lengths = [len(part) for part in rows.values()]
    try:
        pixels = read_small(images.select(torch.cat(list(rows.values()))), image_size, store)
    except CorruptImage:
        check(images, torch.arange(len(images)), None)  # says how many there are
        raise
    if pixels is None:
        return None
    pairs = zip(pixels.split(lengths), (labels[part] for part in rows.values()), strict=True)
    data = from_arrays(classes, *pairs, augment)
    for split, part in rows.items():
        getattr(data, split).source = images.select(part)
    return data


def _large(
    classes: Sequence[str],
    images: Encoded,
    labels: Tensor,
    rows: Mapping[str, Tensor],
    image_size: ImageSize | None,
    pack_size: ImageSize | None,
    store: str | None,
    augment: Mapping[str, Callable] | None,
) -> Data:
    """Packed, or decoded batch by batch."""
    size, packed = image_size or 224, None
    if pack_size is not None:
        room = min(packed / side for packed, side in zip(sides(pack_size), sides(size), strict=True))
        if room < 1 or store is None:
            raise UsageError(
                f"data.pack={pack_size}: must be at least data.image_size ({in_px(size)}), and needs data.store"
            )
        packed = pack(images, pack_size, store)
    transform = chain(augment, RandomResizedCrop())
    if not getattr(transform.steps[0], "crops", False) and (packed is None or pack_size != size):
        raise UsageError(
            f"augment: images larger than {in_px(size)} must be cropped first, by RandomResizedCrop: "
            "'augment=[resized_crop,...]'"
        )
    splits = {
        split: images.select(part) if packed is None else Packed(packed, images.select(part), part)
        for split, part in rows.items()
    }
    whole = CenterCrop() if packed is None else CenterCrop(min(CenterCrop.resize, room))
    train = Split(splits["train"], labels[rows["train"]], size, transform, training=True)
    val, test = (Split(splits[split], labels[rows[split]], size, whole) for split in ("val", "test"))
    return Data(list(classes), size, train, val, test)


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


def hold_out(
    labels: Mapping[str, Tensor], fractions: Mapping[str, float], seed: int, classes: Sequence[str]
) -> dict[str, Tensor]:
    """Rows of train, val and test in the concatenation of the splits that are given, train first.

    A lone val is the test set, so that nothing is chosen by what is reported. What is missing is cut from train.

    Args:
        labels: (n,) int64 of each split given: train and, if there, val and test.
        fractions: of train, for val and test where they are cut.
    """
    parts = torch.arange(sum(map(len, labels.values()))).split([len(part) for part in labels.values()])
    rows = dict(zip(labels, parts, strict=True))
    if "val" in rows and "test" not in rows:
        rows["test"] = rows.pop("val")
    missing = [split for split in ("val", "test") if split not in rows]
    if missing:
        cuts = cut(labels["train"], [fractions[split] for split in missing], seed, classes)
        rows |= dict(zip(["train", *missing], cuts, strict=True))
    return {split: rows[split] for split in ("train", "val", "test")}
