"""What a person should know of a data set before a network is trained on it, in lines."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from distill.data.base import Data, Split
from distill.data.files import Encoded
from distill.data.pack import Packed
from distill.data.survey import Survey, digest, survey
from distill.progress import few, printable
from distill.types import in_px, sides

SPLITS = {"train": "training", "val": "validation", "test": "test"}
UNEVEN = 20  # times: classes whose numbers differ more are told in every run
SUFFIXES = {  # of formats whose names have other letters
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2",),
    "HEIF": (".heic", ".heif"),
    "DIB": (".bmp", ".dib"),
}
SEEN = {  # modes that are seen otherwise than they are kept
    "1": "black and white as grey",
    "L": "grey as three equal channels",
    "LA": "grey on white",
    "P": "colours looked up, on white where transparent",
    "PA": "colours looked up, on white where transparent",
    "RGBA": "on white where transparent",
    "CMYK": "inks as colours",
    "I": "the upper 8 of 16 bits",
    "I;16": "the upper 8 of 16 bits",
    "I;16B": "the upper 8 of 16 bits",
}


def uneven(data: Data) -> str | None:
    """The most and the least frequent class, where there is a large difference. Costs nothing."""
    counts = _counts(data, data.train)
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[most] < UNEVEN * counts[least]:
        return None
    return (
        f"classes are uneven: {counts[least]:,} training images of {printable(least)}, {counts[most]:,} of "
        f"{printable(most)}; the report's accuracy is over all images alike"
    )


def findings(data: Data) -> Iterator[str]:
    """A line for each thing that reading every image has found. What was read before isn't read again.

    Raises:
        ImageError: see `survey`.
    """
    found = data.surveys or {split: _survey(getattr(data, split)) for split in SPLITS}
    names = {split: _names(getattr(data, split)) for split in SPLITS}
    yield from _numbers(data)
    yield from _damaged(data)
    everything = [(name, found[split], row) for split in SPLITS for row, name in enumerate(names[split])]
    if found["train"].kinds.any():
        yield from _sizes(data, found)
        yield from _kinds(everything)
    yield from _twice(data, found, names)


def _numbers(data: Data) -> Iterator[str]:
    for split, called in SPLITS.items():
        counts = _counts(data, getattr(data, split))
        least, most = min(counts, key=counts.get), max(counts, key=counts.get)
        span = f"{counts[least]:,} ({printable(least)}) to {counts[most]:,} ({printable(most)})"
        even = counts[least] == counts[most]
        yield (
            f"{called}: {sum(counts.values()):,} images, {counts[most]:,} of each class"
            if even
            else (f"{called}: {sum(counts.values()):,} images, of a class {span}")
        )
        absent = [name for name, count in counts.items() if not count]
        if absent:
            yield f"no {called} images of {few(absent)}"


def _damaged(data: Data) -> Iterator[str]:
    if data.left_out:
        yield f"damaged: {len(data.left_out):,} images ({few(data.left_out)})"


def _counts(data: Data, split: Split) -> dict[str, int]:
    return dict(zip(data.classes, split.labels.bincount(minlength=data.num_classes).tolist(), strict=True))


def _source(split: Split) -> Encoded | None:
    images = split.images.source if isinstance(split.images, Packed) else split.images
    return images if isinstance(images, Encoded) else split.source


def _names(split: Split) -> list[str]:
    source = _source(split)
    return source.entries()[0] if source is not None else [f"row {row}" for row in range(len(split))]


def _survey(split: Split) -> Survey:
    """Of images that are in files, or in memory, whose kinds are "" then."""
    source = _source(split)
    if source is not None:
        return survey(source, None)
    count = len(split)
    pixels = split.images.cpu().numpy() if isinstance(split.images, Tensor) else None
    digests = [digest(image) for image in pixels] if pixels is not None else range(1, count + 1)
    none = np.zeros(count, bool)
    return Survey(np.array(digests, np.uint64), np.zeros((count, 2), np.int32), np.full(count, ""), none)


def _sizes(data: Data, found: dict[str, Survey]) -> Iterator[str]:
    every = np.concatenate([each.sizes[~each.corrupt] for each in found.values()])
    if not len(every):
        return
    small, large = (every[pick(every.prod(1, dtype=np.int64))] for pick in (np.argmin, np.argmax))
    same = (every == every[0]).all()
    span = "{} × {} px".format(*small) + ("" if same else " to {} × {} px".format(*large))
    fewer = int((every < sides(data.image_size)).any(1).sum())
    yield f"height × width: {span}" + (f"; {fewer:,} are enlarged to {in_px(data.image_size)}" if fewer else "")


def _kinds(everything: list[tuple[str, Survey, int]]) -> Iterator[str]:
    kinds = [(name, str(found.kinds[row])) for name, found, row in everything if found.kinds[row]]
    counts = Counter(kind for _, kind in kinds)
    yield "kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())
    for kind in counts:
        mode = kind.rpartition(" ")[2]
        if mode in SEEN:
            yield f"  {kind}: {SEEN[mode]}"
    several = [name for name, found, row in everything if found.frames[row]]
    if several:
        yield f"several frames, of which the first is seen: {len(several):,} ({few(several)})"
    formats = [(name, kind.partition(" ")[0]) for name, kind in kinds]
    misnamed = [f"{name} is {kind}" for name, kind in formats if _misnamed(name, kind)]
    if misnamed:
        yield f"named as another format, read as what they are: {len(misnamed):,} ({few(misnamed)})"


def _misnamed(name: str, kind: str) -> bool:
    suffix = Path(name).suffix.lower()
    return bool(suffix) and suffix not in SUFFIXES.get(kind, (f".{kind.lower()}",))


def _twice(data: Data, found: dict[str, Survey], names: dict[str, list[str]]) -> Iterator[str]:
    """The same pixels, as they are seen: in two splits, in two classes, or more than once."""
    digests = np.concatenate([found[split].digests for split in SPLITS])
    labels = np.concatenate([getattr(data, split).labels.numpy() for split in SPLITS])
    every = [name for split in SPLITS for name in names[split]]
    where = np.repeat(np.arange(len(SPLITS)), [len(names[split]) for split in SPLITS])
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.diff(digests[order], prepend=np.uint64(0)))  # no digest of a whole image is 0
    groups = [group for group in np.split(order, starts)[1:] if len(group) > 1]
    for held, called, by in ((1, "validation", "training"), (2, "test", "training or validation")):
        pairs = []
        for group in groups:
            before = group[where[group] < held]
            pairs += [f"{every[row]} = {every[before[0]]}" for row in group[where[group] == held] if len(before)]
        if pairs:
            total = (where == held).sum()
            yield f"leakage: {len(pairs):,} of {total:,} {called} images are among those of {by} ({few(pairs, 3)})"
    pairs = []
    for group in groups:
        others = group[labels[group] != labels[group[0]]]
        pairs += [f"{every[group[0]]} and {every[others[0]]}"] if len(others) else []
    if pairs:
        yield f"the same image in different classes: {len(pairs):,} ({few(pairs, 3)})"
    trained = [group[where[group] == 0] for group in groups]
    pairs = [f"{every[row]} = {every[group[0]]}" for group in trained for row in group[1:]]
    if pairs:
        yield f"training images that are there twice or more: {len(pairs):,} ({few(pairs, 3)})"


def left_out(data: Data) -> dict[str, str]:
    """For the report."""
    return {"images left out": f"{len(data.left_out):,}: {few(data.left_out)}"} if data.left_out else {}
